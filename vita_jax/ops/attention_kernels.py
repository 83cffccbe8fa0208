"""Attention kernels of accelerators behind one signature; JAX's Pallas library has them, here is what they are given.

Axes: b batch, s queries, t keys, n query heads, k kv heads, h head width; q, k also count blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.gpu.attention import mha
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

# Name under which the result of attention can be kept for the backward pass (`jax.ad_checkpoint.checkpoint_name`).
ATTENTION_OUTPUT = "attention_output"

# Queries and keys of a tile of the TPU kernel: the largest whose scores fit well into vector memory. A shorter row is
# one tile; tiles are multiples of the 128 lanes.
TILE = 512
LANES = 128
# Queries and keys of a tile of the GPU kernel.
GPU_TILE = 128


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    first_slot: jax.Array | int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, a flash attention (arXiv 2307.08691) that passes over tiles without anything to see.

    The library builds the list of tiles from a mask known at compile time. Here it is made from the segment ids when
    the program runs: a packed row costs what its segments cost, and a part of a row can be anywhere in it. All rows are
    laid behind each other and done by one call; their tiles never meet, because the list has only tiles of one row.

    Args:
      q: (b s n h), the queries of slots `first_slot` and on.
      k, v: (b t k h), the keys of slots 0 to t - 1; they include the queries' own.
      q_segments, kv_segments: (b s), (b t) int32, 0 = padding.
      first_slot: () int32.
      interpret: runs on any platform, slowly.

    Returns:
      (b s n h), zeros at padding. With `jax.checkpoint`, keeping `ATTENTION_OUTPUT` keeps all that the backward pass
      needs of the forward kernel.
    """
    rows, length = q.shape[:2]
    q_tile, kv_tile = _tile(length), _tile(k.shape[1])
    out_segments = q_segments
    q = _pad_length(q * q.shape[-1] ** -0.5, q_tile)
    k, v = _pad_length(k, kv_tile), _pad_length(v, kv_tile)
    q_segments, kv_segments = _pad_length(q_segments, q_tile), _pad_length(kv_segments, kv_tile)
    num_keys = k.shape[1]
    slots = first_slot + jnp.arange(q.shape[1], dtype=jnp.int32)
    active = active_tiles(q_segments, kv_segments, slots, q_tile, kv_tile)
    # Slots of all rows count on, like the tiles.
    q_slots = (num_keys * jnp.arange(rows, dtype=jnp.int32)[:, None] + slots).reshape(-1)
    by_query, by_key = _tile_lists(active, q_slots)
    blocks = BlockSizes(
        block_q=q_tile,
        block_kv=kv_tile,
        block_q_dkv=q_tile,
        block_kv_dkv=kv_tile,
        block_q_dq=q_tile,
        block_kv_dq=kv_tile,
    )
    kernel = SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        mask_function=_is_past,
        interpret=interpret,
    )
    q, k, v = (rearrange(x, "b s n h -> n (b s) h") for x in (q, k, v))
    out = kernel(q, k, v, SegmentIds(q=q_segments.reshape(-1), kv=kv_segments.reshape(-1)))
    out = rearrange(out, "n (b s) h -> b s n h", b=rows)[:, :length]
    return jnp.where((out_segments > 0)[..., None, None], out, 0)


def active_tiles(
    q_segments: jax.Array, kv_segments: jax.Array, slots: jax.Array, q_tile: int, kv_tile: int
) -> jax.Array:
    """Which tiles have to be computed: those in the past in which a segment of the queries can occur.

    Segments count as the range from the smallest to the largest id, which is exact where ids ascend along the row and
    too large at worst. The tiles of the queries' own slots always count: no query may be left without any key, since
    what the kernel returns for it would not be finite (padding has to be, too).

    Args:
      q_segments, kv_segments: (b s), (b t) int32, s and t whole tiles.
      slots: (s,) int32, ascending, where the queries are among the keys.
      q_tile, kv_tile: positions of a tile.

    Returns:
      (b q k) bool.
    """
    (q_low, q_high), (kv_low, kv_high) = _id_range(q_segments, q_tile), _id_range(kv_segments, kv_tile)
    shared = (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    first, last = slots[::q_tile, None], slots[q_tile - 1 :: q_tile, None]
    kv_first = jnp.arange(0, kv_segments.shape[1], kv_tile)
    past = kv_first <= last
    own = past & (kv_first + kv_tile > first)
    return (shared & past) | own


def _id_range(segment_ids: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest id of each tile, (b tiles) each; a tile of padding has an empty range."""
    tiles = rearrange(segment_ids, "b (c s) -> b c s", s=tile)
    none = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(tiles > 0, tiles, none), axis=-1), jnp.max(tiles, axis=-1)


def _tile_lists(active: jax.Array, q_slots: jax.Array) -> tuple[MaskInfo, MaskInfo]:
    """The kernel's lists: for each tile of queries its tiles of keys, and for each tile of keys those of queries.

    A tile is one step of the kernel. `data_next` says what the step reads; one that is passed over repeats what a
    neighbour reads, so that nothing is copied for it.
    """
    rows, num_q, num_kv = active.shape
    row = jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    keys = row * num_kv + _nearest_active(active, axis=2)
    queries = row * num_q + _nearest_active(active, axis=1)
    by_query = MaskInfo(
        data_next=rearrange(keys, "b q k -> 1 (b q) k"),
        mask_next=None,
        block_mask=rearrange(active.astype(jnp.int32), "b q k -> 1 (b q) k"),
        partial_mask_blocks=None,
        q_sequence=q_slots,
    )
    by_key = MaskInfo(
        data_next=rearrange(queries, "b q k -> 1 q (b k)"),
        mask_next=None,
        block_mask=rearrange(active.astype(jnp.int32), "b q k -> 1 q (b k)"),
        partial_mask_blocks=None,
        q_sequence=q_slots,
    )
    return by_query, by_key


def _nearest_active(active: jax.Array, axis: int) -> jax.Array:
    """Each tile's own number along `axis`, but not outside the range of the active ones: int32 like `active`."""
    number = jax.lax.broadcasted_iota(jnp.int32, active.shape, axis)
    last = jnp.max(jnp.where(active, number, 0), axis=axis, keepdims=True)
    first = jnp.min(jnp.where(active, number, last), axis=axis, keepdims=True)
    return jnp.clip(number, first, last)


def _is_past(q_slots: jax.Array, kv_slots: jax.Array) -> jax.Array:
    return q_slots >= kv_slots


def _tile(length: int) -> int:
    return min(TILE, -(-length // LANES) * LANES)


def _pad_length(x: jax.Array, multiple: int) -> jax.Array:
    """(b s ...) with zeros behind `s` up to a multiple."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)))


def pallas_gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    first_slot: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Flash attention in Triton.

    Args and returns: as `splash_attention`, for whole rows: queries and keys are the same positions, `first_slot` 0.
    """
    assert q_segments.shape == kv_segments.shape and first_slot == 0, "the kernel takes whole rows only"
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    q, k, v, segment_ids = (_pad_length(x, GPU_TILE) for x in (q, k, v, q_segments))
    out = mha(q, k, v, segment_ids, sm_scale=q.shape[-1] ** -0.5, causal=True, interpret=interpret)[:, :length]
    return jnp.where((q_segments > 0)[..., None, None], out, 0)
