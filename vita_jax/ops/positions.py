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


def relative_weights(weights: jax.Array, at: jax.Array) -> jax.Array:
    """Turns weights of the sinusoids of a distance into weights of the sinusoids of a key's own position.

    With the sums of angles, sin(i - j) = sin i cos j - cos i sin j and cos(i - j) = cos i cos j + sin i sin j, so

        sum(weights * sinusoids(i - j)) == sum(relative_weights(weights, sinusoids(i)) * sinusoids(j))

    and scores by distance need neither a table of distances nor a shift of the score matrix.

    Args:
      weights: (... d), of sines and cosines in turn.
      at: (... d) `sinusoidal_positions` of the queries, i.

    Returns:
      (... d).
    """
    of_sine, of_cosine = weights[..., 0::2], weights[..., 1::2]
    sine, cosine = at[..., 0::2], at[..., 1::2]
    by_sine = of_cosine * sine - of_sine * cosine
    by_cosine = of_sine * sine + of_cosine * cosine
    return jnp.stack([by_sine, by_cosine], axis=-1).reshape(by_sine.shape[:-1] + (weights.shape[-1],))
