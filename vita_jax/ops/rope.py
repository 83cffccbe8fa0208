"""Rotary position embedding, half-split form (RoFormer, arXiv 2104.09864; the Llama/Qwen2/Mixtral layout)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `position * theta ** (-2 i / head_dim)`.

    Args:
      positions: (b s) int; no upper limit.
      head_dim: h, even.
      theta: base of the wavelengths.

    Returns:
      cos, sin: (b s h/2) float32. bfloat16 angles would be wrong by whole turns at positions in the thousands.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inverse_wavelengths = 1.0 / (theta**exponents)
    angles = positions[..., None].astype(jnp.float32) * inverse_wavelengths
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + h/2]) of every head.

    Args:
      x: (b s n h).
      cos, sin: (b s h/2) float32.

    Returns:
      (b s n h) in the dtype of `x`; the rotation itself is done in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
