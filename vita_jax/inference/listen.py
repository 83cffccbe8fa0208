"""Sound to tokens of the language model while it is being spoken.

    samples -> frames as soon as they are whole -> encoder, chunk by chunk, with its cache -> adapter -> tokens

Weights that were trained with chunk masks are heard in chunks, so that only the last chunk remains at the end of
speech; the tokens are those of the chunk-masked pass over the whole sound, however it was cut into blocks. Weights
trained with full context, as the released ones are as far as is known, hear the whole sound at its end.

Axes: n samples at 16 kHz, f frames of 10 ms, m mel bins, c frames of 40 ms per chunk, p tokens of 80 ms, d width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.generate import bucket
from vita_jax.inference.timings import ENCODER, SOUND_ENCODED, SPEECH_ENDS, Timeline
from vita_jax.models.audio.tower import AudioStream, AudioTower, AudioTowerConfig, start_stream
from vita_jax.models.vita import VitaConfig
from vita_jax.ops.filter_bank import RELEASED, FilterBankConfig, encoder_length, next_frames

STREAMING = ("auto", "chunked", "full")
# Round numbers of frames of 10 ms for sounds that are heard whole; past the last one, multiples of it.
FRAME_BUCKETS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)


@dataclass(frozen=True)
class ListenOptions:
    """How sound is heard.

    Attributes:
      streaming: "chunked", "full" or "auto": chunked where the encoder was trained with chunk masks.
      chunk_size: encoder frames of 40 ms per chunk, even; where the encoder's config has a size, that one is taken.
      left_chunks: chunks before it that are seen; likewise.
    """

    streaming: str = "auto"
    chunk_size: int = 16
    left_chunks: int = 4

    def __post_init__(self) -> None:
        if self.streaming not in STREAMING:
            raise UserError(f"encoder.streaming {self.streaming!r} is unknown; use one of {', '.join(STREAMING)}")
        if self.chunk_size < 1 or self.left_chunks < 0:
            raise UserError(
                f"encoder chunk_size {self.chunk_size} must be at least 1 and left_chunks {self.left_chunks} at least 0"
            )


def listening_tower(config: VitaConfig, options: ListenOptions = ListenOptions()) -> AudioTowerConfig:
    """The audio tower as it listens: with chunks, or without any where the whole sound is heard at once.

    Raises:
      UserError: the model does not hear, or its tower cannot be heard in chunks.
    """
    if config.audio is None:
        raise UserError("this model does not hear: its config has no audio tower")
    encoder = config.audio.encoder
    chunked = options.streaming == "chunked"
    if options.streaming == "auto":
        chunked = encoder.dynamic_chunks or encoder.chunk_size > 0
    chunk, left = -1, -1
    if chunked:
        chunk = encoder.chunk_size if encoder.chunk_size > 0 else options.chunk_size
        left = encoder.left_chunks if encoder.chunk_size > 0 and encoder.left_chunks >= 0 else options.left_chunks
    encoder = dataclasses.replace(encoder, chunk_size=chunk, left_chunks=left, stream_positions="exact")
    tower = dataclasses.replace(config.audio, encoder=encoder)
    if chunked:
        start_stream(tower, 1)  # says what cannot be streamed
        if chunk % 2 and tower.adapter.kind == "subsampling":
            raise UserError(f"encoder chunk_size {chunk} must be even, because the adapter halves it")
    return tower


def describe_listening(config: VitaConfig, options: ListenOptions = ListenOptions()) -> str:
    """One line for the user: what `options.streaming` means for this model."""
    encoder = listening_tower(config, options).encoder
    if encoder.chunk_size < 1:
        return f"encoder.streaming={options.streaming}: full, the whole sound is encoded when it ends"
    return (
        f"encoder.streaming={options.streaming}: chunked, {encoder.chunk_size * 40} ms at a time with "
        f"{encoder.left_chunks} chunks before them"
    )


@functools.partial(jax.jit, static_argnames="tower", donate_argnames="state")
def _hear_chunk(
    tower: AudioTower, params: Any, window: jax.Array, state: AudioStream, real: jax.Array
) -> tuple[jax.Array, AudioStream]:
    return tower.apply({"params": params}, window, state, real, method="stream_step")


@functools.partial(jax.jit, static_argnames="tower")
def _hear_end(tower: AudioTower, params: Any, state: AudioStream) -> jax.Array:
    return tower.apply({"params": params}, state, method="stream_end")


@functools.partial(jax.jit, static_argnames="tower")
def hear_whole(tower: AudioTower, params: Any, features: jax.Array, lengths: jax.Array) -> jax.Array:
    """Clips at once: (n f m), (n,) int32 -> (n prompts+p d), arbitrary behind each one's tokens."""
    return tower.apply({"params": params}, features, lengths).embeds


def pad_frames(features: np.ndarray) -> np.ndarray:
    """(f m) -> (1 f' m), f' a round number."""
    return np.pad(features, ((0, bucket(len(features), FRAME_BUCKETS) - len(features)), (0, 0)))[None]


class Listener:
    """Hears one utterance; `begin` makes it ready for the next one."""

    def __init__(
        self,
        config: VitaConfig,
        params: Mapping[str, Any],
        options: ListenOptions = ListenOptions(),
        *,
        dtype: Any = np.float32,
        filter_bank: FilterBankConfig = RELEASED,
    ) -> None:
        """
        Args:
          config: of the model.
          params: nested parameters of the model; `audio` is used.
          options: see `ListenOptions`.
          dtype: of the computation.
          filter_bank: the features.

        What it does is measured in `timeline`, which a caller may replace.

        Raises:
          UserError: see `listening_tower`; or a filter bank with dither.
        """
        self.tower = listening_tower(config, options)
        self.description = describe_listening(config, options)
        self._module, self._filter_bank = AudioTower(self.tower, dtype), filter_bank
        self._params = jax.tree.map(jnp.asarray, params["audio"])
        next_frames(np.zeros((0,), np.float32), np.zeros((0,), np.float32), filter_bank)  # says what cannot be heard
        self.timeline = Timeline()
        self.begin()

    @property
    def chunked(self) -> bool:
        """Whether tokens come while the sound goes on."""
        return self.tower.encoder.chunk_size > 0

    def begin(self) -> None:
        """Forgets what has been heard."""
        self._samples = np.zeros((0,), np.float32)
        self._frames = np.zeros((0, self._filter_bank.num_mel_bins), np.float32)  # those from `_chunks` chunks on
        self._chunks, self._tokens = 0, 0  # encoded and given so far
        self._state = start_stream(self.tower, 1, self._module.dtype) if self.chunked else None

    @property
    def seconds(self) -> float:
        """How much of the sound has become frames."""
        frames = len(self._frames) + 4 * max(self.tower.encoder.chunk_size, 0) * self._chunks
        return frames * self._filter_bank.window_shift / self._filter_bank.sample_rate

    def hear(self, block: np.ndarray) -> np.ndarray:
        """One more block of sound: (n,) float32 in -1 .. 1, any n -> (p d), the tokens that are certain now."""
        with self.timeline.work(ENCODER, len(block) / self._filter_bank.sample_rate):
            frames, self._samples = next_frames(self._samples, block, self._filter_bank)
            self._frames = np.concatenate([self._frames, frames])
            pieces = []
            while self.chunked and len(self._frames) >= self._window:
                pieces.append(self._encode(self.tower.encoder.chunk_size))
        return self._given(pieces)

    def end(self) -> np.ndarray:
        """The sound is over: (p d), its last tokens; none where it was too short to be heard."""
        self.timeline.mark(SPEECH_ENDS)
        with self.timeline.work(ENCODER):
            tokens = self._rest() if self.chunked else self._whole()
        self.timeline.mark(SOUND_ENCODED)
        return tokens

    def _rest(self) -> np.ndarray:
        pieces = []
        real = encoder_length(len(self._frames))
        total = self.tower.adapter.num_tokens(self._chunks * self.tower.encoder.chunk_size + real)
        if real:
            pieces.append(self._encode(real))
        if total and self.tower.adapter.stream_delay:
            pieces.append(np.asarray(_hear_end(self._module, self._params, self._state)[0]))
        return self._given(pieces, total)

    @property
    def _window(self) -> int:
        """Frames that a chunk is made of."""
        return 4 * self.tower.encoder.chunk_size + 3

    def _encode(self, real: int) -> np.ndarray:
        window = self._frames[: self._window]
        window = np.pad(window, ((0, self._window - len(window)), (0, 0)))[None]
        real = np.full((1,), real, np.int32)
        tokens, self._state = _hear_chunk(self._module, self._params, window, self._state, real)
        self._frames = self._frames[self._window - 3 :]
        self._chunks += 1
        return np.asarray(tokens[0])

    def _given(self, pieces: list[np.ndarray], total: int | None = None) -> np.ndarray:
        """The tokens of a stream without its beginning that stands for nothing and, at its end, what is padding."""
        width, delay = self.tower.adapter.output_size, self.tower.adapter.stream_delay
        out = []
        for piece in pieces:
            start = max(delay - self._tokens, 0)
            if self._tokens == 0 and self.tower.num_prompt_tokens:
                out.append(np.asarray(self._params["prompt"]))
            self._tokens += len(piece)
            beyond = 0 if total is None else max(self._tokens - delay - total, 0)
            out.append(piece[start : max(len(piece) - beyond, start)])
        return np.concatenate(out) if out else np.zeros((0, width), np.float32)

    def _whole(self) -> np.ndarray:
        total = self.tower.num_tokens(len(self._frames))
        if total <= self.tower.num_tokens(0):
            return np.zeros((0, self.tower.adapter.output_size), np.float32)
        lengths = np.full((1,), len(self._frames), np.int32)
        return np.asarray(hear_whole(self._module, self._params, pad_frames(self._frames), lengths)[0, :total])
