"""The decoder's key/value cache: an explicit, fixed-size pytree that goes in and comes out of every call.

One slot is written per position fed in, from `end` on; what a slot holds is said by its segment id (0 = nothing). There
are two ways to write, told apart by the shape of `end`:

    end ()    all rows write at one place. Rows of different lengths leave empty slots behind, which no query attends
              to. For a batch that starts and ends together.
    end (b,)  every row writes at its own place, so slot i of a row holds its i-th position and rows can be filled,
              cut and given away by themselves (`take_row`, `put_row`, `cut_row`). For conversations that come and go.

Fixed size and write indices that are data mean that one compiled step serves a whole conversation.
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
      end: () or (b,) int32, the next slot to be written, of all rows or of each. The caller keeps `end + new <= t`;
        with an `end` per row padding may go beyond, and is dropped there.
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


def with_row_ends(cache: KVCache) -> KVCache:
    """An empty cache whose rows write at places of their own."""
    return cache.replace(end=jnp.zeros_like(cache.next_position))


def _places(start: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Rows (b 1) and slots (b s) of a block that starts at (b,) slots."""
    return jnp.arange(shape[0])[:, None], start[:, None] + jnp.arange(shape[1])


def mark_written(cache: KVCache, segment_ids: jax.Array) -> jax.Array:
    """Segment ids of the slots once a block starting at `end` is in.

    Args:
      segment_ids: (b s) of the block, 0 = padding.

    Returns:
      (b t) int32.
    """
    if cache.end.ndim:
        rows, slots = _places(cache.end, segment_ids.shape)
        return cache.segment_ids.at[rows, slots].set(segment_ids.astype(jnp.int32), mode="drop")
    return jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids.astype(jnp.int32), (0, cache.end))


def write_layer(stack: jax.Array, block: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """Puts a block of keys or values into one layer of the stack.

    Args:
      stack: (l b t k h).
      block: (b s k h).
      layer: () int32.
      start: () or (b,) int32, the first slot.

    Returns:
      (l b t k h), updated in place when the caller no longer needs the old one.
    """
    if start.ndim:
        rows, slots = _places(start, block.shape[:2])
        return stack.at[layer, rows, slots].set(block.astype(stack.dtype), mode="drop")
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_update_slice(stack, block[None].astype(stack.dtype), (layer, zero, start, zero, zero))


def last_valid(segment_ids: jax.Array) -> jax.Array:
    """Index of the last real position of each row of (b s) segment ids, -1 for a row of padding; (b,) int32."""
    indices = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(segment_ids > 0, indices, -1), axis=1)


def advance(cache: KVCache, k: jax.Array, v: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> KVCache:
    """The cache after a block has been written.

    `end` moves past the real positions of the block only, those of the longest row or of each, so the padding that made
    the block a round size is overwritten next.

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
        end=cache.end + (last if cache.end.ndim else jnp.max(last)) + 1,
        next_position=jnp.where(started, position.astype(jnp.int32) + 1, cache.next_position),
        segment=jnp.where(started, segment.astype(jnp.int32), cache.segment),
    )


def take_row(cache: KVCache, row: jax.Array) -> KVCache:
    """One row, () int32, of a cache with an `end` per row, as a cache with b = 1."""

    def take(x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)

    return KVCache(
        k=take(cache.k, 1),
        v=take(cache.v, 1),
        segment_ids=take(cache.segment_ids, 0),
        end=take(cache.end, 0),
        next_position=take(cache.next_position, 0),
        segment=take(cache.segment, 0),
    )


def put_row(cache: KVCache, row: jax.Array, one: KVCache) -> KVCache:
    """The cache with a row, () int32, replaced by what `take_row` gave of it, or of another one."""

    def put(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, row, axis)

    return KVCache(
        k=put(cache.k, one.k, 1),
        v=put(cache.v, one.v, 1),
        segment_ids=put(cache.segment_ids, one.segment_ids, 0),
        end=put(cache.end, one.end, 0),
        next_position=put(cache.next_position, one.next_position, 0),
        segment=put(cache.segment, one.segment, 0),
    )


def cut_row(cache: KVCache, row: jax.Array, length: jax.Array, next_position: jax.Array) -> KVCache:
    """The cache with only the first positions of a row, as if nothing had been fed after them.

    Args:
      row: () int32, of a cache with an `end` per row.
      length: () int32, positions that stay, at most those that are there; 0 empties the row.
      next_position: () int32, rotary position of the token that follows them.
    """
    kept = jnp.arange(cache.num_slots) < length
    return cache.replace(
        segment_ids=cache.segment_ids.at[row].set(jnp.where(kept, cache.segment_ids[row], 0)),
        end=cache.end.at[row].set(length),
        next_position=cache.next_position.at[row].set(next_position),
        segment=cache.segment.at[row].set(jnp.minimum(length, 1)),
    )
