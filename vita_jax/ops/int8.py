"""Integers of 8 bits in place of floats: products with kernels, and vectors of a cache.

What was a float x is kept as an integer q and a scale s that a vector of them shares, x = q s with an error of at most
s / 2. In products a scale multiplies the sum that its integers are in, not each of them: every float type that a model
computes in holds the integers exactly (bfloat16 has 8 bits of significand).

Scales are float32. How kernels become integers is in `vita_jax.models.int8`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The largest integer of a cache; -128 is not used, so that x and -x become q and -q.
LARGEST = 127


def scaled_product(
    x: jax.Array, kernel: jax.Array, scale: jax.Array, num_input_axes: int, dtype: jnp.dtype
) -> jax.Array:
    """`x @ (kernel * scale)`, with the kernel's integers as they are.

    Args:
      x: (... *inputs).
      kernel: (*inputs *outputs) int8.
      scale: (*outputs) float32.
      num_input_axes: how many axes are contracted.
      dtype: that the factors are multiplied in; sums and scales are float32.

    Returns:
      (... *outputs) in `dtype`. It differs from the product with the floats that the kernel was made of by at most
      sum |x| * scale / 2, besides rounding.
    """
    product = jnp.tensordot(x.astype(dtype), kernel.astype(dtype), num_input_axes, preferred_element_type=jnp.float32)
    return (product * scale).astype(dtype)


def to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of integers, each with the scale of its largest value.

    Args:
      x: (... h) of any float type.

    Returns:
      int8 (... h), and float32 (...): x is their product with an error of at most half a scale, max |x| / 254.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    # A vector of zeros, and one whose scale would be subnormal (and flushed to zero), is kept as zeros.
    scale = jnp.where(largest < LARGEST * jnp.finfo(jnp.float32).tiny, 1.0, largest / LARGEST)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def from_int8(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Inverse of `to_int8` up to its error: (... h) and (...) -> (... h) in `dtype`."""
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)
