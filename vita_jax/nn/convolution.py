"""Convolution shells: parameters and weight norm around `vita_jax.ops.convolution`.

Weight norm (arXiv 1602.07868) stores a kernel as direction `kernel_v` and length `kernel_g`; folding them gives the
plain `kernel`. Both forms are published, so both are parameters here: a module built with `weight_norm=True` has
`kernel_v` and `kernel_g`, one without has `kernel`; `fold_weight_norm` and `split_weight_norm` go between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.ops.convolution import conv1d, conv2d, conv_transpose1d

INPUT_AXIS, OUTPUT_AXIS = -2, -1


def weight_norm(v: jax.Array, g: jax.Array) -> jax.Array:
    """`g * v / |v|`; the norm runs over the axes that `g` has at size 1. v: (k c o), g: (1 1 o) or (1 c 1)."""
    return v * (g / kernel_norm(v, g.shape))


def kernel_norm(kernel: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Length of a kernel over the axes that `shape` has at size 1; the result has that shape."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=axes, keepdims=True))


def fold_weight_norm(params: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter tree with every `kernel_v`, `kernel_g` replaced by the `kernel` they stand for."""
    folded = {name: fold_weight_norm(x) if isinstance(x, Mapping) else x for name, x in params.items()}
    if "kernel_v" in folded:
        folded["kernel"] = weight_norm(folded.pop("kernel_v"), folded.pop("kernel_g"))
    return folded


def split_weight_norm(params: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `fold_weight_norm`: direction and length for the kernels that have them in `like`.

    Args:
      params: folded parameters.
      like: a tree of arrays or shapes in the wanted form, such as `jax.eval_shape` of the model's `init`.
    """
    split: dict[str, Any] = {}
    for name, want in like.items():
        if isinstance(want, Mapping):
            split[name] = split_weight_norm(params[name], want)
        elif name == "kernel_v":
            split[name] = params["kernel"]
        elif name == "kernel_g":
            split[name] = kernel_norm(params["kernel"], want.shape)
        else:
            split[name] = params[name]
    return split


class Conv(nn.Module):
    """One- or two-dimensional convolution, or a transposed one-dimensional one.

    Attributes:
      features: o.
      kernel_size: taps, (k,) or (k_t, k_f).
      stride: along time, or along frequency in two dimensions.
      padding: zeros on both sides, one number per dimension.
      dilation: along time.
      groups: in one dimension only.
      transposed: in one dimension only; `padding` is then cut off.
      weight_norm: stores direction and length. The length is per output channel, per input channel if transposed.
      init_stddev: draws the kernel from N(0, stddev); None draws it as torch does.
    """

    features: int
    kernel_size: tuple[int, ...]
    stride: int = 1
    padding: tuple[int, ...] = (0,)
    dilation: int = 1
    groups: int = 1
    use_bias: bool = True
    transposed: bool = False
    weight_norm: bool = True
    init_stddev: float | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b t c) or (b t f c) -> (b t' o) or (b t' f' o)."""
        kernel = self._kernel((*self.kernel_size, x.shape[-1] // self.groups, self.features)).astype(self.dtype)
        bias = None
        if self.use_bias:
            init = uniform_init(self._fan_in(x.shape[-1]))
            axes = (self._output_name(),)
            bias = self.param("bias", nn.with_logical_partitioning(init, axes), (self.features,), jnp.float32)
            bias = bias.astype(self.dtype)
        x = x.astype(self.dtype)
        if self.transposed:
            return conv_transpose1d(x, kernel, bias, stride=self.stride, padding=self.padding[0])
        if len(self.kernel_size) == 2:
            return conv2d(x, kernel, bias, stride=self.stride, padding=self.padding, dilation=self.dilation)
        return conv1d(
            x,
            kernel,
            bias,
            stride=self.stride,
            padding=self.padding[0],
            dilation=self.dilation,
            groups=self.groups,
        )

    def _output_name(self) -> str | None:
        return "embed" if self.features > 1 else None  # a single channel cannot be cut

    def _fan_in(self, inputs: int) -> int:
        # Torch counts the second axis of its weight, which is the output axis of a transposed convolution.
        size = self.features if self.transposed else inputs // self.groups
        for taps in self.kernel_size:
            size *= taps
        return size

    def _kernel(self, shape: tuple[int, ...]) -> jax.Array:
        if self.init_stddev is None:
            init = uniform_init(self._fan_in(shape[INPUT_AXIS] * self.groups))
        else:
            init = nn.initializers.normal(self.init_stddev)
        axes = (*(None,) * (len(shape) - 1), self._output_name())
        name = "kernel_v" if self.weight_norm else "kernel"
        kernel = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        if not self.weight_norm:
            return kernel
        kept = (INPUT_AXIS if self.transposed else OUTPUT_AXIS) % len(shape)
        g_shape = tuple(size if axis == kept else 1 for axis, size in enumerate(shape))
        g_axes = tuple(name if axis == kept else None for axis, name in enumerate(axes))
        g = self.param("kernel_g", nn.with_logical_partitioning(lambda _: kernel_norm(kernel, g_shape), g_axes))
        return weight_norm(kernel, g)


def uniform_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what torch draws by default."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class GroupNorm(nn.Module):
    """Normalises groups of channels over the whole time; float32 statistics, biased variance.

    Attributes:
      group_size: channels per group.
    """

    group_size: int
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inside: jax.Array | None = None) -> jax.Array:
        """x: (b t c) -> (b t c); `inside` (b t 1) bool leaves padding, which must be zero, out of the statistics."""
        b, t, channels = x.shape
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("embed",)), (channels,), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(zeros, ("embed",)), (channels,), jnp.float32)
        grouped = x.astype(jnp.float32).reshape(b, t, -1, self.group_size)
        real = None if inside is None else inside[..., None]
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True, where=real)
        centred = grouped - mean
        variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True, where=real)
        normed = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(b, t, channels)
        return (normed * scale + bias).astype(self.dtype)
