"""The pre-norm transformer stack that CLIP's and SigLIP's vision towers share.

Axes: b images, s tokens, d width, n heads, h head width, f hidden width, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.activations import activation
from vita_jax.ops.attention import dot_product_attention


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a square-image tower with learned positions; `hidden_act` is a name in `ops/activations.py`.

    `projection_size` is the width of the space that CLIP's images and texts share, 0 for a tower without that matrix.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    num_channels: int = 3
    projection_size: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(f"vision: hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def check_image_size(pixel_values: jax.Array, config: ViTConfig) -> None:
    """Raises UserError unless images (b height width c) have the configured size; positions are not resized."""
    size = pixel_values.shape[1:3]
    if size != (config.image_size, config.image_size):
        raise UserError(f"images are {size[0]}x{size[1]}, but this tower reads {config.image_size}x{config.image_size}")


class SelfAttention(nn.Module):
    """Full self-attention with separate q, k and v projections, all with bias."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b s d) -> (b s d)."""
        heads = (self.config.num_heads, self.config.head_dim)
        q, k, v = (
            Dense(heads, axes=("embed", "q_heads", "head_dim"), dtype=self.dtype, name=name)(x)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = dot_product_attention(q, k, v)
        return Dense(
            (self.config.hidden_size,),
            axes=("q_heads", "head_dim", "embed"),
            num_input_axes=2,
            dtype=self.dtype,
            name="o_proj",
        )(out)


class Mlp(nn.Module):
    """Two linear layers with the configured activation between them."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (... d) -> (... d)."""
        x = Dense((self.config.intermediate_size,), axes=("embed", "mlp"), dtype=self.dtype, name="fc1")(x)
        x = activation(self.config.hidden_act)(x)
        return Dense((self.config.hidden_size,), axes=("mlp", "embed"), dtype=self.dtype, name="fc2")(x)


class EncoderBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); also carries the hidden state of the selected layer."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    select: int = 0
    capture: bool = False

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], layer: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        """carry: (x, selected), both (b s d); layer: scalar index, 0 for the first."""
        x, selected = carry
        # Pictures stay with the devices that hold their rows; weights come to them.
        x = nn.with_logical_constraint(x, ("batch", None, None))
        config = self.config
        attn = SelfAttention(config, self.dtype, name="attention")(
            LayerNorm(config.layer_norm_eps, self.dtype, name="norm1")(x)
        )
        x = x + attn
        mlp = Mlp(config, self.dtype, name="mlp")(LayerNorm(config.layer_norm_eps, self.dtype, name="norm2")(x))
        x = x + mlp
        selected = jnp.where(layer + 1 == self.select, x, selected)
        return (x, selected), ({"self_attn": attn, "mlp": mlp, "output": x} if self.capture else {})


class Encoder(nn.Module):
    """All blocks, scanned; parameters are stacked over layers."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, select_layer: int, capture: bool = False
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Runs the stack.

        Args:
          x: (b s d).
          select_layer: index into the l+1 hidden states, the first being `x`; negative counts from the end.
          capture: also return intermediates.

        Returns:
          last hidden state (b s d), selected hidden state (b s d), and with `capture` a dict of stacked `hidden_states`
          (l+1 b s d), `self_attn` and `mlp` (l b s d), else an empty one.

        Raises:
          UserError: no such layer.
        """
        num_layers = self.config.num_layers
        if not -num_layers - 1 <= select_layer <= num_layers:
            raise UserError(f"layer {select_layer} cannot be selected from {num_layers + 1} hidden states")
        layers = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        block = layers(self.config, self.dtype, select_layer % (num_layers + 1), capture, name="layers")
        (last, selected), captured = block((x, x), jnp.arange(num_layers))
        if capture:
            captured = dict(captured)
            captured["hidden_states"] = jnp.concatenate([x[None], captured.pop("output")])
        return last, selected, captured
