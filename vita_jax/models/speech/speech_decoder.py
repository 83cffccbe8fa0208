"""Text to codec tokens: the NAR decoder, the AR decoder behind it, and optionally a prefix of hidden states.

    text rows -> NAR -> [BOS; NAR output] -> prompt of the AR decoder, seen in both directions
    [SOS; speech tokens]                  -> causal behind it, each predicts the next; EOS ends

(VITA-1.5, arXiv 2501.01957, section 3; `LLM2TTSCodecAR` of `decoder.py`.) The text rows are input embeddings of the
language model, cut into pieces of this model's width. Stage 3.2 trains both decoders with the language model frozen;
Freeze-Omni's prefix tuning then trains `prefix` and `nar` only.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.errors import UserError
from vita_jax.models.language.cache import KVCache, advance, mark_written
from vita_jax.models.language.decoder import make_cache
from vita_jax.models.speech.ar_decoder import ArDecoder, PrefixDecoder
from vita_jax.models.speech.config import SpeechDecoderConfig
from vita_jax.models.speech.nar_decoder import NarDecoder, length_mask
from vita_jax.ops.losses import IGNORE_LABEL, token_losses


@struct.dataclass
class SpeechBatch:
    """Sentences and the speech tokens they are spoken with.

    Attributes:
      features: (b s d) rows of text.
      feature_lengths: (b,) int32, real rows.
      codes: (b T) int32 codec ids, padded with anything.
      code_lengths: (b,) int32, real tokens.
      prefix: (b p d) rows of hidden states of the language model, or None.
      prefix_lengths: (b,) int32, or None.
    """

    features: jax.Array
    feature_lengths: jax.Array
    codes: jax.Array
    code_lengths: jax.Array
    prefix: jax.Array | None = None
    prefix_lengths: jax.Array | None = None


def speech_labels(codes: jax.Array, code_lengths: jax.Array, config: SpeechDecoderConfig) -> jax.Array:
    """What is to be predicted behind [SOS; codes]: the codes, then EOS, then PAD. (b T) -> (b T+1) int32."""
    steps = jnp.arange(codes.shape[1] + 1)[None]
    codes = jnp.pad(codes, ((0, 0), (0, 1)))
    lengths = code_lengths[:, None]
    return jnp.where(steps < lengths, codes, jnp.where(steps == lengths, config.eos, config.pad)).astype(jnp.int32)


def teacher_mask(
    feature_lengths: jax.Array, code_lengths: jax.Array, num_rows: int, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Who sees whom in teacher forcing: text sees text both ways; speech sees text, and speech up to itself.

    Args:
      feature_lengths, code_lengths: (b,) int32, without BOS and SOS.
      num_rows, num_steps: S and T, without BOS and SOS.

    Returns:
      (b s s) bool, s = S + T + 2, and (b s) bool, the positions that are not padding.
    """
    text, speech = length_mask(feature_lengths + 1, num_rows + 1), length_mask(code_lengths + 1, num_steps + 1)
    real = jnp.concatenate([text, speech], axis=1)
    slots = jnp.arange(real.shape[1])
    is_text = slots <= num_rows
    order = is_text[None, :] | (~is_text[:, None] & (slots[None, :] <= slots[:, None]))
    return real[:, :, None] & real[:, None, :] & order, real


class SpeechDecoder(nn.Module):
    """Parameters: `nar/...`, `ar/...`, and `prefix/...` where the config has it."""

    config: SpeechDecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.nar = NarDecoder(self.config, dtype=self.dtype)
        self.ar = ArDecoder(self.config, dtype=self.dtype)
        if self.config.prefix:
            self.prefix = PrefixDecoder(self.config, dtype=self.dtype)

    def prompt(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """[BOS; NAR output]: (b s d), (b,) -> (b 1+s d)."""
        bos = self.ar.embed(jnp.full((features.shape[0], 1), self.config.bos, jnp.int32))
        return jnp.concatenate([bos, self.nar(features, lengths)], axis=1)

    def initial_logits(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """The initial distribution of speech tokens: (b s d) rows of text -> (b s c) logits; needs `initial_head`."""
        return self.nar.initial_logits(self.nar(features, lengths))

    def normalise(self, hidden: jax.Array) -> jax.Array:
        """The AR decoder's final norm: (b s d) -> (b s d)."""
        return self.ar.normalise(hidden)

    def logits(self, normed: jax.Array) -> jax.Array:
        """(b s d) after the final norm -> (b s v)."""
        return self.ar.logits(normed)

    def teacher_inputs(self, batch: SpeechBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings (b s d), positions (b s) and mask (b s p+s) of the whole sequence, s = S + T + 2; see `forward`.

        The mask's keys begin with the prefix, if there is one.
        """
        c = self.config
        (b, num_rows), num_steps = batch.features.shape[:2], batch.codes.shape[1]
        speech = jnp.where(length_mask(batch.code_lengths, num_steps), batch.codes, c.pad)
        speech = jnp.concatenate([jnp.full((b, 1), c.sos, jnp.int32), speech], axis=1)
        prompt = self.prompt(batch.features, batch.feature_lengths)
        embeds = jnp.concatenate([prompt, self.ar.embed(speech)], axis=1)
        mask, real = teacher_mask(batch.feature_lengths, batch.code_lengths, num_rows, num_steps)
        positions = jnp.broadcast_to(jnp.arange(real.shape[1], dtype=jnp.int32), real.shape)
        if c.contiguous_positions:
            gap = (num_rows - batch.feature_lengths)[:, None]
            positions = positions - jnp.where(positions > num_rows, gap, 0).astype(jnp.int32)
        if batch.prefix is not None:
            before = length_mask(batch.prefix_lengths, batch.prefix.shape[1])
            mask = jnp.concatenate([real[:, :, None] & before[:, None, :], mask], axis=2)
        return embeds, positions, mask

    def __call__(self, batch: SpeechBatch) -> jax.Array:
        """Teacher forcing: hidden states after the final norm, of text and speech, (b S+T+2 d).

        The last T + 1 of them, at SOS and the speech tokens, predict `speech_labels`.

        Raises:
          UserError: a prefix is given and the config has no prefix stack.
        """
        embeds, positions, mask = self.teacher_inputs(batch)
        stacks, start = None, None
        if batch.prefix is not None:
            self._need_prefix()
            b, p = batch.prefix.shape[:2]
            cache = make_cache(self.config.stack(self.config.num_layers), b, p + embeds.shape[1], self.dtype)
            stacks = self.prefix(batch.prefix, batch.prefix_lengths, (cache.k, cache.v))
            start = jnp.asarray(p, jnp.int32)
        elif self.is_initializing() and self.config.prefix:
            self._make_prefix_parameters()
        hidden, _ = self.ar(embeds, positions, mask[:, None], stacks, start)
        self.sow("intermediates", "ar_output", hidden)
        return self.ar.normalise(hidden)

    def _need_prefix(self) -> None:
        if not self.config.prefix:
            raise UserError("a prefix is given, but the speech decoder has no prefix stack; set `prefix` in its config")

    def _make_prefix_parameters(self) -> None:
        c = self.config
        cache = make_cache(c.stack(c.num_layers), 1, 1)
        self.prefix(jnp.zeros((1, 1, c.hidden_size)), jnp.ones((1,), jnp.int32), (cache.k, cache.v))

    def start(
        self,
        features: jax.Array,
        lengths: jax.Array,
        num_slots: int,
        prefix: jax.Array | None = None,
        prefix_lengths: jax.Array | None = None,
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        """Reads the text, and the prefix if there is one, into a fresh cache.

        Args:
          features: (b s d) rows of text; lengths: (b,) int32.
          num_slots: slots of the cache: rows of the prefix, 1 + s, and one per speech token to come (SOS included).
          prefix: (b p d); prefix_lengths: (b,) int32.

        Returns:
          The cache, whose next position is each row's own; the prompt (b 1+s d); and its hidden states (b 1+s d).
        """
        c = self.config
        needed = features.shape[1] + 2 + (0 if prefix is None else prefix.shape[1])
        if num_slots < needed:
            raise UserError(f"num_slots {num_slots} must be at least {needed}: prefix, text, BOS and SOS")
        cache = make_cache(c.stack(c.num_layers), features.shape[0], num_slots, self.dtype)
        if prefix is not None:
            self._need_prefix()
            k, v = self.prefix(prefix, prefix_lengths, (cache.k, cache.v))
            real = length_mask(prefix_lengths, prefix.shape[1]).astype(jnp.int32)
            cache = cache.replace(k=k, v=v, segment_ids=mark_written(cache, real))
            cache = cache.replace(end=jnp.asarray(prefix.shape[1], jnp.int32))
        prompt = self.prompt(features, lengths)
        real = length_mask(lengths + 1, prompt.shape[1]).astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(prompt.shape[1], dtype=jnp.int32), real.shape)
        hidden, cache = self._append(cache, prompt, positions, real)
        return cache, prompt, hidden

    def step(self, cache: KVCache, tokens: jax.Array) -> tuple[KVCache, jax.Array]:
        """One token of every row: (b,) int32 -> the cache with it, and its hidden states before the final norm (b 1 d).

        The rows' positions are `cache.next_position`.
        """
        ones = jnp.ones((tokens.shape[0], 1), jnp.int32)
        embeds = self.ar.embed(tokens[:, None])
        hidden, cache = self._append(cache, embeds, cache.next_position[:, None], ones)
        return cache, hidden

    def _append(
        self, cache: KVCache, embeds: jax.Array, positions: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Everything written so far, this block included, is seen in both directions; single steps are thus causal."""
        written = mark_written(cache, real) > 0
        mask = ((real > 0)[:, :, None] & written[:, None, :])[:, None]
        hidden, stacks = self.ar(embeds, positions, mask, (cache.k, cache.v), cache.end)
        return hidden, advance(cache, *stacks, real, positions)


def speech_loss(logits: jax.Array, labels: jax.Array, config: SpeechDecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cross entropy over all labels but PAD.

    Args:
      logits: (b T+1 v), those of SOS and the speech tokens.
      labels: (b T+1), see `speech_labels`.

    Returns:
      (sum, number of labels), both () float32. The original trains on the sum.
    """
    real = labels != config.pad
    losses = token_losses(logits, jnp.where(real, labels, IGNORE_LABEL))
    return jnp.sum(losses), jnp.sum(real, dtype=jnp.float32)
