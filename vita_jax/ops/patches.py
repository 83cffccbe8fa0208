"""Images and sequences cut into the pieces that a kernel sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange


def cut_patches(pixel_values: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images into square patches; pixels beyond the last whole patch are left out.

    A patch projection is then one matmul. (As a convolution its backward pass is slow on XLA's CPU backend.)

    Args:
      pixel_values: (b height width c).

    Returns:
      (b rows cols patch_size patch_size c).
    """
    rows, cols = pixel_values.shape[1] // patch_size, pixel_values.shape[2] // patch_size
    whole = pixel_values[:, : rows * patch_size, : cols * patch_size]
    return rearrange(whole, "b (r y) (q x) c -> b r q y x c", y=patch_size, x=patch_size)


def overlapping_patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """The pictures that a convolution without padding sees; a Dense over the last three axes is then that convolution.

    Cut by strided slices: the backward pass of a strided convolution is slow on XLA's CPU backend.

    Args:
      x: (b height width c).
      size, stride: of the kernel, both axes alike.

    Returns:
      (b rows cols size size c), rows = (height - size) // stride + 1.
    """
    rows, cols = ((length - size) // stride + 1 for length in x.shape[1:3])
    taps = [
        x[:, dy : dy + stride * (rows - 1) + 1 : stride, dx : dx + stride * (cols - 1) + 1 : stride]
        for dy in range(size)
        for dx in range(size)
    ]
    return rearrange(taps, "(y x) b r q c -> b r q y x c", y=size)


def time_windows(x: jax.Array, size: int, *, stride: int = 1, left: int = 0, right: int = 0) -> jax.Array:
    """What a convolution over time sees; a Dense over the last two axes is then that convolution.

    Args:
      x: (b t c).
      size, stride: of the kernel.
      left, right: zeros put before and after the sequence.

    Returns:
      (b t' size c), t' = (t + left + right - size) // stride + 1.
    """
    x = jnp.pad(x, ((0, 0), (left, right), (0, 0)))
    length = (x.shape[1] - size) // stride + 1
    taps = [x[:, tap : tap + stride * (length - 1) + 1 : stride] for tap in range(size)]
    return jnp.stack(taps, axis=2)
