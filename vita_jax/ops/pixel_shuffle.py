"""Space-to-depth by two: four neighbouring patches become one token."""

from __future__ import annotations

import jax
from einops import rearrange

from vita_jax.errors import UserError


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """Merges 2x2 neighbours into channels; the row parity is the outer index, the column parity the inner one.

    This is InternVL's second ordering ("v2"), `vita/model/multimodal_encoder/internvit/internvit_encoder.py`.

    Args:
      x: (b rows cols c).

    Returns:
      (b rows/2 cols/2 4c).

    Raises:
      UserError: an odd number of rows or columns.
    """
    rows, cols = x.shape[1:3]
    if rows % 2 or cols % 2:
        raise UserError(f"the patch grid is {rows}x{cols}, but 2x2 patches are merged; choose an even grid")
    return rearrange(x, "b (r dr) (q dq) c -> b r q (dr dq c)", dr=2, dq=2)
