"""SigLIP's vision transformer (Zhai et al. 2023) and the multi-scale wrapper S2 (Shi et al. 2024), options of VITA's
tower.

No class token, no norm before the first layer, tanh GELU. VITA reads the hidden state before the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.models.vision.encoder import Encoder, Mlp, ViTConfig, check_image_size
from vita_jax.nn.layers import Dense, LayerNorm, normal_init
from vita_jax.ops.attention import dot_product_attention
from vita_jax.ops.patches import cut_patches
from vita_jax.ops.resize import area_matrix, bicubic_matrix, resize_grid

DEFAULT_S2_SCALES = (384, 768, 1152)


def siglip_so400m_384px() -> ViTConfig:
    """SigLIP so400m, patch 14, at 384 pixels."""
    return ViTConfig(1152, 27, 16, 4304, 384, 14, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)


class SiglipEmbeddings(nn.Module):
    """Patches with bias, and positions."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """pixel_values: (b height width c) -> (b p d)."""
        config = self.config
        position_embedding = self.param(
            "position_embedding",
            nn.with_logical_partitioning(normal_init(config.hidden_size**-0.5), (None, "embed")),
            (config.num_patches, config.hidden_size),
            jnp.float32,
        )
        patches = Dense(
            (config.hidden_size,),
            axes=("patch", None, None, "embed"),
            num_input_axes=3,
            dtype=self.dtype,
            name="patch_embed",
        )(cut_patches(pixel_values, config.patch_size))
        return rearrange(patches, "b r q d -> b (r q) d") + position_embedding.astype(self.dtype)


class AttentionPooling(nn.Module):
    """One learned query attends to all tokens, followed by a residual MLP. VITA does not use its output."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b p d) -> (b d)."""
        config = self.config
        size, heads = config.hidden_size, (config.num_heads, config.head_dim)
        probe = self.param(
            "probe", nn.with_logical_partitioning(normal_init(1.0), (None, None, "embed")), (1, 1, size), jnp.float32
        )
        query = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, size))
        # One kernel for q, k and v, as in the checkpoint: q of the probe, k and v of the tokens.
        project = Dense((3, *heads), axes=("embed", None, "q_heads", "head_dim"), dtype=self.dtype, name="qkv")
        q, kv = project(query)[:, :, 0], project(x)
        pooled = Dense(
            (size,), axes=("q_heads", "head_dim", "embed"), num_input_axes=2, dtype=self.dtype, name="o_proj"
        )(dot_product_attention(q, kv[:, :, 1], kv[:, :, 2]))
        normed = LayerNorm(config.layer_norm_eps, self.dtype, name="norm")(pooled)
        return (pooled + Mlp(config, self.dtype, name="mlp")(normed))[:, 0]


class SiglipVision(nn.Module):
    """The tower; parameters `embeddings`, `encoder/layers`, `post_norm`, `pooling`."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array, select_layer: int = -2, capture: bool = False) -> dict[str, jax.Array]:
        """Runs the tower.

        Args:
          pixel_values: (b image_size image_size c) float, normalised.
          select_layer: which hidden state to return as `selected`; 0 is the embeddings.
          capture: also return intermediates.

        Returns:
          `selected` and `last_hidden_state` (b p d), the latter after the final norm, `pooler_output` (b d). With
          `capture` also, stacked, `hidden_states` (l+1 b p d), `self_attn` and `mlp` (l b p d).

        Raises:
          UserError: images of another size, or no such layer.
        """
        config = self.config
        check_image_size(pixel_values, config)
        x = SiglipEmbeddings(config, self.dtype, name="embeddings")(pixel_values)
        last, selected, captured = Encoder(config, self.dtype, name="encoder")(x, select_layer, capture)
        last = LayerNorm(config.layer_norm_eps, self.dtype, name="post_norm")(last)
        pooled = AttentionPooling(config, self.dtype, name="pooling")(last)
        return {"selected": selected, "last_hidden_state": last, "pooler_output": pooled} | captured


def s2_features(
    tower: Callable[[jax.Array], jax.Array], pixel_values: jax.Array, scales: Sequence[int] = DEFAULT_S2_SCALES
) -> jax.Array:
    """Reads an image at several scales, in tiles of the smallest, and joins the features on channels.

    Follows `vita/util/s2wrapper/`: larger scales are cut into tiles, encoded, stitched and averaged down to the
    smallest map.

    Args:
      tower: (b s s c) -> (b p d) for the smallest scale `s`.
      pixel_values: (b height width c), height == width.
      scales: sides in pixels, in any order; every one a multiple of the smallest.

    Returns:
      (b p d*len(scales)), channels in ascending order of scale.

    Raises:
      UserError: an image that is not square, or a scale that does not divide.
    """
    height, width = pixel_values.shape[1:3]
    if height != width:
        raise UserError(f"multi-scale features need square images, got {height}x{width}")
    scales = sorted(scales)
    maps: list[jax.Array] = []
    for scale in scales:
        if scale % scales[0]:
            raise UserError(f"S2 scale {scale} is not a multiple of the smallest scale {scales[0]}")
        n = scale // scales[0]
        resized = resize_grid(pixel_values.astype(jnp.float32), (scale, scale), bicubic_matrix)
        tiles = rearrange(resized.astype(pixel_values.dtype), "b (r y) (q x) c -> (r q b) y x c", r=n, q=n)
        features = tower(tiles)
        side = int(features.shape[1] ** 0.5 + 0.5)
        stitched = rearrange(features, "(r q b) (y x) d -> b (r y) (q x) d", r=n, q=n, y=side)
        maps.append(resize_grid(stitched, maps[0].shape[1:3] if maps else (side, side), area_matrix))
    return rearrange(jnp.concatenate(maps, axis=-1), "b y x d -> b (y x) d")
