"""The decoder's key/value cache: an explicit, fixed-size pytree that goes in and comes out of every call.

One slot is written per position fed in, for all rows at once, from `end` on; what a slot holds is said by its segment
id (0 = nothing). Rows of different lengths simply leave empty slots behind, which no query attends to. Fixed size and
one shared write index mean one compiled step serves a whole conversation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """State of a batch of running conversations.

    Attributes:
      k, v: (l b t k h) keys (already rotated) and values, `t` slots.
      segment_ids: (b t) int32, which segment a slot belongs to, 0 = empty or padding.
      end: () int32, the next slot to be written. The caller keeps `end + new <= t`.
      next_position: (b,) int32, rotary position of the token that follows each row.
      segment: (b,) int32, the segment that each row is in; 0 for a row that has not started.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    end: jax.Array
    next_position: jax.Array
    segment: jax.Array

    @property
    def num_slots(self) -> int:
        """t."""
        return self.k.shape[2]


def empty_cache(
    *, num_layers: int, num_kv_heads: int, head_dim: int, batch: int, num_slots: int, dtype: jnp.dtype = jnp.float32
) -> KVCache:
    """A cache with nothing in it.

    Returns:
      KVCache with k, v of shape (num_layers batch num_slots num_kv_heads head_dim).
    """
    shape = (num_layers, batch, num_slots, num_kv_heads, head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, num_slots), jnp.int32),
        end=jnp.zeros((), jnp.int32),
        next_position=jnp.zeros((batch,), jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
    )


def mark_written(cache: KVCache, segment_ids: jax.Array) -> jax.Array:
    """Segment ids of the slots once a block starting at `end` is in.

    Args:
      segment_ids: (b s) of the block, 0 = padding.

    Returns:
      (b t) int32.
    """
    return jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids.astype(jnp.int32), (0, cache.end))


def write_layer(stack: jax.Array, block: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """Puts a block of keys or values into one layer of the stack.

    Args:
      stack: (l b t k h).
      block: (b s k h).
      layer, start: () int32, the layer and the first slot.

    Returns:
      (l b t k h), updated in place when the caller no longer needs the old one.
    """
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_update_slice(stack, block[None].astype(stack.dtype), (layer, zero, start, zero, zero))


def last_valid(segment_ids: jax.Array) -> jax.Array:
    """Index of the last real position of each row of (b s) segment ids, -1 for a row of padding; (b,) int32."""
    indices = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(segment_ids > 0, indices, -1), axis=1)


def advance(cache: KVCache, k: jax.Array, v: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> KVCache:
    """The cache after a block has been written.

    `end` moves past the longest row of the block only, so the padding that made the block a round size is overwritten
    next.

    Args:
      k, v: (l b t k h), already holding the block.
      segment_ids, positions: (b s) of the block.
    """
    last = last_valid(segment_ids)
    started = last >= 0
    index = jnp.maximum(last, 0)[:, None]
    position = jnp.take_along_axis(positions, index, axis=1)[:, 0]
    segment = jnp.take_along_axis(segment_ids, index, axis=1)[:, 0]
    return KVCache(
        k=k,
        v=v,
        segment_ids=mark_written(cache, segment_ids),
        end=cache.end + jnp.max(last) + 1,
        next_position=jnp.where(started, position.astype(jnp.int32) + 1, cache.next_position),
        segment=jnp.where(started, segment.astype(jnp.int32), cache.segment),
    )
