"""Attention masks. One convention everywhere: bool, True = the query may attend to the key. b batch, s queries, t keys.

causal_mask, s = t = 3        segment_mask of [1 1 2 0]
1 0 0                         1 1 0 0
1 1 0                         1 1 0 0
1 1 1                         0 0 1 0
                              0 0 0 0     0 = padding: sees nothing and is seen by nothing
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_mask(query_slots: jax.Array, key_slots: jax.Array) -> jax.Array:
    """A query sees the keys written at its own slot or before.

    Slots are places in the row (or in the cache), not rotary positions: those may repeat or restart inside a row.

    Args:
      query_slots: (s,) int.
      key_slots: (t,) int.

    Returns:
      (1 1 s t) bool.
    """
    return (key_slots[None, :] <= query_slots[:, None])[None, None]


def segment_mask(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Query and key belong to one segment, and not to padding (segment 0).

    Args:
      query_segments: (b s) int.
      key_segments: (b t) int.

    Returns:
      (b 1 s t) bool.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (query_segments > 0)[:, :, None])[:, None]


def make_attention_mask(
    query_segments: jax.Array, key_segments: jax.Array, *, first_query_slot: jax.Array | int = 0
) -> jax.Array:
    """The decoder's mask: causal within a segment.

    Args:
      query_segments: (b s) int, 0 = padding.
      key_segments: (b t) int, 0 = padding or an empty cache slot.
      first_query_slot: slot of query 0 among the keys; 0 without a cache.

    Returns:
      (b 1 s t) bool.
    """
    query_slots = first_query_slot + jnp.arange(query_segments.shape[1])
    key_slots = jnp.arange(key_segments.shape[1])
    return causal_mask(query_slots, key_slots) & segment_mask(query_segments, key_segments)
