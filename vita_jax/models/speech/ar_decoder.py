"""AR speech decoder: codec tokens one after the other, behind the text features as a bidirectional prompt.

Source: `LLM2TTSCodecAR` of `decoder.py`. The prefix stack is its key/value writer for hidden states of the language
model (Freeze-Omni, arXiv 2411.00774): what its layer `i` would attend to becomes the first entries of the AR layer
`i`'s cache, while positions of the prompt start at 0 again.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.models.language.decoder import block_stack
from vita_jax.models.speech.config import RMS_NORM_EPS, ROPE_THETA, SpeechDecoderConfig
from vita_jax.models.speech.nar_decoder import length_mask, positions_of
from vita_jax.nn.layers import Dense, Embed, RMSNorm
from vita_jax.ops.rope import rotary_tables

Stacks = tuple[jax.Array, jax.Array]


class ArDecoder(nn.Module):
    """Parameters: `embed_tokens/embedding` (v d), `layers/...` (l ...), `norm/scale`, `head/{kernel, bias}` (d v)."""

    config: SpeechDecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, init_stddev=1.0, dtype=self.dtype)
        self.layers = block_stack(c.stack(c.num_layers), self.dtype)
        self.norm = RMSNorm(RMS_NORM_EPS, dtype=self.dtype)
        self.head = Dense((c.vocab_size,), ("embed", "vocab"), dtype=self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: (b s) int32 -> (b s d)."""
        return self.embed_tokens(tokens)

    def normalise(self, hidden: jax.Array) -> jax.Array:
        """The final norm: (b s d) -> (b s d)."""
        return self.norm(hidden)

    def logits(self, normed: jax.Array) -> jax.Array:
        """(b s d) after the final norm -> (b s v)."""
        return self.head(normed)

    def __call__(
        self,
        inputs_embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        stacks: Stacks | None = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, Stacks | None]:
        """Runs the layers.

        Args:
          inputs_embeds: (b s d).
          positions: (b s) int32 rotary positions.
          mask: (b 1 s t) bool, True = may attend; t counts the slots of `stacks`, or the inputs without them.
          stacks: cached keys and values, (l b t k h) each; the inputs are written from slot `start` on.

        Returns:
          hidden before the final norm (b s d), and the stacks.
        """
        c = self.config
        rotary = rotary_tables(positions, c.hidden_size // c.num_heads, ROPE_THETA)
        layers = jnp.arange(c.num_layers, dtype=jnp.int32)
        (x, stacks), _ = self.layers((inputs_embeds.astype(self.dtype), stacks), layers, rotary, mask, start)
        if self.is_initializing():
            self.embed(jnp.zeros((1, 1), jnp.int32))
            self.logits(self.normalise(x[:, :1]))
        return x, stacks


class PrefixDecoder(nn.Module):
    """Writes hidden states of the language model into the AR decoder's cache. Parameters: `layers/...` (l ...)."""

    config: SpeechDecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.layers = block_stack(self.config.stack(self.config.num_layers), self.dtype)

    def __call__(self, prefix: jax.Array, lengths: jax.Array, stacks: Stacks) -> Stacks:
        """Fills the first slots.

        Args:
          prefix: (b p d) rows of hidden states.
          lengths: (b,) int32, real rows.
          stacks: empty keys and values (l b t k h), t >= p.

        Returns:
          The stacks with slots 0 .. p-1 written; slots behind a row's length hold nothing of meaning.
        """
        c = self.config
        slots = stacks[0].shape[2]
        real = length_mask(lengths, slots)
        mask = (real[:, : prefix.shape[1], None] & real[:, None, :])[:, None]
        rotary = rotary_tables(positions_of(prefix), c.hidden_size // c.num_heads, ROPE_THETA)
        layers, start = jnp.arange(c.num_layers, dtype=jnp.int32), jnp.zeros((), jnp.int32)
        (x, stacks), _ = self.layers((prefix.astype(self.dtype), stacks), layers, rotary, mask, start)
        self.sow("intermediates", "output", x)  # for inspection; the model has no use for it
        return stacks
