"""The decoder's key/value cache: an explicit, fixed-size pytree that goes in and comes out of every call.

One slot is written per position fed in, from `end` on; what a slot holds is said by its segment id (0 = nothing). There
are two ways to write, told apart by the shape of `end`:

    end ()    all rows write at one place. Rows of different lengths leave empty slots behind, which no query attends
              to. For a batch that starts and ends together.
    end (b,)  every row writes at its own place, so slot i of a row holds its i-th position and rows can be filled,
              cut and given away by themselves (`take_row`, `put_row`, `cut_row`). For conversations that come and go.

Fixed size and write indices that are data mean that one compiled step serves a whole conversation.

Keys and values are floats, or int8 with a scale for every layer, row, slot and head (`Int8Stack`): h + 4 bytes in place
of 2 h in bfloat16 or 4 h in float32. A vector is rounded once, when its position is fed, whatever feeds it, so that the
block it comes in sees it as all later ones do.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.ops.int8 import from_int8, to_int8


@struct.dataclass
class Int8Stack:
    """Keys or values of all layers as integers: a vector is `values * scales`.

    Attributes:
      values: (l b t k h) int8.
      scales: (l b t k) float32.
    """

    values: jax.Array
    scales: jax.Array


Stack = jax.Array | Int8Stack


@struct.dataclass
class KVCache:
    """State of a batch of running conversations.

    Attributes:
      k, v: (l b t k h) keys (already rotated) and values, `t` slots, as floats or as an `Int8Stack`.
      segment_ids: (b t) int32, which segment a slot belongs to, 0 = empty or padding.
      end: () or (b,) int32, the next slot to be written, of all rows or of each. The caller keeps `end + new <= t`;
        with an `end` per row padding may go beyond, and is dropped there.
      next_position: (b,) int32, rotary position of the token that follows each row.
      segment: (b,) int32, the segment that each row is in; 0 for a row that has not started.
    """

    k: Stack
    v: Stack
    segment_ids: jax.Array
    end: jax.Array
    next_position: jax.Array
    segment: jax.Array

    @property
    def num_slots(self) -> int:
        """t."""
        return self.segment_ids.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of keys and values; also of a cache of `jax.ShapeDtypeStruct`."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.k, self.v)))


def empty_cache(
    *, num_layers: int, num_kv_heads: int, head_dim: int, batch: int, num_slots: int, dtype: jnp.dtype = jnp.float32
) -> KVCache:
    """A cache with nothing in it.

    Args:
      num_layers, num_kv_heads, head_dim, batch, num_slots: l, k, h, b, t.
      dtype: of keys and values; int8 keeps scales with them.

    Returns:
      KVCache with k, v of shape (num_layers batch num_slots num_kv_heads head_dim).
    """
    shape = (num_layers, batch, num_slots, num_kv_heads, head_dim)

    def stack() -> Stack:
        zeros = jnp.zeros(shape, dtype)
        return Int8Stack(zeros, jnp.zeros(shape[:-1], jnp.float32)) if zeros.dtype == jnp.int8 else zeros

    return KVCache(
        k=stack(),
        v=stack(),
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


def write_layer(stack: Stack, block: jax.Array, layer: jax.Array, start: jax.Array) -> Stack:
    """Puts a block of keys or values into one layer of the stack.

    Args:
      stack: (l b t k h).
      block: (b s k h).
      layer: () int32.
      start: () or (b,) int32, the first slot.

    Returns:
      (l b t k h), updated in place when the caller no longer needs the old one.
    """
    if isinstance(stack, Int8Stack):
        values, scales = to_int8(block)
        return Int8Stack(_write(stack.values, values, layer, start), _write(stack.scales, scales, layer, start))
    return _write(stack, block.astype(stack.dtype), layer, start)


def _write(stack: jax.Array, block: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """`write_layer` of one array: stack (l b t ...), block (b s ...)."""
    if start.ndim:
        rows, slots = _places(start, block.shape[:2])
        return stack.at[layer, rows, slots].set(block, mode="drop")
    zero = jnp.zeros((), jnp.int32)
    place = (layer, zero, start, *(zero for _ in stack.shape[3:]))
    return jax.lax.dynamic_update_slice(stack, block[None], place)


def read_layer(stack: Stack, layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One layer, () int32, of keys or values: (l b t k h) -> (b t k h) in `dtype`."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)
    return from_int8(one.values, one.scales, dtype) if isinstance(one, Int8Stack) else one.astype(dtype)


def last_valid(segment_ids: jax.Array) -> jax.Array:
    """Index of the last real position of each row of (b s) segment ids, -1 for a row of padding; (b,) int32."""
    indices = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(segment_ids > 0, indices, -1), axis=1)


def advance(cache: KVCache, k: Stack, v: Stack, segment_ids: jax.Array, positions: jax.Array) -> KVCache:
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

    def take(x: Stack, axis: int) -> Stack:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis), x)

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

    def put(x: Stack, new: Stack, axis: int) -> Stack:
        return jax.tree.map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, row, axis), x, new)

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
