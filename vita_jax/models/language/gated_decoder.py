"""A decoder with gated cross-attention before every n-th of its layers (Flamingo, arXiv 2204.14198, section 3.1.2).

The layers are those of `decoder.py`, with the same parameters in the same stack, so a language model's parameters serve
unchanged. Here the stack is walked in groups: n - 1 layers, a gated block, one layer. Layers that are left over at the
end have no block. Parameters are plain arrays; nothing is created here.

Axes: b rows, s positions, l layers, g groups, t pictures, m tokens of a picture, n heads, k kv heads, h head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.models.language.cache import KVCache, advance, empty_cache, mark_written
from vita_jax.models.language.decoder import REMAT_POLICIES, Block, DecoderConfig
from vita_jax.models.language.gated_cross_attention import GatedBlock, GatedCrossAttentionConfig
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.rope import rotary_tables

Params = Mapping[str, Any]
Carry = tuple[jax.Array, tuple[jax.Array, jax.Array] | None]


@struct.dataclass
class GatedCache:
    """State of a batch of running sequences.

    Attributes:
      text: the layers' keys and values.
      media: (g b t m 2 n h) the blocks' keys and values of the pictures.
      times: (b,) int32, the picture that what follows each row sees: that of its last position.
    """

    text: KVCache
    media: jax.Array
    times: jax.Array


def num_blocks(num_layers: int, every: int) -> int:
    """g: layer i, from 0, has a block before it if i + 1 is a multiple of `every`."""
    return num_layers // every


def block_numbers(num_layers: int, every: int) -> tuple[int, ...]:
    """The layers that have a block before them."""
    return tuple(range(every - 1, num_layers, every))


def media_keys_values(config: GatedCrossAttentionConfig, blocks: Params, media: jax.Array) -> jax.Array:
    """What all blocks read of the pictures, once per sequence.

    Args:
      config: of the blocks.
      blocks: stacked parameters (g ...).
      media: (b t m c) in the compute dtype.

    Returns:
      (g b t m 2 n h).
    """
    block = GatedBlock(config, media.dtype, parent=None)
    made = jax.vmap(lambda params: block.apply({"params": params}, media, method="media_keys_values"))(blocks)
    return nn.with_logical_constraint(made, (None, "batch", None, None, None, "q_heads", None))


def run_layers(
    config: DecoderConfig,
    cross: GatedCrossAttentionConfig,
    every: int,
    layers: Params,
    blocks: Params,
    x: jax.Array,
    media: jax.Array,
    times: jax.Array | None,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache: KVCache | None = None,
    capture: bool = False,
) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
    """Runs all layers and blocks; with a cache, the positions given are appended to it.

    Args:
      config, cross, every: of the decoder, the blocks, and how many layers there are to a block.
      layers, blocks: their parameters, stacked (l ...) and (g ...).
      x: (b s d) in the compute dtype.
      media: (g b t m 2 n h), see `media_keys_values`.
      times: (b s) int32, see `vita_jax.ops.media.media_times`.
      positions, segment_ids: (b s) int32, as for `Decoder`.
      cache: None, or what earlier positions left.
      capture: also return intermediates.

    Returns:
      (b s d) before the final norm, the new cache, and with `capture` `hidden` (l b s d), the output of every layer,
      and `gated` (g b s d), that of every block.
    """
    start, stacks = (None, None) if cache is None else (cache.end, (cache.k, cache.v))
    keys = segment_ids if cache is None else mark_written(cache, segment_ids)
    mask = make_attention_mask(segment_ids, keys, first_query_slot=0 if cache is None else cache.end)
    rotary = rotary_tables(positions, config.head_dim, config.rope_theta)
    block, gate = Block(config, x.dtype, parent=None), GatedBlock(cross, x.dtype, parent=None)

    def layer(carry: Carry, params: Params, number: jax.Array) -> Carry:
        return block.apply({"params": params}, carry, number, rotary, mask, start)[0]

    def look(x: jax.Array, params: Params, media: jax.Array) -> jax.Array:
        return gate.apply({"params": params}, x, media, times)[0]

    layer, look = _remat(layer, config.remat), _remat(look, config.remat)

    def one(carry: Carry, xs: tuple[Params, jax.Array]) -> tuple[Carry, jax.Array | None]:
        carry = layer(carry, *xs)
        return carry, carry[0] if capture else None

    def group(carry: Carry, xs: tuple[Any, Params, jax.Array]) -> tuple[Carry, Any]:
        members, block_params, media = xs
        carry, before = _scan(one, carry, jax.tree.map(lambda p: p[:-1], members))
        gated = look(carry[0], block_params, media)
        carry, last = one((gated, carry[1]), jax.tree.map(lambda p: p[-1], members))
        return carry, (_append(before, last), gated) if capture else None

    groups = num_blocks(config.num_layers, every)
    whole, stack = groups * every, (layers, jnp.arange(config.num_layers, dtype=jnp.int32))
    grouped = jax.tree.map(lambda p: p[:whole].reshape(groups, every, *p.shape[1:]), stack)
    carry, inside = jax.lax.scan(group, (x, stacks), (grouped, blocks, media))
    carry, rest = _scan(one, carry, jax.tree.map(lambda p: p[whole:], stack))
    x, stacks = carry
    captured = {}
    if capture:
        hidden, gated = inside
        hidden = hidden.reshape(whole, *hidden.shape[2:])
        captured = {"hidden": hidden if rest is None else jnp.concatenate([hidden, rest]), "gated": gated}
    return x, None if cache is None else advance(cache, *stacks, segment_ids, positions), captured


def _remat(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with the backward pass keeping what the policy of that name says; see `REMAT_POLICIES`."""
    if name == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[name], prevent_cse=False)


def _scan(function: Callable[..., Any], carry: Carry, xs: Any) -> tuple[Carry, Any]:
    """`lax.scan`, without a trace of the function where there is nothing to walk."""
    if not jax.tree.leaves(xs)[0].shape[0]:
        return carry, None
    return jax.lax.scan(function, carry, xs)


def _append(stack: jax.Array | None, last: jax.Array) -> jax.Array:
    return last[None] if stack is None else jnp.concatenate([stack, last[None]])


def make_gated_cache(
    config: DecoderConfig, batch: int, num_slots: int, media: jax.Array, dtype: jnp.dtype = jnp.float32
) -> GatedCache:
    """An empty cache for `batch` rows of at most `num_slots` positions, over their pictures (g b t m 2 n h)."""
    text = empty_cache(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        batch=batch,
        num_slots=num_slots,
        dtype=dtype,
    )
    return GatedCache(text, media, jnp.zeros((batch,), jnp.int32))
