"""From an audio file to the waveform and the log-mel features that the speech encoder reads.

Axes: n samples at 16 kHz, f frames of 10 ms, m mel bins. One path for training, evaluation and chat: FFmpeg (through
PyAV) decodes, `ops/filter_bank.py` resamples and makes the features.

Follows `vita/model/multimodal_encoder/whale/init_model.py`: float samples in -1..1, the first channel only, 16 kHz,
features without normalisation (the encoder normalises). VITA-1.0 computed the features of resampled files with their
original rate, which is a bug; 1.5 and this module do not.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import av
import numpy as np

from vita_jax.data.images import require_file, source_name
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED, FilterBankConfig, log_mel, num_frames, resample

# Containers that FFmpeg may open. Without a list it would also take text files and playlists for sound, and follow the
# latter to other files.
CONTAINERS = "wav,w64,aiff,au,flac,mp3,ogg,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,amr"
CONTAINERS_FOR_HUMANS = "WAV, FLAC, MP3, OGG, M4A, WebM"
# FLAC says exactly how long it is; by how many seconds a file may fall short of that.
CUT_OFF_SECONDS = 0.1
# Sizes that programs write into a WAV header while they do not know better.
UNKNOWN_RIFF_SIZES = (0, 0xFFFFFFFF)

# The end of the encoder's table of positions.
MAX_SECONDS = 200.0

AudioSource = str | os.PathLike[str] | bytes


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """How audio files become features.

    Attributes:
      filter_bank: the features, and the sample rate that everything is resampled to.
      max_seconds: longer files are refused; at most MAX_SECONDS.
      channel: "first", as the originals do, or the "mean" of all channels.

    Raises:
      UserError: a value outside its range.
    """

    filter_bank: FilterBankConfig = RELEASED
    max_seconds: float = 60.0
    channel: Literal["first", "mean"] = "first"

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds <= MAX_SECONDS:
            raise UserError(f"audio: max_seconds is {self.max_seconds}; it must be above 0 and at most {MAX_SECONDS:g}")
        if self.channel not in ("first", "mean"):
            raise UserError(f"audio: channel {self.channel!r} is unknown; use 'first' or 'mean'")

    @property
    def sample_rate(self) -> int:
        """Samples per second of all waveforms."""
        return self.filter_bank.sample_rate


@dataclasses.dataclass(frozen=True)
class AudioContext:
    """What decides how a clip looks to the language model.

    Attributes:
      config: waveform and features.
      num_tokens: frames -> tokens, of the model's audio tower (`AudioTowerConfig.num_tokens`).
    """

    config: AudioConfig
    num_tokens: Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One encoded file, ready for the model.

    Attributes:
      features: (f m) float32 log-mel energies, not normalised.
      num_tokens: how many positions it takes in the language model, at least 1.
    """

    features: np.ndarray
    num_tokens: int


# ---- decoding -------------------------------------------------------------------------------------------------------


def read_audio(
    source: AudioSource,
    config: AudioConfig = AudioConfig(),  # noqa: B008
    *,
    name: str | None = None,
    sample_rate: int | None = None,
) -> np.ndarray:
    """Decodes a sound file of any common format, rate and number of channels.

    Args:
      source: a path, or the bytes of a file.
      config: longest duration, channel, and the rate of the result where none is given.
      name: what to call the file in error messages; default the path.
      sample_rate: of the result, for sound that is not made into features.

    Returns:
      (n,) float32 at `sample_rate`; integer samples of k bits are divided by 2**(k-1), so they are in -1..1.

    Raises:
      UserError: a missing, empty, damaged, cut off or too long file, or one without sound; names it.
    """
    label = source_name(source, name)
    require_file(source, label)
    _check_riff_size(source, label)
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{os.fspath(source)}"
    try:
        # "file:" keeps FFmpeg from reading a protocol into an odd file name.
        container = av.open(file, container_options={"format_whitelist": CONTAINERS})
    except (av.ArgumentError, av.FFmpegError, ValueError) as error:
        raise UserError(
            f"{label}: not a sound file in a known format ({CONTAINERS_FOR_HUMANS}), or damaged ({_reason(error)})"
        ) from error
    with container:
        try:
            waveform, rate = _decode(container, config, label)
        except (av.FFmpegError, ValueError) as error:
            raise UserError(f"{label}: the sound is damaged ({_reason(error)})") from error
    if not np.isfinite(waveform).all():
        raise UserError(f"{label}: the sound is damaged: it holds samples that are no numbers")
    return resample(waveform, rate, config.sample_rate if sample_rate is None else sample_rate)


def _check_riff_size(source: AudioSource, label: str) -> None:
    """Raises UserError for a WAV file that was cut off: FFmpeg takes what is there without a word."""
    if isinstance(source, bytes):
        head, size = source[:8], len(source)
    else:
        with open(source, "rb") as file:
            head, size = file.read(8), Path(source).stat().st_size
    if len(head) < 8 or head[:4] != b"RIFF":
        return
    promised = struct.unpack("<I", head[4:])[0]
    # Some programs do not count the last byte, which pads an odd size.
    if promised not in UNKNOWN_RIFF_SIZES and promised + 8 > size + 1:
        raise UserError(f"{label}: the file is cut off: it has {size} of {promised + 8} bytes")


def _decode(container: av.container.InputContainer, config: AudioConfig, label: str) -> tuple[np.ndarray, int]:
    """(n,) float32 of one channel, and its rate."""
    if not container.streams.audio:
        raise UserError(f"{label}: has no sound")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise UserError(f"{label}: its sound is in a coding FFmpeg does not know; convert it to WAV")
    rate, pieces, samples = stream.codec_context.sample_rate, [], 0
    for frame in container.decode(stream):
        if frame.sample_rate != rate:
            raise UserError(f"{label}: the rate changes from {rate} to {frame.sample_rate} Hz inside; convert it")
        pieces.append(_one_channel(frame, config.channel))
        samples += len(pieces[-1])
        if samples > config.max_seconds * rate:
            raise UserError(
                f"{label}: lasts more than {config.max_seconds:g} s; cut it, or raise max_seconds of the audio config"
            )
    if not samples:
        raise UserError(f"{label}: holds no samples (0 s of sound)")
    if stream.duration is not None and container.format.name == "flac":
        promised = float(stream.duration * stream.time_base)
        if samples / rate < promised - CUT_OFF_SECONDS:
            raise UserError(
                f"{label}: the sound is damaged or cut off: {samples / rate:.2f} s of {promised:.2f} s are there"
            )
    return np.concatenate(pieces), rate


def _one_channel(frame: av.AudioFrame, channel: str) -> np.ndarray:
    """A decoded frame as (n,) float32."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - 128.0) / 128.0
    elif np.issubdtype(values.dtype, np.integer):
        values = values.astype(np.float64) / -float(np.iinfo(values.dtype).min)
    picked = values[0] if channel == "first" else values.mean(axis=0)
    return picked.astype(np.float32)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


# ---- features -------------------------------------------------------------------------------------------------------


def waveform_features(waveform: np.ndarray, config: AudioConfig = AudioConfig()) -> np.ndarray:  # noqa: B008
    """(n,) float32 at the config's rate -> (f m) float32 log-mel features.

    Dither, where the filter bank asks for it, is drawn from a seed that the samples decide: the same clip always has
    the same features.

    Raises:
      UserError: shorter than one frame.
    """
    noise = None
    if config.filter_bank.dither:
        frames = num_frames(len(waveform), config.filter_bank)
        rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(waveform).tobytes()))
        noise = rng.standard_normal((frames, config.filter_bank.window_size), np.float32)
    return log_mel(waveform, config.filter_bank, noise)


def clip_features(source: AudioSource, context: AudioContext, *, name: str | None = None) -> Clip:
    """A sound file as features and number of tokens.

    Args:
      source: a path, or the bytes of a file.
      context: the features, and how many tokens they give.
      name: what to call the file in error messages; default the path.

    Raises:
      UserError: see `read_audio`; or too short to give a single token.
    """
    waveform = read_audio(source, context.config, name=name)
    frames = num_frames(len(waveform), context.config.filter_bank)
    tokens = context.num_tokens(frames)
    if tokens <= context.num_tokens(0):
        raise UserError(
            f"{source_name(source, name)}: lasts {len(waveform) / context.config.sample_rate:.3f} s, too short to be "
            "heard; at least 0.1 s are needed"
        )
    return Clip(waveform_features(waveform, context.config), tokens)


def pad_clips(features: list[np.ndarray] | tuple[np.ndarray, ...], frames: int, bins: int) -> np.ndarray:
    """Features (f_i m) of several clips -> (a frames m) float32, zeros behind each one's end."""
    out = np.zeros((len(features), frames, bins), np.float32)
    for row, clip in zip(out, features, strict=True):
        row[: len(clip)] = clip
    return out
