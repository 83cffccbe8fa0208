"""Flamingo's gated cross-attention: how a frozen language model reads pictures (arXiv 2204.14198, section 3.1.2;
`open_flamingo/src/helpers.py`).

    x = x + tanh(attn_gate) * attention(norm(x), pictures);  x = x + tanh(ff_gate) * feed_forward(x)

Both gates start at 0, where the block gives back its input bit for bit; the paper's ablation without gates adds both
branches as they are. The feed-forward acts on all text, also on text that sees no picture. Axes: b rows, s positions, t
pictures, m tokens of a picture, g blocks of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.nn.feed_forward import LAYER_NORM_EPS, NormedFeedForward
from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.activations import activation
from vita_jax.ops.media import WITHOUT_MEDIA, media_attention


@dataclass(frozen=True)
class GatedCrossAttentionConfig:
    """Sizes and switches of a block.

    Attributes:
      hidden_size: d, the language model's width.
      media_size: c, the width of the pictures' tokens.
      num_heads, head_dim: of the attention; their product is 512 in the open models and d in the paper.
      feed_forward_multiple: width of the feed-forward by d.
      hidden_act: gelu in the open models, squared_relu in the paper.
      all_previous: text sees all pictures up to its own, instead of its own only.
      without_media: see `vita_jax.ops.media.media_attention`.
      gated: False leaves the gates out (an ablation); a fresh model is then not its language model.
    """

    hidden_size: int
    media_size: int
    num_heads: int = 8
    head_dim: int = 64
    feed_forward_multiple: int = 4
    hidden_act: str = "gelu"
    all_previous: bool = False
    without_media: str = "zero"
    gated: bool = True

    def __post_init__(self) -> None:
        activation(self.hidden_act)
        if self.without_media not in WITHOUT_MEDIA:
            raise UserError(f"without_media {self.without_media!r} is unknown; use one of {', '.join(WITHOUT_MEDIA)}")


class GatedBlock(nn.Module):
    """One block. The pictures' keys and values are made once per sequence and come in ready (`media_keys_values`)."""

    config: GatedCrossAttentionConfig
    dtype: jnp.dtype = jnp.float32
    capture: bool = False

    def setup(self) -> None:
        c = self.config
        heads = (c.num_heads, c.head_dim)
        self.attn_norm = LayerNorm(LAYER_NORM_EPS, self.dtype)
        self.q_proj = Dense(heads, ("embed", "q_heads", "head_dim"), use_bias=False, dtype=self.dtype)
        # One kernel for keys and values, as in the checkpoint.
        self.kv_proj = Dense((2, *heads), ("embed", None, "q_heads", "head_dim"), use_bias=False, dtype=self.dtype)
        self.o_proj = Dense(
            (c.hidden_size,), ("q_heads", "head_dim", "embed"), num_input_axes=2, use_bias=False, dtype=self.dtype
        )
        wide = c.feed_forward_multiple * c.hidden_size
        self.feed_forward = NormedFeedForward(c.hidden_size, wide, c.hidden_act, self.dtype)
        if c.gated:
            closed = nn.initializers.zeros_init()
            self.attn_gate = self.param("attn_gate", closed, (), jnp.float32)
            self.ff_gate = self.param("ff_gate", closed, (), jnp.float32)

    def media_keys_values(self, media: jax.Array) -> jax.Array:
        """media: (b t m c), not normed -> (b t m 2 n h)."""
        return self.kv_proj(media)

    def __call__(
        self, x: jax.Array, keys_values: jax.Array, times: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Lets text look at pictures.

        Args:
          x: (b s d).
          keys_values: (b t m 2 n h).
          times: (b s) int, which picture each position sees, see `vita_jax.ops.media.media_times`; None = all of them.

        Returns:
          (b s d), and with `capture` `attention` and `feed_forward` before their gates and `after_attention`.
        """
        c = self.config
        if self.is_initializing():
            self.kv_proj(jnp.zeros((1, c.media_size)))  # `init` only makes the parameters of what runs
        x = nn.with_logical_constraint(x, ("batch", "length", None))
        q = self.q_proj(self.attn_norm(x))
        attended = media_attention(
            q,
            keys_values[..., 0, :, :],
            keys_values[..., 1, :, :],
            times,
            all_previous=c.all_previous,
            without_media=c.without_media,
        )
        attended = self.o_proj(attended)
        after = x + (jnp.tanh(self.attn_gate).astype(x.dtype) * attended if c.gated else attended)
        fed = self.feed_forward(after)
        y = after + (jnp.tanh(self.ff_gate).astype(x.dtype) * fed if c.gated else fed)
        captured = {"attention": attended, "after_attention": after, "feed_forward": fed} if self.capture else {}
        return y, captured


def gated_stack(config: GatedCrossAttentionConfig, num_blocks: int, dtype: jnp.dtype) -> nn.Module:
    """The parameters of all blocks of a model, stacked (g ...); called one after the other, without layers between."""
    return nn.scan(
        GatedBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=num_blocks,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, dtype=dtype)
