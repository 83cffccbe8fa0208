"""Attention: over any mask, and causally within the segments of packed rows, where long rows and many devices are.

Axes: b batch, s queries, t keys, n query heads, k kv heads, g queries per kv head, h head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.ops.attention_kernels import ATTENTION_OUTPUT, pallas_gpu_attention, splash_attention
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.meshes import num_parts, platform_of, used_axes

# Added to a masked score. Finite, so that a row with no key at all stays free of NaN in forward and backward passes.
MASKED_SCORE = -1e30

# How `segment_attention` may be computed.
IMPLEMENTATIONS = ("auto", "xla", "splash", "pallas_gpu")

# "xla" goes through longer rows by blocks of at most so many queries, with at most so many scores per head and row.
QUERY_BLOCK = 1024
BLOCK_SCORES = 4 * QUERY_BLOCK**2
# A block of queries is not made smaller than this, however long the row is.
LEAST_QUERIES = 128

WHOLE = PartitionSpec(None, None, None)


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """Softmax attention with grouped key/value heads; query head `j` reads kv head `j // (n / k)`.

    Args:
      q: (b s n h).
      k, v: (b t k h), `n` divisible by `k`.
      mask: bool, broadcastable to (b 1 s t); True means the query may attend to the key. None means it may attend to
        all.
      scale: multiplies the scores; default `h ** -0.5`.

    Returns:
      (b s n h) in the dtype of `q`. The softmax is computed in float32. A query whose mask is all False gets zeros.

    Raises:
      ValueError: `n` not divisible by `k`.
    """
    length, num_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot be shared evenly by {num_kv_heads} kv heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # One plain matrix product per row and kv head, which every backend has a fast kernel for; the sums of the softmax
    # divide the output, which is smaller than the weights.
    q = rearrange(q * scale, "b s (k g) h -> b k (g s) h", k=num_kv_heads)
    k, v = rearrange(k, "b t k h -> b k h t"), rearrange(v, "b t k h -> b k t h")
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, mask.shape[3]))
        mask = jnp.tile(mask, (1, 1, num_heads // num_kv_heads, 1))  # (b 1 g*s t)
        scores = jnp.where(mask, scores, MASKED_SCORE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    if mask is not None:
        out = jnp.where(jnp.any(mask, axis=-1, keepdims=True), out, 0.0)
    return rearrange(out, "b k (g s) h -> b s (k g) h", g=num_heads // num_kv_heads).astype(q.dtype)


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    implementation: str = "auto",
    axes: PartitionSpec = WHOLE,
    interpret: bool = False,
) -> jax.Array:
    """Self-attention of packed rows: a position sees those at its own slot or before that are of its segment.

    Implementations:
      xla         runs anywhere. Up to `QUERY_BLOCK` positions all scores exist at once; longer rows go block of queries
                  by block, and the backward pass makes the scores of a block again.
      splash      the Pallas kernel for TPUs; no scores in memory, and blocks without a common segment are passed over.
      pallas_gpu  the Pallas (Triton) kernel for GPUs; no scores in memory. Keys and values are repeated for every query
                  head; no context axis.
      auto        by the platform of the current mesh, and without a mesh that of JAX's default backend: `splash` on
                  TPU; on GPU `pallas_gpu` for half precision, head widths it takes and whole rows; else `xla`. A
                  program that is compiled for devices of another host therefore has to be traced inside their mesh.

    Under a mesh the rows may be cut over devices in all three dimensions. Where the row itself is (context axis), its
    queries stay where they are and every device gets the keys, values and segment ids of whole rows: per layer
    2 * s * (k / tensor) * h values of each row, which for Qwen2-7B (k = 4, h = 128) in bfloat16 are 64 MiB at 32k
    positions. Causality leaves devices with early parts of the row less to do than those with late ones.

    Args:
      q: (b s n h).
      k, v: (b s k h), `n` divisible by `k`.
      segment_ids: (b s) int32; 0 = padding, which sees nothing and is seen by nothing.
      implementation: a name of `IMPLEMENTATIONS`.
      axes: mesh axes over which rows, positions and heads are cut; names of size 1, or of no current mesh, say nothing.
      interpret: runs a kernel as ordinary operations on any platform; slow, for tests.

    Returns:
      (b s n h) in the dtype of `q`, zeros at padding. The softmax is computed in float32.

    Raises:
      UnsupportedOption: a kernel on another platform than its own, or `pallas_gpu` with a context axis.
      UserError: unknown `implementation`, or sizes that the mesh axes do not divide.
    """
    check_implementation(implementation)
    mesh = jax.sharding.get_abstract_mesh()
    rows, length, heads = (used_axes(mesh, axis) for axis in axes)
    platform = platform_of(mesh)
    if implementation == "auto":
        implementation = automatic_implementation(platform, q.dtype, q.shape[-1], cut=bool(length))
    _check_platform(implementation, platform, interpret, length)
    if implementation == "xla" and not length:
        # Everything is split by rows and heads alone, which the compiler does by itself.
        return _block_attention(q, k, v, segment_ids, segment_ids, 0)
    kernels: dict[str, Callable[..., jax.Array]] = {
        "xla": _block_attention,
        "splash": partial(splash_attention, interpret=interpret),
        "pallas_gpu": partial(pallas_gpu_attention, interpret=interpret),
    }
    kernel = kernels[implementation]
    if not (rows or length or heads):
        return kernel(q, k, v, segment_ids, segment_ids, 0)

    def on_device(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        if not length:
            return kernel(q, k, v, segment_ids, segment_ids, 0)
        whole = [jax.lax.all_gather(x, length, axis=1, tiled=True) for x in (k, v, segment_ids)]
        first_slot = jax.lax.axis_index(length) * q.shape[1]
        return kernel(q, whole[0], whole[1], segment_ids, whole[2], first_slot)

    _check_sizes(mesh, q.shape, k.shape[2], (rows, length, heads))
    cut = PartitionSpec(rows or None, length or None, heads or None)
    # The kernels do not say over which axes their results vary, so that check has to be left out.
    return jax.shard_map(on_device, in_specs=(cut, cut, cut, PartitionSpec(*cut[:2])), out_specs=cut, check_vma=False)(
        q, k, v, segment_ids
    )


def check_implementation(name: str) -> None:
    """Raises UserError for a name that is not in `IMPLEMENTATIONS`."""
    if name not in IMPLEMENTATIONS:
        raise UserError(f"attention {name!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")


def automatic_implementation(platform: str, dtype: jnp.dtype, head_dim: int, *, cut: bool) -> str:
    """What "auto" stands for, see `segment_attention`; `cut` says that rows are cut over a context axis."""
    if platform == "tpu":
        return "splash"
    # Triton multiplies tiles of 16 or more, and in float32 two tiles of the kernel do not fit into shared memory.
    fits = jnp.dtype(dtype).itemsize == 2 and 16 <= head_dim <= 128
    return "pallas_gpu" if platform == "gpu" and fits and not cut else "xla"


def _check_platform(implementation: str, platform: str, interpret: bool, length: tuple[str, ...]) -> None:
    wanted = {"splash": "tpu", "pallas_gpu": "gpu"}.get(implementation)
    if wanted is not None and wanted != platform and not interpret:
        raise UnsupportedOption(
            f"attention {implementation!r} runs on {wanted} only, and this program is for {platform}; use 'auto' or "
            "'xla', or trace it inside the mesh of the devices it is for"
        )
    if implementation == "pallas_gpu" and length:
        raise UnsupportedOption(
            f"attention 'pallas_gpu' needs whole rows, but they are cut over mesh axis {', '.join(length)}; use 'xla', "
            "or set --config.mesh.context=1"
        )


def _check_sizes(
    mesh: AbstractMesh, shape: tuple[int, ...], num_kv_heads: int, axes: tuple[tuple[str, ...], ...]
) -> None:
    sizes = (("rows", shape[0], axes[0]), ("positions", shape[1], axes[1]), ("kv heads", num_kv_heads, axes[2]))
    for what, size, names in sizes:
        parts = num_parts(mesh, names)
        if size % parts:
            raise UserError(
                f"attention: {size} {what} cannot be cut in {parts} parts (mesh axis {', '.join(names)}); choose "
                "sizes of --config.mesh that divide it"
            )


def _block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    first_slot: jax.Array | int,
) -> jax.Array:
    """Plain operations, with the scores of one block of queries at a time.

    Args:
      q: (b s n h), the queries of slots `first_slot` and on.
      k, v: (b t k h), the keys of slots 0 to t - 1.
      q_segments, kv_segments: (b s), (b t) int32.
      first_slot: () int32.

    Returns:
      (b s n h).
    """

    def attend(q: jax.Array, q_segments: jax.Array, first_slot: jax.Array | int) -> jax.Array:
        mask = make_attention_mask(q_segments, kv_segments, first_query_slot=first_slot)
        return dot_product_attention(q, k, v, mask=mask)

    length, num_keys = q.shape[1], k.shape[1]
    block = max(LEAST_QUERIES, min(QUERY_BLOCK, BLOCK_SCORES // num_keys))
    if length <= block:
        out = attend(q, q_segments, first_slot)
    else:
        padding = -length % block
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        q_segments = jnp.pad(q_segments, ((0, 0), (0, padding)))
        blocks = (
            rearrange(q, "b (c s) n h -> c b s n h", s=block),
            rearrange(q_segments, "b (c s) -> c b s", s=block),
            first_slot + block * jnp.arange((length + padding) // block),
        )
        out = jax.lax.map(lambda args: jax.checkpoint(attend)(*args), blocks)
        out = rearrange(out, "c b s n h -> b (c s) n h")[:, :length]
    return checkpoint_name(out, ATTENTION_OUTPUT)
