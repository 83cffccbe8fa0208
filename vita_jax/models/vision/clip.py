"""CLIP's vision transformer (Radford et al. 2021), the tower of LLaVA and open Flamingo and an option of VITA's.

A class token in front, a norm before the first layer and quick GELU. LLaVA reads the hidden state before the last layer
without the class token, Flamingo the one after it. Images must have the configured size.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.models.vision.encoder import Encoder, ViTConfig, check_image_size
from vita_jax.nn.layers import Dense, LayerNorm, normal_init
from vita_jax.ops.patches import cut_patches
from vita_jax.ops.resize import resize_grid

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_vit_large_224px() -> ViTConfig:
    """CLIP ViT-L/14 at 224 pixels."""
    return ViTConfig(1024, 24, 16, 4096, 224, 14, hidden_act="quick_gelu", layer_norm_eps=1e-5)


def clip_vit_large_336px() -> ViTConfig:
    """CLIP ViT-L/14 at 336 pixels."""
    return ViTConfig(1024, 24, 16, 4096, 336, 14, hidden_act="quick_gelu", layer_norm_eps=1e-5)


class ClipEmbeddings(nn.Module):
    """Patches without bias, the class token in front, and positions."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """pixel_values: (b height width c) -> (b 1+p d)."""
        config = self.config
        size = config.hidden_size
        class_embedding = self.param(
            "class_embedding", nn.with_logical_partitioning(normal_init(size**-0.5), ("embed",)), (size,), jnp.float32
        )
        position_embedding = self.param(
            "position_embedding",
            nn.with_logical_partitioning(normal_init(0.02), (None, "embed")),
            (1 + config.num_patches, size),
            jnp.float32,
        )
        patches = Dense(
            (size,),
            axes=("patch", None, None, "embed"),
            num_input_axes=3,
            use_bias=False,
            dtype=self.dtype,
            name="patch_embed",
        )(cut_patches(pixel_values, config.patch_size))
        patches = rearrange(patches, "b r q d -> b (r q) d")
        first = jnp.broadcast_to(class_embedding.astype(self.dtype), (patches.shape[0], 1, size))
        return jnp.concatenate([first, patches], axis=1) + position_embedding.astype(self.dtype)


class ClipVision(nn.Module):
    """The tower; parameters `embeddings`, `pre_norm`, `encoder/layers`, `post_norm`, and `projection` if it has one."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array, select_layer: int = -2, capture: bool = False) -> dict[str, jax.Array]:
        """Runs the tower.

        Args:
          pixel_values: (b image_size image_size c) float, normalised.
          select_layer: which hidden state to return as `selected`; 0 is the normed embeddings.
          capture: also return intermediates.

        Returns:
          `selected` and `last_hidden_state` (b 1+p d), `pooler_output` (b d); `image_embeds` (b e), e the
          `projection_size`, if there is one. With `capture` also `embeddings` (before the norm) and, stacked,
          `hidden_states` (l+1 b 1+p d), `self_attn` and `mlp` (l b 1+p d).

        Raises:
          UserError: images of another size, or no such layer.
        """
        config = self.config
        check_image_size(pixel_values, config)
        embeddings = ClipEmbeddings(config, self.dtype, name="embeddings")(pixel_values)
        x = LayerNorm(config.layer_norm_eps, self.dtype, name="pre_norm")(embeddings)
        last, selected, captured = Encoder(config, self.dtype, name="encoder")(x, select_layer, capture)
        pooled = LayerNorm(config.layer_norm_eps, self.dtype, name="post_norm")(last[:, 0])
        out = {"selected": selected, "last_hidden_state": last, "pooler_output": pooled}
        if config.projection_size:
            project = Dense(
                (config.projection_size,), axes=("embed", None), use_bias=False, dtype=self.dtype, name="projection"
            )
            out["image_embeds"] = project(pooled)
        return out | captured | ({"embeddings": embeddings} if capture else {})


def resize_positions(positions: jax.Array, num_patches: int) -> jax.Array:
    """Position embeddings for pictures of another size: those of the patches resized as a square grid, bicubically.

    positions: (1+p d), the class token's first -> (1+num_patches d).

    Raises:
      UserError: one of the two grids is no square.
    """
    sides = [math.isqrt(count) for count in (len(positions) - 1, num_patches)]
    for side, count in zip(sides, (len(positions) - 1, num_patches), strict=True):
        if side * side != count:
            raise UserError(f"{count} patches are no square grid, so their positions cannot be resized")
    first, grid = positions[:1], positions[1:].reshape(sides[0], sides[0], -1)
    resized = resize_grid(grid, (sides[1], sides[1])).reshape(num_patches, -1)
    return jnp.concatenate([first, resized])


def select_feature(hidden: jax.Array, feature: str = "patch") -> jax.Array:
    """LLaVA's `mm_vision_select_feature`: "patch" drops the class token, "cls_patch" keeps it.

    hidden: (b 1+p d) -> (b p d) or (b 1+p d).

    Raises:
      UserError: another name.
    """
    if feature == "patch":
        return hidden[:, 1:]
    if feature == "cls_patch":
        return hidden
    raise UserError(f"select_feature {feature!r} is unknown; use 'patch' or 'cls_patch'")
