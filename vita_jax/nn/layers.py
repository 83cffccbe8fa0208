"""Thin Linen shells: they own parameters, names and logical axes, and call plain array functions for the maths.

Every kernel keeps its natural shape (for example `embed, q_heads, head_dim`), so that a sharding rule can name each
dimension and a weight table only has to reshape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.ops.embedding import lookup
from vita_jax.ops.int8 import scaled_product

Initializer = Callable[..., jax.Array]


def normal_init(stddev: float) -> Initializer:
    """N(0, stddev), the initialisation of the language models (`initializer_range`)."""
    return nn.initializers.normal(stddev)


def torch_linear_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what `torch.nn.Linear` and `torch.nn.Conv2d` draw for weight and bias."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# Leaves that a low-rank update (LoRA) has beside the kernel it changes; see `vita_jax.models.lora`.
LORA_DOWN, LORA_UP, LORA_SCALE = "lora_a", "lora_b", "lora_scale"


# A leaf beside a kernel in int8: the scale of each output, float32; see `vita_jax.models.int8`.
KERNEL_SCALE = "kernel_scale"


def kernel_scale(module: nn.Module, kernel: jax.Array) -> jax.Array | None:
    """The scales (*experts *outputs) of a module's kernel if it is int8, else None.

    Like low-rank updates, modules never make this leaf themselves.

    Raises:
      UserError: an int8 kernel without scales.
    """
    if kernel.dtype != jnp.int8:
        return None
    if not module.has_variable("params", KERNEL_SCALE):
        place = "/".join((*module.path, "kernel"))
        raise UserError(f"{place} is int8 but has no {KERNEL_SCALE} beside it; quantize the weights again")
    return module.get_variable("params", KERNEL_SCALE)


def low_rank_factors(module: nn.Module) -> tuple[jax.Array, jax.Array] | None:
    """The low-rank update of a module's kernel, if its parameters hold one.

    Modules never make these leaves themselves, so a model without LoRA has the tree it always had.

    Returns:
      `lora_a` (*experts *inputs r), and `lora_b` (*experts r *features) times `lora_scale` (*experts), in the compute
      dtype; or None.
    """
    if not module.has_variable("params", LORA_DOWN):
        return None
    down, up, scale = (module.get_variable("params", name) for name in (LORA_DOWN, LORA_UP, LORA_SCALE))
    up = up * scale.reshape(scale.shape + (1,) * (up.ndim - scale.ndim))
    return down.astype(module.dtype), up.astype(module.dtype)


class Dense(nn.Module):
    """`y = x @ kernel + bias` over any number of input and output axes; plus a low-rank update if there is one.

    The kernel may be int8, with its scales beside it.

    Attributes:
      features: sizes of the output axes.
      axes: logical names of the kernel's axes, input axes first; None for an axis that is never sharded.
      num_input_axes: how many trailing axes of `x` are contracted.
      use_bias: adds a bias of shape `features`.
      kernel_init: None draws torch's default for linear layers.
      dtype: compute dtype; parameters are float32.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_input_axes: int = 1
    use_bias: bool = True
    kernel_init: Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (... *inputs) -> (... *features)."""
        inputs = x.shape[x.ndim - self.num_input_axes :]
        fan_in = 1
        for size in inputs:
            fan_in *= size
        kernel_init = self.kernel_init or torch_linear_uniform(fan_in)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(kernel_init, self.axes),
            (*inputs, *self.features),
            jnp.float32,
        )
        scale = kernel_scale(self, kernel)
        if scale is None:
            y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), self.num_input_axes)
        else:
            y = scaled_product(x, kernel, scale, self.num_input_axes, self.dtype)
        if factors := low_rank_factors(self):
            down, up = factors
            y = y + jnp.tensordot(jnp.tensordot(x.astype(self.dtype), down, self.num_input_axes), up, 1)
        if self.use_bias:
            bias_init = torch_linear_uniform(fan_in) if self.kernel_init is None else nn.initializers.zeros_init()
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(bias_init, self.axes[self.num_input_axes :]),
                self.features,
                jnp.float32,
            )
            y = y + bias.astype(self.dtype)
        return y


class Embed(nn.Module):
    """Token table `embedding` (v d), looked up by id."""

    num_embeddings: int
    features: int
    init_stddev: float = 0.02
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(normal_init(self.init_stddev), ("vocab", "embed")),
            (self.num_embeddings, self.features),
            jnp.float32,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens: (b s) int32, each in [0, v) -> (b s d)."""
        table_axes = nn.logical_to_mesh_axes(("vocab", "embed"))
        token_axes = nn.logical_to_mesh_axes(("batch", "length"))
        return lookup(self.embedding, tokens, self.dtype, table_axes=table_axes, token_axes=token_axes)


class LayerNorm(nn.Module):
    """Layer norm over the last axis; statistics in float32, biased variance."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (... d) -> (... d)."""
        size = x.shape[-1]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)), (size,), jnp.float32
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",)), (size,), jnp.float32
        )
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, axis=-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: float32 statistics, cast to the compute dtype, then the weight."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (... d) -> (... d)."""
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)), (x.shape[-1],), jnp.float32
        )
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale.astype(self.dtype)
