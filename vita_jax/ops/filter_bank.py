"""Waveform -> log-mel filter bank, as Kaldi computes it, and what goes with it: resampling, streaming, lengths.

The features of VITA's speech encoder (`vita/model/multimodal_encoder/whale/init_model.py`): 80 log energies of a mel
filter bank over 25 ms frames every 10 ms, of 16 kHz samples scaled to the range of int16. Every function here runs on
numpy arrays (the loader, on the host) and on jax arrays (streaming, on the device), by the type of its input; there is
one implementation. float64 input is computed in float64.

Axes: n samples, f frames of 10 ms, w samples of a window, m mel bins, e encoder frames of 40 ms.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vita_jax.errors import UserError

Array = np.ndarray | jax.Array
Lengths = Any  # an int, or an array of ints

INT16_SCALE = 32768.0  # waveforms are in -1..1; Kaldi's features are defined on int16 values
ENERGY_FLOOR = float(np.finfo(np.float32).eps)
POVEY_POWER = np.float32(0.85)
# Defaults of the resampler: zero crossings of the sinc on each side, and the cut-off as a share of the lower Nyquist.
LOWPASS_FILTER_WIDTH = 6
ROLLOFF = 0.99


@dataclass(frozen=True)
class FilterBankConfig:
    """The released values; all tensors of the released encoder expect them.

    Attributes:
      dither: standard deviation, in int16 units, of the noise added to every frame; needs `noise` when not 0.
      low_freq, high_freq: edges of the filter bank in Hz.
      preemphasis: factor of the previous sample that is subtracted.
    """

    sample_rate: int = 16_000
    num_mel_bins: int = 80
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    dither: float = 0.0
    preemphasis: float = 0.97
    low_freq: float = 20.0
    high_freq: float = 8000.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low_freq < self.high_freq <= self.sample_rate / 2:
            raise UserError(
                f"filter bank: {self.low_freq}..{self.high_freq} Hz is not a range within 0..{self.sample_rate / 2}"
            )

    @property
    def window_size(self) -> int:
        """w, samples of a frame."""
        return int(self.sample_rate * self.frame_length_ms * 0.001)

    @property
    def window_shift(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.frame_shift_ms * 0.001)

    @property
    def fft_size(self) -> int:
        """The window's size rounded up to a power of two."""
        return 1 << (self.window_size - 1).bit_length()


RELEASED = FilterBankConfig()


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------


def num_frames(samples: Lengths, config: FilterBankConfig = RELEASED) -> Lengths:
    """Frames of a waveform of that many samples: only whole windows count. int -> int, array -> array."""
    # A product with the condition, so that ints, numpy and jax arrays all work.
    return (1 + (samples - config.window_size) // config.window_shift) * (samples >= config.window_size)


def encoder_length(frames: Lengths) -> Lengths:
    """Encoder frames (40 ms) whose whole receptive field is within that many frames (10 ms)."""
    return (frames - 3) // 4 * (frames > 3)


def token_length(encoder_frames: Lengths) -> Lengths:
    """Tokens that the adapter makes of that many encoder frames: half, rounded up."""
    return (encoder_frames + 1) // 2


def audio_tokens(frames: Lengths) -> Lengths:
    """Tokens for the language model, 80 ms each, of that many frames (10 ms)."""
    return token_length(encoder_length(frames))


# ---------------------------------------------------------------------------------------------------------------------
# Filter bank
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def povey_window(size: int) -> np.ndarray:
    """(w,) float32: a Hann window to the power 0.85.

    Rounded after every step, as torch does, since the loudest frequencies carry its last bits into the faintest ones.
    """
    step = np.float32(2.0 * np.pi / (size - 1))
    cosine = np.cos((np.arange(size, dtype=np.float32) * step).astype(np.float64)).astype(np.float32)
    hann = np.float32(0.5) - np.float32(0.5) * cosine
    return (hann.astype(np.float64) ** float(POVEY_POWER)).astype(np.float32)


def hz_to_mel(hz: Any) -> Any:
    """1127 ln(1 + hz / 700)."""
    return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)


@functools.lru_cache
def mel_filters(config: FilterBankConfig = RELEASED) -> np.ndarray:
    """Triangles of equal width on the mel scale, without area normalisation: (m fft_size/2+1) float64.

    The last column, the Nyquist frequency, is zero.
    """
    low, high = hz_to_mel(config.low_freq), hz_to_mel(config.high_freq)
    width = (high - low) / (config.num_mel_bins + 1)
    left = low + width * np.arange(config.num_mel_bins)[:, None]
    bins = config.fft_size // 2
    mel = hz_to_mel(config.sample_rate / config.fft_size * np.arange(bins))[None]
    triangles = np.maximum(0.0, np.minimum(mel - left, left + 2 * width - mel) / width)
    return np.pad(triangles, ((0, 0), (0, 1)))


def windowed_frames(waveform: Array, config: FilterBankConfig = RELEASED, noise: Array | None = None) -> Array:
    """Frames ready for the Fourier transform: without their mean, pre-emphasised, windowed, zero-padded.

    Args:
      waveform: (... n) float in -1..1, at `config.sample_rate`.
      config: the filter bank.
      noise: (... f w) standard normal, wanted exactly when `config.dither` is not 0. Overlapping frames get
        different noise.

    Returns:
      (... f fft_size) in the dtype of `waveform`.

    Raises:
      UserError: not a float waveform, shorter than one frame, or `noise` and `dither` do not go together.
    """
    xp = _namespace(waveform)
    samples = waveform.shape[-1]
    if not xp.issubdtype(waveform.dtype, xp.floating):
        raise UserError(f"waveform has dtype {waveform.dtype}; give float samples in -1..1 (int16 divided by 32768)")
    if samples < config.window_size:
        raise UserError(f"waveform has {samples} samples, but a frame needs {config.window_size}; give a longer one")
    if (noise is None) != (config.dither == 0.0):
        raise UserError(f"dither is {config.dither}: give `noise` exactly when it is not 0")
    frames = _cut(waveform, num_frames(samples, config), config.window_size, config.window_shift) * INT16_SCALE
    if noise is not None:
        frames = frames + config.dither * noise
    frames = frames - xp.mean(frames, axis=-1, keepdims=True)
    previous = xp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = (frames - config.preemphasis * previous) * povey_window(config.window_size).astype(frames.dtype)
    padding = [(0, 0)] * (frames.ndim - 1) + [(0, config.fft_size - config.window_size)]
    return xp.pad(frames, padding)


def power_spectrum(frames: Array) -> Array:
    """(... fft_size) -> (... fft_size/2+1), squared magnitudes of the Fourier transform."""
    spectrum = _namespace(frames).fft.rfft(frames, axis=-1)
    return spectrum.real**2 + spectrum.imag**2


def log_mel(waveform: Array, config: FilterBankConfig = RELEASED, noise: Array | None = None) -> Array:
    """The features: logarithms of mel filter bank energies.

    Args:
      waveform: (... n) float in -1..1, at `config.sample_rate` (see `resample`), n at least one window. float32 or
        float64, never less: near-silent frames lose their digits.
      config: the filter bank.
      noise: (... f w) standard normal, see `windowed_frames`.

    Returns:
      (... f m), f = `num_frames(n)`, in the dtype of `waveform`; not normalised. Silence gives ln of 2**-23, -15.94.

    Raises:
      UserError: as `windowed_frames`.
    """
    power = power_spectrum(windowed_frames(waveform, config, noise))
    filters = mel_filters(config).astype(power.dtype).T
    xp = _namespace(waveform)
    energies = power @ filters if xp is np else jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
    return xp.log(xp.maximum(energies, ENERGY_FLOOR))


def _namespace(array: Array) -> ModuleType:
    return jnp if isinstance(array, jax.Array) else np


def _cut(x: Array, count: int, size: int, shift: int) -> Array:
    """(... n) -> (... count size), pieces that start every `shift` samples."""
    return x[..., np.arange(count)[:, None] * shift + np.arange(size)]


# ---------------------------------------------------------------------------------------------------------------------
# Streaming
# ---------------------------------------------------------------------------------------------------------------------


@struct.dataclass
class FilterBankState:
    """What the next block of a stream needs from the past.

    Attributes:
      samples: (... window - shift) the last samples, of which the next frames are made too.
      frames: (... carried m) the last frames, which the convolutions of the encoder read again.
    """

    samples: Array
    frames: Array


def start_stream(
    config: FilterBankConfig = RELEASED, *, batch: tuple[int, ...] = (), carried_frames: int = 3
) -> FilterBankState:
    """The state before the first block: silence, and frames of zeros (as the original has it, not of silence)."""
    return FilterBankState(
        samples=jnp.zeros((*batch, config.window_size - config.window_shift), jnp.float32),
        frames=jnp.zeros((*batch, carried_frames, config.num_mel_bins), jnp.float32),
    )


def stream_block(
    state: FilterBankState, block: Array, config: FilterBankConfig = RELEASED
) -> tuple[FilterBankState, Array]:
    """Features of one more block (`processor` of Freeze-Omni's `bin/inference.py`).

    All blocks together give the features of [carried frames of zeros; log_mel of (window - shift) zero samples and the
    wave]; against `log_mel` of the wave alone the frames are shifted by window - shift samples (15 ms).

    Args:
      state: from `start_stream` or the previous call.
      block: (... n) float, n a multiple of the shift (2560 in the original, 160 ms); pad the last one with zeros.
      config: the filter bank, without dither.

    Returns:
      The next state, and a window of features (... carried+n/shift m), the carried frames first.

    Raises:
      UserError: n is no multiple of the shift.
    """
    if block.shape[-1] % config.window_shift or not block.shape[-1]:
        raise UserError(f"a block has {block.shape[-1]} samples; they must be a multiple of {config.window_shift}")
    xp = _namespace(block)
    samples = xp.concatenate([state.samples, block], axis=-1)
    window = xp.concatenate([state.frames, log_mel(samples, config)], axis=-2)
    kept_samples, kept_frames = state.samples.shape[-1], state.frames.shape[-2]
    return FilterBankState(
        samples=samples[..., samples.shape[-1] - kept_samples :],
        frames=window[..., window.shape[-2] - kept_frames :, :],
    ), window


def next_frames(
    held: np.ndarray, block: np.ndarray, config: FilterBankConfig = RELEASED
) -> tuple[np.ndarray, np.ndarray]:
    """Features of one more block of any length; all blocks together give `log_mel` of the wave, frame by frame, but for
    the last bits of a matrix product with another number of rows.

    Args:
      held: (h,) float32, the samples that are not used up; none before the first block.
      block: (n,) float32, n may be 0.
      config: the filter bank, without dither, whose noise would depend on the blocks.

    Returns:
      (f m) features, f may be 0, and the samples to be held, fewer than a window.

    Raises:
      UserError: a filter bank with dither.
    """
    if config.dither:
        raise UserError(f"a stream has no dither, but the filter bank's is {config.dither}; set it to 0")
    samples = np.concatenate([held, block]).astype(np.float32)
    frames = num_frames(len(samples), config)
    if not frames:
        return np.zeros((0, config.num_mel_bins), np.float32), samples
    return log_mel(samples, config), samples[frames * config.window_shift :]


# ---------------------------------------------------------------------------------------------------------------------
# Resampling
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def resample_kernel(
    orig: int, new: int, lowpass_filter_width: int = LOWPASS_FILTER_WIDTH, rolloff: float = ROLLOFF
) -> np.ndarray:
    """Hann-windowed sinc, one filter per output phase.

    Args:
      orig, new: rates, only their ratio matters; o and p are what is left of them after division by the common factor.
      lowpass_filter_width: zero crossings on each side.
      rolloff: cut-off frequency as a share of the lower Nyquist frequency.

    Returns:
      (p 2*half+o) float32, half = ceil(width * o / base), base = rolloff * min(o, p).
    """
    orig, new = orig // math.gcd(orig, new), new // math.gcd(orig, new)
    base = rolloff * min(orig, new)
    half = math.ceil(lowpass_filter_width * orig / base)
    # The phases are rounded to float32 because torchaudio does; the rest is float64.
    phase = (-np.arange(new, dtype=np.float32) / np.float32(new)).astype(np.float64)[:, None]
    time = (np.arange(-half, half + orig) / orig + phase) * base
    time = np.clip(time, -lowpass_filter_width, lowpass_filter_width)
    window = np.cos(time * np.pi / lowpass_filter_width / 2) ** 2
    return (np.sinc(time) * window * (base / orig)).astype(np.float32)


def resample(
    waveform: Array,
    orig: int,
    new: int = RELEASED.sample_rate,
    *,
    lowpass_filter_width: int = LOWPASS_FILTER_WIDTH,
    rolloff: float = ROLLOFF,
) -> Array:
    """Band-limited resampling (the defaults of torchaudio's `Resample`).

    Args:
      waveform: (... n) float at `orig` Hz.
      orig, new: rates in Hz.
      lowpass_filter_width, rolloff: see `resample_kernel`.

    Returns:
      (... ceil(n * new / orig)) at `new` Hz; the waveform itself where the rates are equal.

    Raises:
      UserError: a rate that is not positive.
    """
    if orig <= 0 or new <= 0:
        raise UserError(f"cannot resample from {orig} Hz to {new} Hz; rates must be positive")
    if orig == new:
        return waveform
    xp = _namespace(waveform)
    kernel = resample_kernel(orig, new, lowpass_filter_width, rolloff).astype(waveform.dtype)
    stride, samples = orig // math.gcd(orig, new), waveform.shape[-1]
    half = (kernel.shape[1] - stride) // 2
    padded = xp.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(half, half + stride)])
    pieces = _cut(padded, samples // stride + 1, kernel.shape[1], stride)
    phases = pieces @ kernel.T if xp is np else jnp.matmul(pieces, kernel.T, precision=jax.lax.Precision.HIGHEST)
    length = -(-new * samples // orig)
    return phases.reshape(*waveform.shape[:-1], -1)[..., :length]
