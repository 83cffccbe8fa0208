"""The speech encoder's cache: an explicit, fixed-size pytree that goes in and comes out of every step of a stream.

A step encodes one chunk of c frames, which attend to themselves and to the last `left_chunks` chunks. With positions
"exact" a stream gives what the chunk-masked full pass gives. "lagging" is what Freeze-Omni's streaming code does
(`models/encoder`): once the left context is full, all positions are one chunk too early, and they start again from 0
near the end of its position table.

Axes: b streams, l layers, t cached frames (c * left_chunks), n heads, h head width, c frames per chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class EncoderCache:
    """State of b streams, which may have started at different times.

    Attributes:
      k, v: (l b t n h) keys and values of the last t frames, the newest last; what is not filled yet is masked.
      step: (b,) int32, chunks encoded so far. To restart a stream, set its step to 0.
    """

    k: jax.Array
    v: jax.Array
    step: jax.Array


def empty_cache(
    *, num_layers: int, num_heads: int, head_dim: int, batch: int, slots: int, dtype: jnp.dtype = jnp.float32
) -> EncoderCache:
    """The cache before the first chunk, t = slots."""
    shape = (num_layers, batch, slots, num_heads, head_dim)
    return EncoderCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def cached_frames(cache: EncoderCache, chunk: int) -> jax.Array:
    """(b,) int32, how many cached frames are filled."""
    return jnp.minimum(cache.step * chunk, cache.k.shape[2])


def cached_keys_mask(cache: EncoderCache, chunk: int) -> jax.Array:
    """Filled cache slots and the whole new chunk: (b 1 1 t+c) bool."""
    slots = cache.k.shape[2]
    return (jnp.arange(slots + chunk) >= slots - cached_frames(cache, chunk)[:, None])[:, None, None]


def key_positions(cache: EncoderCache, chunk: int, left_chunks: int, kind: str, table_length: int) -> jax.Array:
    """Positions of the cached frames and of the new chunk.

    Args:
      cache: before the step.
      chunk: c.
      left_chunks: of the mask.
      kind: "exact" or "lagging".
      table_length: of the original's position table, for "lagging".

    Returns:
      (b t+c) int32; 0 where a slot is not filled.
    """
    slots = cache.k.shape[2]
    filled = cached_frames(cache, chunk)
    if kind == "lagging":
        period = chunk * (table_length // chunk) - chunk * (left_chunks + 1)
        first = jnp.maximum((cache.step * chunk) % period - chunk * (left_chunks + 1), 0)
    else:
        first = cache.step * chunk - filled
    return jnp.maximum(first[:, None] + jnp.arange(slots + chunk) - (slots - filled)[:, None], 0)


def lagging_counter(steps: jax.Array | int, chunk: int, left_chunks: int, table_length: int) -> jax.Array | int:
    """The original's position counter after that many steps, which are at least 1: it restarts at the period."""
    period = chunk * (table_length // chunk) - chunk * (left_chunks + 1)
    return ((steps - 1) * chunk) % period + chunk


def advance(cache: EncoderCache, k: jax.Array, v: jax.Array) -> EncoderCache:
    """The cache after a step; k, v: (l b t+c n h) old and new keys and values, of which the last t stay."""
    start = k.shape[2] - cache.k.shape[2]
    return EncoderCache(
        k[:, :, start:].astype(cache.k.dtype), v[:, :, start:].astype(cache.v.dtype), step=cache.step + 1
    )
