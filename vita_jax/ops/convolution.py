"""Convolutions over time without input dilation in either direction of differentiation.

A strided convolution is written as space-to-depth and a convolution of stride 1, a transposed one as a matrix product
and depth-to-space (the sub-pixel form), on CPUs a grouped one as one convolution per group. All equal the direct forms
number by number; but in the direct ones, XLA dilates the input with zeros, forwards or backwards, or falls back to slow
kernels, and takes up to ten times as long on CPU. On accelerators a grouped one is direct, since convolutions per group
take XLA's TPU compiler minutes and gigabytes, and one of a single channel, whose kernel's gradient does the same to it,
is a product with the taps as channels. Kernels keep the layout of the published weights, axes transposed.

Axes: b batch, t time, c input channels, o output channels, k taps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError

DIMENSIONS = ("NWC", "WIO", "NWC")
DIMENSIONS_2D = ("NHWC", "HWIO", "NHWC")


def output_length(length: int, taps: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Samples that a convolution of `length` samples gives."""
    return (length + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def transposed_length(length: int, taps: int, stride: int, padding: int) -> int:
    """Samples that a transposed convolution of `length` samples gives."""
    return (length - 1) * stride - 2 * padding + taps


def conv1d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> jax.Array:
    """`y[n] = sum_j x[n * stride + j * dilation - padding] @ kernel[j] + bias`, zeros outside of `x`.

    Args:
      x: (b t c).
      kernel: (k c/groups o).
      bias: (o,) or None.

    Returns:
      (b t' o), t' = `output_length(...)`.

    Raises:
      UserError: both a stride and a dilation, which no model here has, or an input too short for one output.
    """
    taps = kernel.shape[0]
    length = output_length(x.shape[1], taps, stride, padding, dilation)
    if length < 1:
        needed = dilation * (taps - 1) + 1 - 2 * padding
        raise UserError(f"a convolution of {taps} taps needs at least {needed} samples, got {x.shape[1]}; give more")
    if stride > 1 and dilation > 1:
        raise UserError(f"a convolution cannot have stride {stride} and dilation {dilation}; one must be 1")
    if groups > 1:

        def per_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
            pairs = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
            parts = [conv1d(a, b, stride=stride, padding=padding, dilation=dilation) for a, b in pairs]
            return jnp.concatenate(parts, axis=-1)

        direct = functools.partial(_direct, stride=stride, padding=padding, dilation=dilation, groups=groups)
        y = jax.lax.platform_dependent(x, kernel, cpu=per_group, default=direct)
        return y if bias is None else y + bias
    if stride > 1:
        x, kernel = _space_to_depth(x, kernel, length, stride, padding)
        padding = 0
    direct = functools.partial(_direct, padding=padding, dilation=dilation)
    if x.shape[-1] == 1 and dilation == 1:
        product = functools.partial(_single_channel, padding=padding)
        y = jax.lax.platform_dependent(x, kernel, cpu=direct, default=product)
    else:
        y = direct(x, kernel)
    return y if bias is None else y + bias


def _direct(
    x: jax.Array, kernel: jax.Array, *, padding: int, dilation: int, stride: int = 1, groups: int = 1
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,),
        padding=[(padding, padding)],
        rhs_dilation=(dilation,),
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def _single_channel(x: jax.Array, kernel: jax.Array, *, padding: int) -> jax.Array:
    """A convolution of stride 1 of (b t 1) by (k 1 o): the k neighbours of every sample become its channels."""
    taps = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))
    length = x.shape[1] - taps + 1
    neighbours = jnp.concatenate([x[:, j : j + length] for j in range(taps)], axis=-1)
    return jnp.einsum("btk,ko->bto", neighbours, kernel[:, 0])


def _space_to_depth(
    x: jax.Array, kernel: jax.Array, length: int, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """Input and kernel of the stride-1 convolution that gives `length` outputs; samples of one step become channels."""
    taps, _, outputs = kernel.shape
    steps = -(-taps // stride)
    span = (length + steps - 1) * stride
    x = jnp.pad(x, ((0, 0), (padding, max(0, span - padding - x.shape[1])), (0, 0)))[:, :span]
    b, _, channels = x.shape
    x = x.reshape(b, -1, stride * channels)
    kernel = jnp.pad(kernel, ((0, steps * stride - taps), (0, 0), (0, 0)))
    return x, kernel.reshape(steps, -1, outputs)


def conv_transpose1d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, stride: int, padding: int
) -> jax.Array:
    """`y[m] = sum over n * stride + j - padding = m of x[n] @ kernel[j] + bias`.

    Args:
      x: (b t c).
      kernel: (k c o), tap 0 first as published.
      bias: (o,) or None.

    Returns:
      (b t' o), t' = `transposed_length(...)`.
    """
    taps, channels, outputs = kernel.shape
    b, length = x.shape[0], transposed_length(x.shape[1], taps, stride, padding)
    steps = -(-taps // stride)
    kernel = jnp.pad(kernel, ((0, steps * stride - taps), (0, 0), (0, 0)))
    # Output step A, phase r, of the uncropped result is the sum over a of x[A - a] @ kernel[a * stride + r]: one
    # product of the input and its copies shifted by a, whose phases then lie one behind the other.
    kernel = jnp.moveaxis(kernel.reshape(steps, stride, channels, outputs), 2, 1)
    shifted = [jnp.pad(x, ((0, 0), (a, steps - 1 - a), (0, 0))) for a in range(steps)]
    y = jnp.einsum("btc,co->bto", jnp.concatenate(shifted, axis=-1), kernel.reshape(steps * channels, -1))
    y = y.reshape(b, -1, outputs)[:, padding : padding + length]
    return y if bias is None else y + bias


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
) -> jax.Array:
    """A convolution over (time, frequency): stride along frequency, dilation along time.

    Args:
      x: (b t f c).
      kernel: (k_t k_f c o).
      bias: (o,) or None.
      padding: zeros on both sides of time and of frequency.

    Returns:
      (b t' f' o).
    """
    if stride > 1:
        b, t, _, channels = x.shape
        _, taps, _, outputs = kernel.shape
        length, steps = output_length(x.shape[2], taps, stride, padding[1]), -(-taps // stride)
        span = (length + steps - 1) * stride
        right = max(0, span - padding[1] - x.shape[2])
        x = jnp.pad(x, ((0, 0), (0, 0), (padding[1], right), (0, 0)))[:, :, :span]
        x = x.reshape(b, t, -1, stride * channels)
        kernel = jnp.pad(kernel, ((0, 0), (0, steps * stride - taps), (0, 0), (0, 0)))
        kernel = kernel.reshape(kernel.shape[0], steps, stride * channels, outputs)
        padding = (padding[0], 0)
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(p, p) for p in padding],
        rhs_dilation=(dilation, 1),
        dimension_numbers=DIMENSIONS_2D,
    )
    return y if bias is None else y + bias
