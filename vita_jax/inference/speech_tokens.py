"""Codec tokens of a sentence, drawn one after the other with an explicit cache (`LLM2TTSCodecAR.infer`).

One compiled step serves every sentence of a bucket: the text rows are padded by the caller, the cache has a fixed
size, and rows that have ended keep stepping without effect. 40 tokens are one second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vita_jax.errors import UserError
from vita_jax.models.language.cache import KVCache
from vita_jax.models.speech.config import SpeechDecoderConfig
from vita_jax.models.speech.speech_decoder import SpeechDecoder
from vita_jax.ops.sampling_filters import keep_top_k_probabilities, repetition_penalty

DEFAULT_MAX_TOKENS = 1000  # 25 s


@dataclass(frozen=True)
class SpeechSampling:
    """How the next codec token is drawn.

    Attributes:
      top_k: the draw is among this many most probable tokens.
      penalty: divides the logits of the last `penalty_window` tokens, SOS included.
      penalty_window: 0 = no penalty.
      forbid_special: BOS, SOS and PAD are never drawn. The original allows them, though the codec has no such entry.
      greedy: takes the most probable token instead of drawing.
    """

    top_k: int = 2
    penalty: float = 1.1
    penalty_window: int = 0
    forbid_special: bool = True
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"top_k {self.top_k} must be at least 1")
        if not self.penalty > 0:
            raise UserError(f"penalty {self.penalty} must be above 0; 1 has no effect")
        if self.penalty_window < 0:
            raise UserError(f"penalty_window {self.penalty_window} must be at least 0; 0 turns the penalty off")


@struct.dataclass
class SpeechState:
    """A batch of sentences being spoken.

    Attributes:
      cache: prefix, prompt and the tokens fed so far.
      last: (b,) int32, the token that is fed next.
      recent: (b w) int32, the last tokens (SOS included), -1 = none yet; w may be 0.
      ended: (b,) bool, EOS has been drawn.
      key: random key.
    """

    cache: KVCache
    last: jax.Array
    recent: jax.Array
    ended: jax.Array
    key: jax.Array


@struct.dataclass
class SpeechStep:
    """What one step drew: `tokens` (b,) int32, PAD for rows that had ended before; the rest is for inspection.

    `normed` (b d) is the AR decoder's output; `logits`, `penalised` and `probabilities` are (b v) float32.
    """

    tokens: jax.Array
    positions: jax.Array
    normed: jax.Array
    logits: jax.Array
    penalised: jax.Array
    probabilities: jax.Array


def start_speech(
    model: SpeechDecoder,
    params: Any,
    features: jax.Array,
    lengths: jax.Array,
    *,
    key: jax.Array,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: SpeechSampling = SpeechSampling(),
    prefix: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
) -> SpeechState:
    """Reads the text rows (b s d), and the prefix rows (b p d) if there are any, and gets ready for the first token.

    Args:
      model, params: the decoder and its parameters.
      features, lengths: (b s d), (b,) int32, see `nar_decoder.text_rows`.
      key: random key.
      max_tokens: how many steps the state can take.
    """
    c = model.config
    b = features.shape[0]
    num_slots = features.shape[1] + 1 + max_tokens + (0 if prefix is None else prefix.shape[1])
    cache, _, _ = model.apply(
        {"params": params}, features, lengths, num_slots, prefix, prefix_lengths, method=SpeechDecoder.start
    )
    last = jnp.full((b,), c.sos, jnp.int32)
    recent = jnp.full((b, sampling.penalty_window), -1, jnp.int32)
    return SpeechState(cache, last, _remember(recent, last), jnp.zeros((b,), bool), key)


def speech_step(
    model: SpeechDecoder, params: Any, state: SpeechState, sampling: SpeechSampling
) -> tuple[SpeechState, SpeechStep]:
    """Feeds the last token of every row and draws the next."""
    c, variables = model.config, {"params": params}
    positions = state.cache.next_position
    cache, hidden = model.apply(variables, state.cache, state.last, method=SpeechDecoder.step)
    normed = model.apply(variables, hidden, method=SpeechDecoder.normalise)
    logits = model.apply(variables, normed, method=SpeechDecoder.logits)[:, 0].astype(jnp.float32)
    penalised = repetition_penalty(logits, state.recent, sampling.penalty) if sampling.penalty_window else logits
    probabilities = next_token_probabilities(penalised, sampling, c)
    key, draw_key = jax.random.split(state.key)
    if sampling.greedy:
        drawn = jnp.argmax(probabilities, axis=-1)
    else:
        drawn = jax.random.categorical(draw_key, jnp.log(probabilities), axis=-1)
    tokens = jnp.where(state.ended, c.pad, drawn).astype(jnp.int32)
    new = SpeechState(cache, tokens, _remember(state.recent, tokens), state.ended | (tokens == c.eos), key)
    return new, SpeechStep(tokens, positions, normed[:, 0], logits, penalised, probabilities)


def next_token_probabilities(logits: jax.Array, sampling: SpeechSampling, config: SpeechDecoderConfig) -> jax.Array:
    """The distribution of the draw: (b v) logits, after the penalty -> (b v) float32."""
    if sampling.forbid_special:
        ids = jnp.arange(config.vocab_size)
        forbidden = (ids >= config.num_codes) & (ids != config.eos)
        logits = jnp.where(forbidden, -jnp.inf, logits)
    return keep_top_k_probabilities(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), sampling.top_k)


def _remember(recent: jax.Array, tokens: jax.Array) -> jax.Array:
    if recent.shape[1] == 0:
        return recent
    return jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)


@partial(jax.jit, static_argnames=("model", "sampling", "count"))
def speech_steps(
    model: SpeechDecoder, params: Any, state: SpeechState, sampling: SpeechSampling, count: int
) -> tuple[SpeechState, jax.Array]:
    """`count` steps at once: the state and the tokens (b count)."""

    def body(state: SpeechState, _: None) -> tuple[SpeechState, jax.Array]:
        state, step = speech_step(model, params, state, sampling)
        return state, step.tokens

    state, tokens = jax.lax.scan(body, state, None, length=count)
    return state, tokens.T


_start = jax.jit(start_speech, static_argnames=("model", "max_tokens", "sampling"))


def _calls(max_tokens: int, steps_per_call: int) -> int:
    """How many calls draw `max_tokens`: whole ones, so the cache has room for what the last one draws beyond."""
    if max_tokens < 1 or steps_per_call < 1:
        raise UserError(f"max_tokens {max_tokens} and steps_per_call {steps_per_call} must be at least 1")
    return -(-max_tokens // steps_per_call)


def stream_speech_tokens(
    model: SpeechDecoder,
    params: Any,
    features: jax.Array,
    lengths: jax.Array,
    *,
    key: jax.Array,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: SpeechSampling = SpeechSampling(),
    steps_per_call: int = 10,
    prefix: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
) -> Iterator[int]:
    """Codec ids of ONE sentence as they are drawn, EOS not included.

    Args:
      features: (1 s d), padded to a size that recurs so that no step is compiled twice; lengths: (1,) int32.
      max_tokens: at most so many ids.
      steps_per_call: ids drawn in one call of the device; a caller that stops early wastes at most these.

    Raises:
      UserError: more than one row, or a size below 1.
    """
    if features.shape[0] != 1:
        raise UserError(f"streaming speaks one sentence at a time, not {features.shape[0]}")
    calls = _calls(max_tokens, steps_per_call)
    state = _start(
        model,
        params,
        features,
        lengths,
        key=key,
        max_tokens=calls * steps_per_call,
        sampling=sampling,
        prefix=prefix,
        prefix_lengths=prefix_lengths,
    )
    spoken = 0
    for _ in range(calls):
        state, tokens = speech_steps(model, params, state, sampling, steps_per_call)
        for token in np.asarray(tokens[0]).tolist():
            if token == model.config.eos or spoken == max_tokens:
                return
            spoken += 1
            yield token


def draw_speech_tokens(
    model: SpeechDecoder,
    params: Any,
    features: jax.Array,
    lengths: jax.Array,
    *,
    key: jax.Array,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: SpeechSampling = SpeechSampling(),
    steps_per_call: int = 10,
) -> list[np.ndarray]:
    """Codec ids of several sentences at once, EOS not included; greedy ones are those of `stream_speech_tokens`.

    Args:
      features: (b s d), lengths: (b,) int32; a row of length 0 stays empty.
      max_tokens: at most so many ids of each sentence.
      steps_per_call: ids drawn per row in one call of the device; it ends with the call in which the last row ends.

    Returns:
      For every row (n,) int32.

    Raises:
      UserError: a size below 1.
    """
    calls = _calls(max_tokens, steps_per_call)
    state = _start(model, params, features, lengths, key=key, max_tokens=calls * steps_per_call, sampling=sampling)
    state = state.replace(ended=jnp.asarray(lengths) == 0)
    drawn = []
    for _ in range(calls):
        state, tokens = speech_steps(model, params, state, sampling, steps_per_call)
        drawn.append(np.asarray(tokens))
        if np.all(np.asarray(state.ended)):
            break
    special = (model.config.eos, model.config.pad)
    rows = []
    for row, length in zip(np.concatenate(drawn, axis=1)[:, :max_tokens], np.asarray(lengths), strict=True):
        ends = np.flatnonzero(np.isin(row, special))
        rows.append(row[: ends[0] if len(ends) else len(row)] if length else row[:0])
    return rows
