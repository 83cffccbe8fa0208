"""Images as grids of patches."""

from __future__ import annotations

import jax
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
