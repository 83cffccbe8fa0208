"""Sinusoidal positions ("Attention is all you need", arXiv 1706.03762, section 3.5)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def sinusoidal_positions(positions: jax.Array, width: int) -> jax.Array:
    """sin and cos of `position * exp(-2i ln(10000) / width)`, interleaved.

    Args:
      positions: (...) int, no upper limit.
      width: d, even.

    Returns:
      (... d) float32: entry 2i is the sine, 2i+1 the cosine of frequency i.
    """
    frequencies = jnp.exp(jnp.arange(0, width, 2, dtype=jnp.float32) * (-math.log(10000.0) / width))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, width)
