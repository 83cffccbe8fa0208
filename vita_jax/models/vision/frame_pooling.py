"""Optional pooling of video frame tokens: few frames keep many tokens, the others few (`vita/model/vita_arch.py`).

How many tokens each frame keeps is a plan made on the host from static numbers; the pooling itself is a resize of the
token grid. A video is a run of equal positive values in the frame mask; 0 marks images, which are never pooled.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.ops.resize import bilinear_matrix, resize_grid

# Every `period`-th frame is slow and keeps more tokens.
PERIODIC_VARIANTS = {"slow_fast_pooling": (4, 144, 49), "slow_fast_pooling3": (16, 144, 36)}

# (budget in tokens, sizes tried for all frames, frames up to which that holds, [(frames up to, slow, fast), ...])
BUDGET_VARIANTS = {
    "slow_fast_pooling0": (5200, (256, 225, 196, 169), 30, ((45, 169, 81), (64, 169, 49))),
    "slow_fast_pooling1": (4096, (256, 225, 196, 169, 144), 28, ((40, 144, 81), (64, 144, 49))),
}
DEFAULT_VARIANT = "slow_fast_pooling"


def slow_fast_plan(num_frames: int, variant: str = DEFAULT_VARIANT) -> list[int]:
    """Tokens kept by each frame of a video of 256-token frames.

    Raises:
      UserError: an unknown variant, or more frames than a budget variant has a plan for.
    """
    if variant in PERIODIC_VARIANTS:
        period, slow, fast = PERIODIC_VARIANTS[variant]
        return [fast if i % period else slow for i in range(num_frames)]
    if variant not in BUDGET_VARIANTS:
        known = ", ".join([*PERIODIC_VARIANTS, *BUDGET_VARIANTS])
        raise UserError(f"frame pooling {variant!r} is unknown; use one of {known}")
    budget, uniform_sizes, uniform_up_to, mixtures = BUDGET_VARIANTS[variant]
    if num_frames <= uniform_up_to:
        size = next(size for size in uniform_sizes if size * num_frames <= budget)
        return [size] * num_frames
    for up_to, slow, fast in mixtures:
        if num_frames <= up_to:
            num_slow = int((budget - fast * num_frames) / (slow - fast))
            # The end point lies one past the last frame, so one slow slot is lost; the original does the same.
            at = set(np.linspace(0, num_frames, num_slow, dtype=int).tolist())
            return [slow if i in at else fast for i in range(num_frames)]
    raise UserError(f"{variant} has no plan for {num_frames} frames, only for up to {mixtures[-1][0]}")


def frame_lengths(frame_mask: Sequence[int], tokens: int = 256, variant: str = DEFAULT_VARIANT) -> list[int]:
    """Tokens every frame of a batch keeps.

    Args:
      frame_mask: per frame 0 for an image, or the positive id of its video; neighbours with one id are one video.
      tokens: tokens of a frame before pooling.
      variant: see `slow_fast_plan`.
    """
    lengths: list[int] = []
    start = 0
    while start < len(frame_mask):
        stop = start
        while stop < len(frame_mask) and frame_mask[stop] == frame_mask[start]:
            stop += 1
        num_frames = stop - start
        lengths += slow_fast_plan(num_frames, variant) if frame_mask[start] > 0 else [tokens] * num_frames
        start = stop
    return lengths


def pool_tokens(x: jax.Array, side: int) -> jax.Array:
    """Resizes a square grid of tokens bilinearly.

    x: (... p d), p a square -> (... side*side d).

    Raises:
      UserError: p is no square.
    """
    old_side = int(x.shape[-2] ** 0.5 + 0.5)
    if old_side**2 != x.shape[-2]:
        raise UserError(f"{x.shape[-2]} tokens are not a square grid, so they cannot be pooled")
    grid = rearrange(x, "... (r q) d -> ... r q d", r=old_side)
    return rearrange(resize_grid(grid, (side, side), bilinear_matrix), "... r q d -> ... (r q) d")


def pool_frames(frames: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """Pools each frame to its length and joins them.

    Args:
      frames: (t p d).
      lengths: tokens kept by each frame, all squares; a frame that keeps p is left as it is.

    Returns:
      (sum(lengths) d), frames in order.

    Raises:
      UserError: a length that is no square.
    """
    pooled = []
    for frame, length in zip(frames, lengths, strict=True):
        side = int(length**0.5 + 0.5)
        if side**2 != length:
            raise UserError(f"a frame cannot keep {length} tokens: not a square")
        pooled.append(frame if length == frame.shape[0] else pool_tokens(frame, side))
    return jnp.concatenate(pooled)
