"""Short-time spectra of waves, and mel bands on them. b batch, n samples, t frames, f frequencies, m bands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError

MAGNITUDE_FLOOR = 1e-9  # under the root, so that its gradient stays finite
MEL_FLOOR = 1e-5

# Slaney's mel scale: linear below 1 kHz, logarithmic above.
LINEAR_HZ_PER_MEL = 200.0 / 3
BREAK_HZ = 1000.0
LOG_STEP = np.log(6.4) / 27


def frames(wave: jax.Array, size: int, hop: int) -> jax.Array:
    """Overlapping frames: (b n) -> (b t size), t = (n - size) // hop + 1.

    Raises:
      UserError: fewer samples than a frame.
    """
    count = (wave.shape[1] - size) // hop + 1
    if count < 1:
        raise UserError(f"{wave.shape[1]} samples are fewer than a frame of {size}; give longer waves")
    # Frames as shifted views of hop-sized blocks: unlike a gather, its backward pass is a few additions.
    shifts = -(-size // hop)
    span = (count + shifts - 1) * hop
    blocks = jnp.pad(wave, ((0, 0), (0, max(0, span - wave.shape[1]))))[:, :span].reshape(wave.shape[0], -1, hop)
    return jnp.concatenate([blocks[:, i : i + count] for i in range(shifts)], axis=-1)[..., :size]


def hann_window(size: int) -> np.ndarray:
    """Periodic Hann window, (size,) float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def spectrum(wave: jax.Array, size: int, hop: int) -> jax.Array:
    """Complex spectrum with a Hann window and no centring: (b n) -> (b t f), f = size // 2 + 1."""
    return jnp.fft.rfft(frames(wave.astype(jnp.float32), size, hop) * hann_window(size), axis=-1)


def log_mel(wave: jax.Array, size: int, hop: int, num_mels: int, sampling_rate: int) -> jax.Array:
    """Logarithm of mel bands of the magnitude, edges reflected: (b n) -> (b t m), t = n // hop for a multiple."""
    edge = (size - hop) // 2
    bins = spectrum(jnp.pad(wave, ((0, 0), (edge, edge)), mode="reflect"), size, hop)
    magnitude = jnp.sqrt(jnp.square(bins.real) + jnp.square(bins.imag) + MAGNITUDE_FLOOR)
    return jnp.log(jnp.maximum(magnitude @ slaney_mel_bands(size, num_mels, sampling_rate), MEL_FLOOR))


def slaney_mel_bands(size: int, num_mels: int, sampling_rate: int) -> np.ndarray:
    """Triangles of equal area from 0 Hz to half the rate, on Slaney's scale: (f m) float32."""
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(sampling_rate / 2), num_mels + 2))
    bins = np.linspace(0.0, sampling_rate / 2, size // 2 + 1)
    rising = (bins[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * 2.0 / (edges[2:] - edges[:-2])).astype(np.float32)


def _hz_to_mel(hz: float) -> float:
    return hz / LINEAR_HZ_PER_MEL if hz < BREAK_HZ else BREAK_HZ / LINEAR_HZ_PER_MEL + np.log(hz / BREAK_HZ) / LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    break_mel = BREAK_HZ / LINEAR_HZ_PER_MEL
    return np.where(mel < break_mel, mel * LINEAR_HZ_PER_MEL, BREAK_HZ * np.exp(LOG_STEP * (mel - break_mel)))
