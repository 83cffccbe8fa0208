"""The Perceiver resampler: any number of visual tokens to a fixed number (Flamingo, arXiv 2204.14198, section 3.1.1;
`open_flamingo/src/helpers.py`).

Learned latents attend, layer by layer, to the tokens of one picture or video and to themselves; the tokens never
change. Axes: b rows, t pictures, f frames, v tokens of a frame, m latents, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.nn.feed_forward import LAYER_NORM_EPS, NormedFeedForward
from vita_jax.nn.layers import Dense, LayerNorm, normal_init
from vita_jax.ops.activations import activation
from vita_jax.ops.attention import dot_product_attention

KINDS = ("perceiver", "transformer", "mlp")


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler.

    Attributes:
      hidden_size: d, the tower's width.
      num_layers, num_heads, head_dim: of the attention; heads times their width need not be d.
      kind: "perceiver", or one of the two that the paper compares it with, see `plain_resamplers`.
      num_latents: m, tokens that come out per picture.
      feed_forward_multiple: width of the feed-forward by d.
      hidden_act: gelu in the open models, squared_relu in the paper.
      max_frames, max_media: rows of the time embeddings of frames, and of pictures; 0 = none, as in the released open
        models.
    """

    hidden_size: int
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    num_latents: int = 64
    feed_forward_multiple: int = 4
    hidden_act: str = "gelu"
    max_frames: int = 0
    max_media: int = 0
    kind: str = "perceiver"

    def __post_init__(self) -> None:
        activation(self.hidden_act)
        if self.kind not in KINDS:
            raise UserError(f"resampler: kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        for name in ("num_layers", "num_heads", "head_dim", "num_latents", "feed_forward_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"resampler: {name} {getattr(self, name)} must be at least 1")


class ResamplerAttention(nn.Module):
    """Latents attend to the tokens of a picture and to themselves."""

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, media: jax.Array, latents: jax.Array) -> jax.Array:
        """media: (b v d), latents: (b m d) -> (b m d)."""
        c = self.config
        heads = (c.num_heads, c.head_dim)
        media = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm_media")(media)
        latents = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm_latents")(latents)
        q = Dense(heads, ("embed", "q_heads", "head_dim"), use_bias=False, dtype=self.dtype, name="q_proj")(latents)
        # One kernel for keys and values, as in the checkpoint.
        project = Dense(
            (2, *heads), ("embed", None, "q_heads", "head_dim"), use_bias=False, dtype=self.dtype, name="kv_proj"
        )
        kv = project(jnp.concatenate([media, latents], axis=1))
        return Dense(
            (c.hidden_size,),
            ("q_heads", "head_dim", "embed"),
            num_input_axes=2,
            use_bias=False,
            dtype=self.dtype,
            name="o_proj",
        )(dot_product_attention(q, kv[:, :, 0], kv[:, :, 1]))


class ResamplerBlock(nn.Module):
    """One layer: latents += attention; latents += feed_forward."""

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32
    capture: bool = False

    @nn.compact
    def __call__(self, latents: jax.Array, media: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """latents: (b m d), media: (b v d) -> latents, and with `capture` what was added to them."""
        c = self.config
        latents, media = (nn.with_logical_constraint(each, ("batch", None, None)) for each in (latents, media))
        attended = ResamplerAttention(c, self.dtype, name="attention")(media, latents)
        latents = latents + attended
        wide = c.feed_forward_multiple * c.hidden_size
        fed = NormedFeedForward(c.hidden_size, wide, c.hidden_act, self.dtype, name="feed_forward")(latents)
        return latents + fed, {"attention": attended, "feed_forward": fed} if self.capture else {}


class PerceiverResampler(nn.Module):
    """The resampler; parameters `latents`, `layers`, `norm`, and `frame_embedding`, `media_embedding` if it has any."""

    config: ResamplerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, capture: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Resamples every picture by itself.

        Args:
          x: (b t f v d).
          capture: also return intermediates.

        Returns:
          (b t m d), and with `capture` `attention` and `feed_forward` (l b t m d) as they were added, else nothing.

        Raises:
          UserError: more frames or pictures than there are embeddings.
        """
        c = self.config
        b, t = x.shape[:2]
        x = rearrange(with_times(self, c, x.astype(self.dtype)), "b t f v d -> b t (f v) d")
        latents = jnp.broadcast_to(learned_latents(self, c), (b * t, c.num_latents, c.hidden_size))
        layers = nn.scan(
            ResamplerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, capture, name="layers")
        latents, captured = layers(latents, rearrange(x, "b t v d -> (b t) v d"))
        y = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm")(latents)
        captured = {name: rearrange(value, "l (b t) m d -> l b t m d", b=b) for name, value in captured.items()}
        return rearrange(y, "(b t) m d -> b t m d", b=b), captured


def learned_latents(module: nn.Module, config: ResamplerConfig) -> jax.Array:
    """The parameter `latents` of a module: (m d) in its dtype."""
    init = nn.with_logical_partitioning(normal_init(1.0), (None, "embed"))
    shape = (config.num_latents, config.hidden_size)
    return module.param("latents", init, shape, jnp.float32).astype(module.dtype)


def with_times(module: nn.Module, config: ResamplerConfig, x: jax.Array) -> jax.Array:
    """x (b t f v d) with the time embeddings of frames and pictures that the config has: parameters of the module.

    Raises:
      UserError: more frames or pictures than there are embeddings.
    """
    t, f = x.shape[1:3]
    if config.max_frames:
        x = x + _embedding(module, config, "frame_embedding", config.max_frames, f, "frames")[:, None]
    if config.max_media:
        x = x + _embedding(module, config, "media_embedding", config.max_media, t, "pictures")[:, None, None]
    return x


def _embedding(module: nn.Module, config: ResamplerConfig, name: str, rows: int, needed: int, what: str) -> jax.Array:
    """The first `needed` rows of a time embedding, (needed d)."""
    if needed > rows:
        raise UserError(f"{needed} {what} were given, but the resampler has time embeddings for {rows}")
    init = nn.with_logical_partitioning(normal_init(1.0), (None, "embed"))
    table = module.param(name, init, (rows, config.hidden_size), jnp.float32)
    return table[:needed].astype(module.dtype)
