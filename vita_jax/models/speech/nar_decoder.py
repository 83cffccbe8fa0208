"""NAR speech decoder: reads the text of a sentence as a whole and gives the AR decoder its features.

A bidirectional stack of plain decoder layers without a final norm (`layers_pre_nn` of `decoder.py`). The papers also
read an initial distribution of speech tokens from it; the optional head does that, see `initial_distribution_loss`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.models.language.decoder import block_stack
from vita_jax.models.speech.config import SpeechDecoderConfig
from vita_jax.nn.layers import Dense
from vita_jax.ops.masks import segment_mask
from vita_jax.ops.rope import rotary_tables


def positions_of(x: jax.Array) -> jax.Array:
    """Positions 0 .. s-1 of every row of (b s d): (b s) int32."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """(b,) lengths -> (b s) bool, True before the length."""
    return jnp.arange(size)[None] < lengths[:, None]


def text_rows(embeddings: jax.Array, width: int) -> jax.Array:
    """Cuts every vector of the language model into consecutive rows: (b s D) -> (b s*D/width width).

    Raises:
      ValueError: D is not a multiple of `width`.
    """
    b, _, size = embeddings.shape
    if size % width:
        raise ValueError(f"vectors of {size} cannot be cut into rows of {width}")
    return embeddings.reshape(b, -1, width)


class NarDecoder(nn.Module):
    """The stack. Parameters: `layers/...` (l ...), and `initial_head/{kernel, bias}` where the config has one. Without
    layers it is the identity and has none.
    """

    config: SpeechDecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        if c.num_nar_layers:
            self.layers = block_stack(c.stack(c.num_nar_layers), self.dtype)
        if c.initial_head:
            self.initial_head = Dense((c.num_codes,), ("embed", "vocab"), dtype=self.dtype)

    def __call__(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """Contextual features of the text.

        Args:
          features: (b s d) rows of text, or of hidden states.
          lengths: (b,) int32, real rows; the rest is neither seen nor meaningful.

        Returns:
          (b s d).
        """
        c = self.config
        if not c.num_nar_layers:
            return features.astype(self.dtype)
        real = length_mask(lengths, features.shape[1]).astype(jnp.int32)
        rotary = rotary_tables(positions_of(features), c.hidden_size // c.num_heads, c.stack(1).rope_theta)
        layers = jnp.arange(c.num_nar_layers, dtype=jnp.int32)
        mask = segment_mask(real, real)
        (x, _), _ = self.layers((features.astype(self.dtype), None), layers, rotary, mask, None)
        if self.is_initializing() and c.initial_head:
            self.initial_logits(x[:, :1])
        return x

    def initial_logits(self, hidden: jax.Array) -> jax.Array:
        """First guess of the speech tokens under each row: (b s d) -> (b s c)."""
        return self.initial_head(hidden)


def initial_distribution_loss(
    logits: jax.Array, lengths: jax.Array, codes: jax.Array, code_lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the initial distribution, for a head that is trained beside the AR decoder.

    Text and speech are aligned evenly: of `T` speech tokens and `S` rows, token `t` lies under row `floor(t S / T)`, so
    a row learns the distribution of the tokens spoken in its share of the time.

    Args:
      logits: (b s c).
      lengths, code_lengths: (b,) int32, real rows and real tokens.
      codes: (b T) int32, padded with anything.

    Returns:
      (sum over tokens, number of tokens), both () float32.
    """
    steps = jnp.arange(codes.shape[1])[None]
    real = length_mask(code_lengths, codes.shape[1])
    rows = (steps * lengths[:, None]) // jnp.maximum(code_lengths, 1)[:, None]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    under = jnp.take_along_axis(log_probs, jnp.minimum(rows, logits.shape[1] - 1)[..., None], axis=1)
    picked = jnp.take_along_axis(under, jnp.where(real, codes, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(real, picked, 0.0)), jnp.sum(real, dtype=jnp.float32)
