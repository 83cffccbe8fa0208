"""What Flamingo's paper compares its resampler with (arXiv 2204.14198, section 3.3): a Transformer and an MLP. Their
details are not published; these are the plainest of the kind.

    transformer   latents stand beside the tokens of a picture; all attend to all, layer by layer; the latents come out
    mlp           layers act on every token alone; then each latent is a learned mean of the tokens of a frame, and of a
                  clip the mean over its frames

Inputs, outputs and time embeddings are the Perceiver's. Axes: b rows, t pictures, f frames, v tokens of a frame, m
latents, d width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vita_jax.models.connectors.perceiver_resampler import (
    PerceiverResampler,
    ResamplerConfig,
    learned_latents,
    with_times,
)
from vita_jax.nn.feed_forward import LAYER_NORM_EPS, NormedFeedForward
from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.attention import dot_product_attention

Captured = dict[str, jax.Array]


class TransformerBlock(nn.Module):
    """One layer: x += attention(norm(x)); x += feed_forward(x)."""

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """x: (n s d) -> (n s d)."""
        x = nn.with_logical_constraint(x, ("batch", None, None))
        c, heads = self.config, (self.config.num_heads, self.config.head_dim)
        y = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm")(x)
        q, k, v = (
            Dense(heads, ("embed", "q_heads", "head_dim"), use_bias=False, dtype=self.dtype, name=name)(y)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + Dense(
            (c.hidden_size,),
            ("q_heads", "head_dim", "embed"),
            num_input_axes=2,
            use_bias=False,
            dtype=self.dtype,
            name="o_proj",
        )(dot_product_attention(q, k, v))
        return x + _feed_forward(c, self.dtype)(x), None


class MlpBlock(nn.Module):
    """One layer: x += feed_forward(x)."""

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """x: (b ... d) -> (b ... d)."""
        x = nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))
        return x + _feed_forward(self.config, self.dtype)(x), None


class TransformerResampler(nn.Module):
    """Parameters `latents`, `layers`, `norm`, and those of the times; called like `PerceiverResampler`."""

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Captured]:
        """x: (b t f v d) -> (b t m d), and nothing."""
        c, b, t = self.config, *x.shape[:2]
        x = rearrange(with_times(self, c, x.astype(self.dtype)), "b t f v d -> (b t) (f v) d")
        latents = jnp.broadcast_to(learned_latents(self, c), (b * t, c.num_latents, c.hidden_size))
        x, _ = _stack(TransformerBlock, c, self.dtype)(jnp.concatenate([latents, x], axis=1), None)
        y = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm")(x[:, : c.num_latents])
        return rearrange(y, "(b t) m d -> b t m d", b=b), {}


class MlpResampler(nn.Module):
    """Parameters `layers`, `mix` (v m), `norm`, and those of the times; called like `PerceiverResampler`. The number of
    tokens of a frame is fixed by its parameters.
    """

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Captured]:
        """x: (b t f v d) -> (b t m d), and nothing."""
        c = self.config
        x, _ = _stack(MlpBlock, c, self.dtype)(with_times(self, c, x.astype(self.dtype)), None)
        mixed = Dense((c.num_latents,), (None, None), use_bias=False, dtype=self.dtype, name="mix")(
            rearrange(x, "b t f v d -> b t f d v")
        )
        y = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm")(rearrange(mixed, "b t f d m -> b t f m d").mean(axis=2))
        return y, {}


def _feed_forward(config: ResamplerConfig, dtype: jnp.dtype) -> NormedFeedForward:
    wide = config.feed_forward_multiple * config.hidden_size
    return NormedFeedForward(config.hidden_size, wide, config.hidden_act, dtype, name="feed_forward")


def _stack(block: type[nn.Module], config: ResamplerConfig, dtype: jnp.dtype) -> nn.Module:
    """The layers, with stacked parameters (l ...) under `layers`."""
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, dtype, name="layers")


RESAMPLERS = {"perceiver": PerceiverResampler, "transformer": TransformerResampler, "mlp": MlpResampler}


def make_resampler(config: ResamplerConfig, dtype: jnp.dtype = jnp.float32) -> nn.Module:
    """The resampler of a config: x (b t f v d) -> (b t m d), and what it captured."""
    return RESAMPLERS[config.kind](config, dtype=dtype)
