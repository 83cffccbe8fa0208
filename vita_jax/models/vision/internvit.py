"""InternViT, the vision tower of VITA (Chen et al. 2023, "InternVL"; `vita/model/multimodal_encoder/internvit/`).

A plain vision transformer with layer scale and drop path; no final norm. VITA takes the last hidden state, drops the
class token, halves it and merges 2x2 patches into one token (`vita_tower_features`).

Axes: b tiles, s = 1 + p tokens (the class token first, then the patches row by row), d width, n heads, h head width,
l layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense, LayerNorm, RMSNorm, normal_init
from vita_jax.ops.activations import activation
from vita_jax.ops.attention import dot_product_attention
from vita_jax.ops.patches import cut_patches
from vita_jax.ops.pixel_shuffle import pixel_shuffle
from vita_jax.ops.resize import bicubic_matrix, resize_grid

# The factor of the pixel shuffle, which the original also multiplies the features by; released projectors expect it.
TOWER_FEATURE_SCALE = 0.5


@dataclass(frozen=True)
class InternViTConfig:
    """Sizes and switches of the tower.

    Attributes:
      layer_scale_init: first value of both layer scales (`initializer_factor` in public configs).
      drop_path_rate: rate of the last layer; it grows linearly from 0 at the first.
      embedding_init_stddev: of the class and position embeddings of a fresh model. 1.0 is the original's; a small tower
        trained from scratch learns faster with 0.02.
      remat: "none", or "full" to recompute each layer in the backward pass.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_type: str = "layer_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_normalization: bool = False
    layer_scale_init: float = 1.0
    drop_path_rate: float = 0.0
    num_channels: int = 3
    hidden_act: str = "gelu"
    embedding_init_stddev: float = 1.0
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(f"vision: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise UserError(f"vision: norm_type {self.norm_type!r} is unknown; use 'layer_norm' or 'rms_norm'")
        if self.remat not in ("none", "full"):
            raise UserError(f"vision: remat {self.remat!r} is unknown; use 'none' or 'full'")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise UserError(f"vision: drop_path_rate {self.drop_path_rate} is not in [0, 1)")
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one tile after merging 2x2 patches."""
        return (self.grid_side // 2) ** 2

    @property
    def output_size(self) -> int:
        """Width of a merged token."""
        return 4 * self.hidden_size


def internvit_300m_448px() -> InternViTConfig:
    """InternViT-300M-448px, the tower of VITA-1.0 and VITA-1.5."""
    return InternViTConfig(1024, 24, 16, 4096, 448, 14, drop_path_rate=0.1)


def internvit_6b_448px() -> InternViTConfig:
    """InternViT-6B-448px-V1-5."""
    return InternViTConfig(
        3200,
        45,
        25,
        12800,
        448,
        14,
        norm_type="rms_norm",
        qkv_bias=False,
        qk_normalization=True,
        layer_scale_init=0.1,
    )


def interpolate_positions(position_embedding: jax.Array, native_side: int, grid: tuple[int, int]) -> jax.Array:
    """Resizes the patch rows of a position table with torch's bicubic rule; the class row stays.

    Args:
      position_embedding: (1 1+native_side**2 d).
      native_side: rows and columns of the grid the table was made for.
      grid: rows and columns wanted; need not be square.

    Returns:
      (1 1+grid[0]*grid[1] d); the table itself at its native size.
    """
    if grid == (native_side, native_side):
        return position_embedding
    patches = rearrange(position_embedding[:, 1:], "b (r q) d -> b r q d", r=native_side)
    patches = rearrange(resize_grid(patches, grid, bicubic_matrix), "b r q d -> b (r q) d")
    return jnp.concatenate([position_embedding[:, :1], patches], axis=1)


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Stochastic depth: zeroes the branch of a whole sample with probability `rate`, else divides by 1 - rate.

    x: (b ...); rate: scalar in [0, 1) -> (b ...).
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros_like(x))


class Embeddings(nn.Module):
    """Patches, the class token in front, and positions."""

    config: InternViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """pixel_values: (b height width c) -> (b s d)."""
        config = self.config
        init = normal_init(config.embedding_init_stddev)
        class_embedding = self.param(
            "class_embedding",
            nn.with_logical_partitioning(init, (None, None, "embed")),
            (1, 1, config.hidden_size),
            jnp.float32,
        )
        position_embedding = self.param(
            "position_embedding",
            nn.with_logical_partitioning(init, (None, None, "embed")),
            (1, 1 + config.grid_side**2, config.hidden_size),
            jnp.float32,
        )
        patches = Dense(
            (config.hidden_size,),
            axes=("patch", None, None, "embed"),
            num_input_axes=3,
            dtype=self.dtype,
            name="patch_embed",
        )(cut_patches(pixel_values, config.patch_size))
        grid = patches.shape[1:3]
        patches = rearrange(patches, "b r q d -> b (r q) d")
        first = jnp.broadcast_to(class_embedding.astype(self.dtype), (patches.shape[0], 1, config.hidden_size))
        positions = interpolate_positions(position_embedding, config.grid_side, grid)
        return jnp.concatenate([first, patches], axis=1) + positions.astype(self.dtype)


class Attention(nn.Module):
    """Full self-attention; with `qk_normalization` q and k are normalised over all heads together before the split."""

    config: InternViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: (b s d) -> (b s d), and intermediates by name."""
        config = self.config
        qkv = Dense(
            (3, config.num_heads, config.head_dim),
            axes=("embed", None, "q_heads", "head_dim"),
            use_bias=config.qkv_bias,
            dtype=self.dtype,
            name="qkv",
        )(x)
        captured = {"attn.qkv": rearrange(qkv, "b s c n h -> b s (c n h)")}
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if config.qk_normalization:
            merged = {"q_norm": rearrange(q, "b s n h -> b s (n h)"), "k_norm": rearrange(k, "b s n h -> b s (n h)")}
            normed = {name: RMSNorm(config.layer_norm_eps, self.dtype, name=name)(y) for name, y in merged.items()}
            captured |= {f"attn.{name}": y for name, y in normed.items()}
            q, k = (rearrange(y, "b s (n h) -> b s n h", n=config.num_heads) for y in normed.values())
        out = Dense(
            (config.hidden_size,),
            axes=("q_heads", "head_dim", "embed"),
            num_input_axes=2,
            dtype=self.dtype,
            name="o_proj",
        )(dot_product_attention(q, k, v))
        return out, captured | {"attn": out}


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    hidden_size: int
    intermediate_size: int
    hidden_act: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b s d) -> (b s d)."""
        x = Dense((self.intermediate_size,), axes=("embed", "mlp"), dtype=self.dtype, name="fc1")(x)
        x = activation(self.hidden_act)(x)
        return Dense((self.hidden_size,), axes=("mlp", "embed"), dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """x + drop(ls1 * attention(norm1(x))), then the same with the MLP."""

    config: InternViTConfig
    dtype: jnp.dtype = jnp.float32
    deterministic: bool = True
    capture: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x: (b s d), drop_rate: scalar -> (b s d), and intermediates by name (none without `capture`)."""
        config = self.config
        # Tiles stay with the devices that hold their rows; weights come to them.
        x = nn.with_logical_constraint(x, ("batch", None, None))
        norm1 = self._norm("norm1")(x)
        attn, captured = Attention(config, self.dtype, name="attention")(norm1)
        x = x + self._branch("ls1", attn, drop_rate)
        norm2 = self._norm("norm2")(x)
        mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act, self.dtype, name="mlp")(norm2)
        x = x + self._branch("ls2", mlp, drop_rate)
        if not self.capture:
            return x, {}
        return x, captured | {"norm1": norm1, "norm2": norm2, "mlp": mlp, "output": x}

    def _norm(self, name: str) -> nn.Module:
        norm = LayerNorm if self.config.norm_type == "layer_norm" else RMSNorm
        return norm(self.config.layer_norm_eps, self.dtype, name=name)

    def _branch(self, name: str, y: jax.Array, drop_rate: jax.Array) -> jax.Array:
        """Layer scale, then drop path."""
        init = nn.initializers.constant(self.config.layer_scale_init)
        scale = self.param(name, nn.with_logical_partitioning(init, ("embed",)), (y.shape[-1],), jnp.float32)
        y = y * scale.astype(self.dtype)
        if self.deterministic or self.config.drop_path_rate == 0.0:
            return y
        return drop_path(y, drop_rate, self.make_rng("dropout"))


class InternViT(nn.Module):
    """The tower; parameters `embeddings/...` and `layers/...`, the latter stacked over layers."""

    config: InternViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pixel_values: jax.Array, deterministic: bool = True, capture: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Runs all layers.

        Args:
          pixel_values: (b height width c) float, normalised. Other sizes than `image_size` interpolate the positions.
          deterministic: False applies drop path and needs an rng named "dropout".
          capture: also return intermediates.

        Returns:
          The last hidden state (b 1+p d), un-normalised. With `capture` also a dict: `hidden_states` (l+1 b s d), the
          first being the embeddings, and per layer, stacked, `norm1`, `attn.qkv`, `attn.q_norm`, `attn.k_norm` (where
          they exist), `attn`, `norm2`, `mlp`.
        """
        config = self.config
        embeddings = Embeddings(config, self.dtype, name="embeddings")(pixel_values)
        block = nn.remat(Block, prevent_cse=False) if config.remat == "full" else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        rates = jnp.asarray(np.linspace(0.0, config.drop_path_rate, config.num_layers), jnp.float32)
        x, captured = layers(config, self.dtype, deterministic, capture, name="layers")(embeddings, rates)
        if not capture:
            return x
        captured = dict(captured)
        captured["hidden_states"] = jnp.concatenate([embeddings[None], captured.pop("output")])
        return x, captured


def vita_tower_features(last_hidden: jax.Array) -> jax.Array:
    """What VITA's projector reads: class token dropped, halved, 2x2 patches merged into one token.

    last_hidden: (b 1+p d), p a square of an even number -> (b p/4 4d).

    Raises:
      UserError: p is no square, or its root is odd.
    """
    num_patches = last_hidden.shape[1] - 1
    side = int(num_patches**0.5 + 0.5)
    if side * side != num_patches:
        raise UserError(f"{num_patches} patches are not a square grid; the tower reads square tiles")
    grid = rearrange(last_hidden[:, 1:] * TOWER_FEATURE_SCALE, "b (r q) d -> b r q d", r=side)
    return rearrange(pixel_shuffle(grid), "b r q d -> b (r q) d")
