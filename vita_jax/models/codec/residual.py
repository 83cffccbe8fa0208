"""Residual blocks of the codec, shared by encoder and generator, and how padded rows are held at zero.

Every convolution pads with zeros on both sides, so what lies behind the end of an utterance must be zero at the input
of every layer. `hold` sets it to zero after each one. A padded row then gives exactly what the row alone would, and one
compiled shape serves utterances and streaming windows of every length.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.models.codec.config import CodecConfig
from vita_jax.nn.convolution import Conv

SLOPE = 0.1


def leaky_relu(x: jax.Array) -> jax.Array:
    """Slope 0.1, everywhere in the codec but at the end of the encoder."""
    return nn.leaky_relu(x, SLOPE)


def hold(x: jax.Array, inside: jax.Array | None) -> jax.Array:
    """(b t c) with zeros where `inside` (b t 1) is False; None leaves all as it is."""
    return x if inside is None else jnp.where(inside, x, 0)


def inside_mask(lengths: jax.Array | None, size: int, rate: int) -> jax.Array | None:
    """(b size 1) bool: which samples of a stage belong to the rows; `rate` samples per frame."""
    return None if lengths is None else (jnp.arange(size)[None] < lengths[:, None] * rate)[..., None]


def check_even(config: CodecConfig) -> None:
    """Raises UserError where a stage adds samples, so that frames and samples do not correspond."""
    for stride, taps in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        if (taps - stride) % 2:
            raise UserError(
                f"upsample kernel size {taps} with rate {stride} adds a sample to every decode, so chunks cannot be "
                "joined; kernel size minus rate must be even"
            )


class ResBlock(nn.Module):
    """Type "1": pairs of a dilated and a plain convolution; type "2": the first two dilations, single convolutions.

    Parameters: `convs1_{i}`, `convs2_{i}` (type 1) or `convs_{i}` (type 2).
    """

    config: CodecConfig
    kernel_size: int
    dilations: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inside: jax.Array | None = None) -> jax.Array:
        """x: (b t c), inside: (b t 1) bool or None -> (b t c)."""

        def conv(x: jax.Array, dilation: int, name: str) -> jax.Array:
            padding = (self.kernel_size - 1) * dilation // 2
            y = Conv(
                x.shape[-1],
                (self.kernel_size,),
                padding=(padding,),
                dilation=dilation,
                weight_norm=self.config.weight_norm,
                dtype=self.dtype,
                name=name,
            )(leaky_relu(x))
            return hold(y, inside)

        for i, dilation in enumerate(used_dilations(self.config, self.dilations)):
            if self.config.resblock == "1":
                x = x + conv(conv(x, dilation, f"convs1_{i}"), 1, f"convs2_{i}")
            else:
                x = x + conv(x, dilation, f"convs_{i}")
        return x


def used_dilations(config: CodecConfig, dilations: tuple[int, ...]) -> tuple[int, ...]:
    """The dilations that a block has convolutions for."""
    return dilations if config.resblock == "1" else dilations[:2]
