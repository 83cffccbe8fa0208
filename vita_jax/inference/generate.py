"""Text generation: pure `prefill` and `decode_step` over an explicit cache, and the loops around them.

`generate` answers a whole batch inside one compiled call (evaluation), compiled once per shape; conversations, which
come and go, are answered by `engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.errors import UserError
from vita_jax.inference.sampling import GREEDY, Greedy, Sampler
from vita_jax.models.language.cache import KVCache, last_valid
from vita_jax.models.language.decoder import Decoder, make_cache
from vita_jax.models.llava import Llava
from vita_jax.models.vita import Vita, VitaInputs

Params = Mapping[str, Any]

# Round sizes of prompts (positions) and of tile slots; past the last one, multiples of it.
LENGTH_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TILE_BUCKETS = (0, 1, 2, 4, 8, 13, 16)


@struct.dataclass
class Generated:
    """What `generate` returns.

    Attributes:
      tokens: (b n) int32; the stop token and everything after it is `pad_token`.
      lengths: (b,) int32, tokens before the stop token (n where none came).
    """

    tokens: jax.Array
    lengths: jax.Array


def prefill_hidden(
    decoder: Decoder,
    params: Params,
    inputs_embeds: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Feeds a block of positions to running (or new) conversations.

    Args:
      decoder: the language model.
      params: its parameters (`params["language"]` of the whole model).
      inputs_embeds: (b s d).
      positions, segment_ids: (b s) int32; padding has segment 0 and may be on either side.
      cache: what came before; `cache.end + s` must not exceed its slots.

    Returns:
      hidden states after the final norm at each row's last real position (b d), and the new cache.
    """
    hidden, cache = decoder.apply({"params": params}, inputs_embeds, positions, segment_ids, cache)
    last = jnp.maximum(last_valid(segment_ids), 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


def prefill(
    decoder: Decoder,
    params: Params,
    inputs_embeds: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """`prefill_hidden` with the logits that follow each row's last real position (b v) in place of hidden states."""
    hidden, cache = prefill_hidden(decoder, params, inputs_embeds, positions, segment_ids, cache)
    return decoder.apply({"params": params}, hidden[:, None], method="logits")[:, 0], cache


def decode_step(decoder: Decoder, params: Params, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Feeds one token per row, at the position after its last one.

    Args:
      tokens: (b,) int32.
      cache: the conversations so far.

    Returns:
      logits of the token after (b v), and the new cache.
    """
    embeds = decoder.apply({"params": params}, tokens[:, None], method="embed")
    return prefill(decoder, params, embeds, cache.next_position[:, None], cache.segment[:, None], cache)


def generate_from_embeds(
    decoder: Decoder,
    params: Params,
    inputs_embeds: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    sampler: Sampler = GREEDY,
    key: jax.Array | None = None,
    pad_token: int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> Generated:
    """Continues every row until it stops by itself or `max_new_tokens` are out; traceable, meant to run under `jit`.

    The loop ends as soon as the last row has stopped.

    Args:
      decoder, params: the language model.
      inputs_embeds: (b s d), positions and segment_ids (b s): the prompts; a row of padding stays empty.
      max_new_tokens: n, at least 1.
      stop_tokens: ids that end a row.
      sampler: how tokens are chosen.
      key: random key; needed unless the sampler is `Greedy`.
      pad_token: fills the rest of a row that has stopped.
      cache_dtype: of keys and values, see `vita_jax.models.language.cache.empty_cache`; None = that of the embeddings.
    """
    key = checked_key(max_new_tokens, sampler, key)
    batch, length = segment_ids.shape
    dtype = inputs_embeds.dtype if cache_dtype is None else cache_dtype
    cache = make_cache(decoder.config, batch, length + max_new_tokens, dtype)
    logits, cache = prefill(decoder, params, inputs_embeds, positions, segment_ids, cache)
    return continue_rows(
        partial(decode_step, decoder, params),
        logits,
        cache,
        empty=~jnp.any(segment_ids > 0, axis=1),
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampler=sampler,
        key=key,
        pad_token=pad_token,
    )


def checked_key(max_new_tokens: int, sampler: Sampler, key: jax.Array | None) -> jax.Array:
    """The random key, or one that nothing is drawn from. Raises UserError for arguments that do not go together."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if key is None and not isinstance(sampler, Greedy):
        raise UserError(f"{sampler} draws at random; give a random key")
    return jax.random.key(0) if key is None else key


def continue_rows(
    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    logits: jax.Array,
    cache: Any,
    *,
    empty: jax.Array,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampler: Sampler,
    key: jax.Array,
    pad_token: int,
) -> Generated:
    """The loop of generation, for any model.

    Args:
      step: (tokens (b,), cache) -> (logits (b v) of the token after, cache).
      logits: (b v), what follows the prompts.
      cache: a pytree, what `step` continues.
      empty: (b,) bool, rows that stay empty.
      max_new_tokens, stop_tokens, sampler, key, pad_token: see `generate_from_embeds`.
    """
    batch = logits.shape[0]
    stops = jnp.asarray(stop_tokens or (-1,), jnp.int32)  # -1 equals no token

    def choose(number: jax.Array, logits: jax.Array, done: jax.Array, out: jax.Array) -> tuple:
        token = sampler(logits, jax.random.fold_in(key, number))
        done = done | jnp.any(token[:, None] == stops, axis=1)
        token = jnp.where(done, pad_token, token)
        return token, done, out.at[:, number].set(token)

    def body(state: tuple) -> tuple:
        number, token, done, lengths, out, cache = state
        logits, cache = step(token, cache)
        token, done, out = choose(number, logits, done, out)
        return number + 1, token, done, lengths + ~done, out, cache

    out = jnp.full((batch, max_new_tokens), pad_token, jnp.int32)
    first = jnp.zeros((), jnp.int32)
    token, done, out = choose(first, logits, empty, out)
    state = (first + 1, token, done, (~done).astype(jnp.int32), out, cache)
    state = jax.lax.while_loop(lambda state: (state[0] < max_new_tokens) & ~jnp.all(state[2]), body, state)
    return Generated(tokens=state[4], lengths=state[3])


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_tokens", "sampler", "pad_token", "cache_dtype"))
def generate(
    model: Vita | Llava,
    params: Params,
    inputs: VitaInputs,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    sampler: Sampler = GREEDY,
    key: jax.Array | None = None,
    pad_token: int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> Generated:
    """Answers a batch of prompts in one compiled call, compiled once per shape; see `generate_from_embeds`.

    Args:
      model: the whole model.
      params: its parameters, {"vision", "projector", "language"}.
      inputs: b prompts, one segment per row, padded on either side.
    """
    embeds = model.apply({"params": params}, inputs, method="embed_inputs")
    return generate_from_embeds(
        model.decoder,
        params["language"],
        embeds,
        inputs.positions,
        inputs.segment_ids,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampler=sampler,
        key=key,
        pad_token=pad_token,
        cache_dtype=cache_dtype,
    )


def bucket(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`; past the last one, the next multiple of it."""
    for value in buckets:
        if size <= value:
            return value
    return -(-size // buckets[-1]) * buckets[-1]
