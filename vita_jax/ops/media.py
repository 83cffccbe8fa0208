"""Which picture a piece of text sees in an interleaved row, and attention to it (Flamingo, arXiv 2204.14198, 3.1.3).

Pictures of a row are numbered from 1 in the order of their tags; 0 is none. The tags of the row `a # b # c` (# a tag)
give, for a, #, b, #, c:

    the picture before     0 1 1 2 2        what is read in order, and what generation needs
    the picture after      1 1 2 2 0        half of the documents in the paper's training

Axes: b rows, s positions, t pictures, m tokens of a picture, n heads, h head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.ops.attention import dot_product_attention

# What a position gets whose picture is not there, and that the original does not set to zero; see `media_attention`.
WITHOUT_MEDIA = ("zero", "uniform")


def media_times(
    media_locations: jax.Array, segment_ids: jax.Array | None = None, *, attend_next: jax.Array | bool = False
) -> jax.Array:
    """The number of the picture that every position belongs to.

    A tag belongs to its own picture. Numbers count through the row, over segments too, so that the pictures of packed
    documents are one list; but a document never sees those of another.

    Args:
      media_locations: (b s) bool, True at tags.
      segment_ids: (b s) int, 0 = padding, which belongs to no picture; None = one segment that ends with the row.
      attend_next: bool, broadcastable to (b s): text belongs to the picture after it, and to none after the last.

    Returns:
      (b s) int32.
    """
    is_tag = media_locations.astype(jnp.int32)
    count = jnp.cumsum(is_tag, axis=1)
    if segment_ids is None:
        first, last, real = jnp.zeros_like(count), count[:, -1:], True
    else:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
        ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
        # Counts only grow along the row, so the latest start has the largest and the nearest end the smallest.
        first = jax.lax.cummax(jnp.where(starts, count - is_tag, 0), axis=1)
        last = jax.lax.cummin(jnp.where(ends, count, media_locations.shape[1]), axis=1, reverse=True)
        real = segment_ids > 0
    before = jnp.where(count > first, count, 0)
    after = jnp.where(is_tag > 0, count, jnp.where(count < last, count + 1, 0))
    return jnp.where(real, jnp.where(attend_next, after, before), 0)


def media_mask(times: jax.Array, num_media: int, *, all_previous: bool = False) -> jax.Array:
    """Which pictures a position may see: (b s) int times -> (b s t) bool.

    all_previous: its own and those before it, instead of its own only.
    """
    numbers = jnp.arange(1, num_media + 1)
    times = times[..., None]
    return times >= numbers if all_previous else times == numbers


def media_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    times: jax.Array | None,
    *,
    all_previous: bool = False,
    without_media: str = "zero",
) -> jax.Array:
    """Attention of text to the tokens of its picture.

    Args:
      q: (b s n h).
      k, v: (b t m n h); t may be 0.
      times: (b s) int, see `media_times`; None lets everything see everything.
      all_previous: see `media_mask`.
      without_media: what a position gets that may see no picture. "zero": nothing. "uniform", as in open_flamingo: the
        mean over all tokens of all pictures, if it is there for more tags than pictures, or under `all_previous`.

    Returns:
      (b s n h).

    Raises:
      UserError: unknown `without_media`.
    """
    if without_media not in WITHOUT_MEDIA:
        raise UserError(f"without_media {without_media!r} is unknown; use one of {', '.join(WITHOUT_MEDIA)}")
    num_media, tokens = k.shape[1:3]
    if num_media == 0:
        return jnp.zeros_like(q)
    mask = None
    if times is not None:
        seen = media_mask(times, num_media, all_previous=all_previous)
        if without_media == "uniform":
            even = ~jnp.any(seen, axis=-1)
            if not all_previous:
                even = even & (times > 0)
            # Equal scores give equal weights, so a query of zeros that sees everything takes the mean.
            q, seen = jnp.where(even[..., None, None], 0, q), seen | even[..., None]
        mask = jnp.repeat(seen, tokens, axis=-1)[:, None]
    k, v = (rearrange(x, "b t m n h -> b (t m) n h") for x in (k, v))
    return dot_product_attention(q, k, v, mask=mask)
