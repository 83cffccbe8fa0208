"""Conversations side by side in one batch: what the device holds of them, and the pure functions that move them on.

    prefill_row    a block of positions of one row       (compiled once per length of block)
    begin_row      settings and first token of an answer (compiled once)
    step_rows      one more token of every answering row (compiled once)
    copy_row, stop_row                                   (compiled once)

Rows begin, end and change between any two of these calls; a row that does not answer steps along without effect. The
layout of the cache is that of `models/language/cache.py` with an `end` per row.

Axes: b rows, s positions of a block, d width, v vocabulary, w stop tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.inference.generate import prefill, prefill_hidden
from vita_jax.inference.row_sampling import RowSampling, draw_rows, greedy_rows
from vita_jax.models.language import cache as caches
from vita_jax.models.language.cache import KVCache
from vita_jax.models.language.decoder import Decoder, make_cache

Params = Mapping[str, Any]

# Stop tokens that a row can have, and what stands for none: it equals no token.
MAX_STOPS, NO_STOP = 4, -1


@struct.dataclass
class Rows:
    """State of b conversations.

    Attributes:
      cache: with an `end` per row.
      last: (b,) int32, the token that the next step feeds.
      active: (b,) bool, rows that answer.
      drawn: (b,) int32, tokens of the running answer so far, `last` included.
      limit: (b,) int32, the most tokens of the answer.
      stops: (b w) int32, tokens that end it; `NO_STOP` = none.
      keys: (b,) random keys; token i of an answer is drawn with `fold_in(key, i)`.
      counts: (b v) int32, how often the answer has each token.
      sampling: settings, (b,) each.
    """

    cache: KVCache
    last: jax.Array
    active: jax.Array
    drawn: jax.Array
    limit: jax.Array
    stops: jax.Array
    keys: jax.Array
    counts: jax.Array
    sampling: RowSampling


@struct.dataclass
class Block:
    """Positions to be fed to one row, padded on the right.

    Attributes:
      tokens, positions: (1 s) int32.
      real: (1 s) int32, 1 = a position, 0 = padding.
      features: (1 s d), what stands in the place of a token's embedding where `is_feature` (1 s) bool.
    """

    tokens: jax.Array
    positions: jax.Array
    real: jax.Array
    features: jax.Array
    is_feature: jax.Array


@struct.dataclass
class Answering:
    """Settings of one answer: `limit` () int32, `stops` (w,) int32, `key`, and `sampling` with () leaves."""

    limit: jax.Array
    stops: jax.Array
    key: jax.Array
    sampling: RowSampling


def empty_rows(decoder: Decoder, batch: int, num_slots: int, cache_dtype: jnp.dtype | None = None) -> Rows:
    """b rows with nothing in them, each with room for `num_slots` positions.

    cache_dtype: of keys and values, see `vita_jax.models.language.cache.empty_cache`; None = the compute dtype.
    """
    c, dtype = decoder.config, decoder.dtype if cache_dtype is None else cache_dtype
    return Rows(
        cache=caches.with_row_ends(make_cache(c, batch, num_slots, dtype)),
        last=jnp.zeros((batch,), jnp.int32),
        active=jnp.zeros((batch,), bool),
        drawn=jnp.zeros((batch,), jnp.int32),
        limit=jnp.zeros((batch,), jnp.int32),
        stops=jnp.full((batch, MAX_STOPS), NO_STOP, jnp.int32),
        keys=jax.random.split(jax.random.key(0), batch),
        counts=jnp.zeros((batch, c.vocab_size), jnp.int32),
        sampling=jax.tree.map(jnp.asarray, greedy_rows(batch)),
    )


def prefill_row(
    decoder: Decoder, params: Params, rows: Rows, row: jax.Array, start: jax.Array, block: Block
) -> tuple[jax.Array, jax.Array, Rows]:
    """Feeds a block to one row, behind its first positions; what came after those is forgotten.

    Args:
      decoder, params: the language model.
      row: () int32.
      start: () int32, positions of the row that stay.
      block: at least one real position; `start` and all of them fit into the row.

    Returns:
      hidden states at the block's last position (1 d), the logits that follow it (1 v), and the new state.
    """
    embeds = decoder.apply({"params": params}, block.tokens, method="embed")
    embeds = jnp.where(block.is_feature[..., None], block.features.astype(embeds.dtype), embeds)
    cache = caches.cut_row(rows.cache, row, start, block.positions[0, 0])
    one = caches.take_row(cache, row)
    hidden, one = prefill_hidden(decoder, params, embeds, block.positions, block.real, one)
    logits = decoder.apply({"params": params}, hidden[:, None], method="logits")[:, 0]
    return hidden, logits, rows.replace(cache=caches.put_row(cache, row, one))


def begin_row(rows: Rows, row: jax.Array, logits: jax.Array, answering: Answering) -> tuple[jax.Array, Rows]:
    """Draws the first token of an answer from what `prefill_row` gave, (1 v): the token () int32, and the state."""
    vocabulary = logits.shape[-1]
    first = jax.random.fold_in(answering.key, 0)
    settings = jax.tree.map(lambda x: jnp.asarray(x)[None], answering.sampling)
    token = draw_rows(logits, settings, first[None], jnp.zeros((1, vocabulary), jnp.int32))[0]
    ended = jnp.any(token == answering.stops) | (answering.limit <= 1)
    return token, rows.replace(
        last=rows.last.at[row].set(token),
        active=rows.active.at[row].set(~ended),
        drawn=rows.drawn.at[row].set(1),
        limit=rows.limit.at[row].set(answering.limit),
        stops=rows.stops.at[row].set(answering.stops),
        keys=rows.keys.at[row].set(answering.key),
        counts=rows.counts.at[row].set(jax.nn.one_hot(token, vocabulary, dtype=jnp.int32)),
        sampling=jax.tree.map(lambda x, new: x.at[row].set(new), rows.sampling, answering.sampling),
    )


def step_rows(decoder: Decoder, params: Params, rows: Rows) -> tuple[jax.Array, Rows]:
    """Feeds the last token of every answering row and draws the next one.

    Returns:
      (b,) int32, arbitrary for rows that do not answer; and the new state, in which rows that drew a stop token or
      their last one do not answer any more. The token drawn last is not in the cache.
    """
    embeds = decoder.apply({"params": params}, rows.last[:, None], method="embed")
    real = rows.active.astype(jnp.int32)[:, None]
    positions = rows.cache.next_position[:, None]
    logits, cache = prefill(decoder, params, embeds, positions, real, rows.cache)
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.drawn)
    tokens = draw_rows(logits, rows.sampling, keys, rows.counts)
    drawn = rows.drawn + rows.active
    ended = jnp.any(tokens[:, None] == rows.stops, axis=1) | (drawn >= rows.limit)
    counts = rows.counts.at[jnp.arange(len(tokens)), tokens].add(rows.active.astype(jnp.int32))
    return tokens, rows.replace(cache=cache, last=tokens, active=rows.active & ~ended, drawn=drawn, counts=counts)


def copy_row(rows: Rows, source: jax.Array, target: jax.Array) -> Rows:
    """The cache of one row, () int32, put into another; for conversations that begin alike."""
    return rows.replace(cache=caches.put_row(rows.cache, target, caches.take_row(rows.cache, source)))


def stop_row(rows: Rows, row: jax.Array) -> Rows:
    """Ends the answer of a row, () int32."""
    return rows.replace(active=rows.active.at[row].set(False))
