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
      query_slots: (s,) int, or (b s) where every row has its own.
      key_slots: (t,) int.

    Returns:
      (1|b 1 s t) bool.
    """
    seen = key_slots <= query_slots[..., None]
    return seen.reshape(-1, 1, *seen.shape[-2:])


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
      first_query_slot: slot of query 0 among the keys, () or one for each row (b,); 0 without a cache.

    Returns:
      (b 1 s t) bool.
    """
    query_slots = jnp.asarray(first_query_slot)[..., None] + jnp.arange(query_segments.shape[1])
    key_slots = jnp.arange(key_segments.shape[1])
    return causal_mask(query_slots, key_slots) & segment_mask(query_segments, key_segments)


def padding_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Which positions are real: (b,) int lengths -> (b size) bool, position < length."""
    return jnp.arange(size) < lengths[:, None]


def chunk_mask(size: int, chunk_size: jax.Array | int, left_chunks: jax.Array | int) -> jax.Array:
    """A query sees its own whole chunk, and `left_chunks` chunks before it (`add_optional_chunk_mask` of VITA's whale).

    size 4, chunk_size 2, left_chunks 0    left_chunks 1, or negative (all)
    1 1 0 0                                1 1 0 0
    1 1 0 0                                1 1 0 0
    0 0 1 1                                1 1 1 1
    0 0 1 1                                1 1 1 1

    Args:
      size: s = t.
      chunk_size: positions per chunk, at least 1; may be traced.
      left_chunks: chunks to the left; negative for all; may be traced.

    Returns:
      (1 1 s t) bool.
    """
    chunk = jnp.arange(size) // chunk_size
    behind = chunk[:, None] - chunk[None, :]
    return ((behind >= 0) & ((left_chunks < 0) | (behind <= left_chunks)))[None, None]


def chunked_attention_mask(valid: jax.Array, chunk_size: jax.Array | int, left_chunks: jax.Array | int) -> jax.Array:
    """Real keys within the chunks that a query sees. Queries are not masked.

    Args:
      valid: (b t) bool, which positions are real.
      chunk_size: a Python int below 1 means full context; see `chunk_mask`.
      left_chunks: see `chunk_mask`.

    Returns:
      (b 1 1 t) bool with full context, else (b 1 s t).
    """
    keys = valid[:, None, None, :]
    if isinstance(chunk_size, int) and chunk_size < 1:
        return keys
    return keys & chunk_mask(valid.shape[1], chunk_size, left_chunks)


def random_chunk(key: jax.Array, size: int, *, largest: int = 25) -> tuple[jax.Array, jax.Array]:
    """One draw of chunk size and left context for dynamic-chunk training (WeNet, arXiv 2012.05481, section 3).

    c is uniform in 1 .. size-1; above size // 2 the context is full, else the chunk is c mod `largest` + 1 and the left
    context uniform in 0 .. (size-1) // chunk - 1.

    Args:
      key: random key.
      size: positions of the (padded) sequence.
      largest: largest chunk.

    Returns:
      chunk_size, left_chunks: () int32, for `chunk_mask`; full context is (size, -1).
    """
    chunk_key, left_key = jax.random.split(key)
    drawn = jax.random.randint(chunk_key, (), 1, max(size, 2))
    chunk = drawn % largest + 1
    # At least one choice: the original fails where a chunk longer than the sequence leaves none.
    left = jax.random.randint(left_key, (), 0, jnp.maximum((size - 1) // chunk, 1))
    full = drawn > size // 2
    return jnp.where(full, size, chunk), jnp.where(full, -1, left)
