"""Discriminators for training the codec: over periods, over scales, and over complex spectra.

Multi-period and multi-scale as in HiFi-GAN (arXiv 2010.05646), multi-scale STFT as in EnCodec (arXiv 2210.13438);
`ticodec/models.py` and `encodec/msstftd.py`. Each gives logits for "this is recorded" and the features on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.models.codec.global_encoder import keep_update
from vita_jax.models.codec.residual import leaky_relu
from vita_jax.nn.convolution import Conv, uniform_init
from vita_jax.ops.convolution import conv1d
from vita_jax.ops.spectrogram import hann_window, spectrum

STFT_SLOPE = 0.2
STFT_DILATIONS = (1, 2, 4)
# (channels out, taps, stride, groups) of a scale's convolutions at full width.
SCALE_CONVS = (
    (128, 15, 1, 1),
    (128, 41, 2, 4),
    (256, 41, 2, 16),
    (512, 41, 4, 16),
    (1024, 41, 4, 16),
    (1024, 41, 1, 16),
    (1024, 5, 1, 1),
)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminators; the defaults are the published sizes.

    Attributes:
      periods: of the period discriminators, in samples.
      period_channels: channels of their convolutions.
      num_scales: scale discriminators, each at half the rate of the one before.
      scale_divisor: divides the channels (and groups) of the scale discriminators.
      stft_sizes: samples per frame of the STFT discriminators; the hop is a quarter.
      stft_filters: their channels.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    num_scales: int = 3
    scale_divisor: int = 1
    stft_sizes: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    stft_filters: int = 32


def discriminators_small() -> DiscriminatorConfig:
    """A few narrow ones, for training on a laptop."""
    return DiscriminatorConfig(
        periods=(2, 5),
        period_channels=(8, 16, 32),
        num_scales=1,
        scale_divisor=16,
        stft_sizes=(512, 128),
        stft_filters=8,
    )


@struct.dataclass
class Judgement:
    """What one discriminator makes of a batch: logits, any shape, and the features that feature matching compares."""

    logits: jax.Array
    features: tuple[jax.Array, ...]


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample side by side. Parameters: `convs_{i}`, `conv_post`."""

    period: int
    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, wave: jax.Array) -> Judgement:
        """wave: (b n)."""
        b, n = wave.shape
        wave = jnp.pad(wave, ((0, 0), (0, -n % self.period)), mode="reflect")
        # The published kernels are one wide along the period, so each phase is a row of its own.
        x = jnp.moveaxis(wave.reshape(b, -1, self.period), 2, 1).reshape(b * self.period, -1, 1)
        features = []
        for i, width in enumerate(self.channels):
            stride = 3 if i + 1 < len(self.channels) else 1
            x = leaky_relu(Conv(width, (5,), stride=stride, padding=(2,), name=f"convs_{i}")(x))
            features.append(x)
        logits = Conv(1, (3,), padding=(1,), name="conv_post")(x)
        return Judgement(logits, (*features, logits))


class SpectralConv(nn.Module):
    """A convolution whose kernel is divided by its largest singular value (spectral norm, arXiv 1802.05957).

    Parameters: `kernel`, `bias`, and `u` (o,), the estimate of the left singular vector, which gets no gradient. Each
    call improves it by one power iteration and leaves it in the collection "updates", see `apply_updates`.
    """

    features: int
    taps: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b t c) -> (b t' o)."""
        shape = (self.taps, x.shape[-1] // self.groups, self.features)
        names = (None, None, "embed" if self.features > 1 else None)
        init = uniform_init(shape[0] * shape[1])
        kernel = self.param("kernel", nn.with_logical_partitioning(init, names), shape, jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(init, names[-1:]), shape[-1:], jnp.float32)
        start = nn.with_logical_partitioning(nn.initializers.normal(1.0), names[-1:])
        u = jax.lax.stop_gradient(self.param("u", start, shape[-1:], jnp.float32))
        matrix = kernel.reshape(-1, self.features)
        fixed = jax.lax.stop_gradient(matrix)
        v = _unit(fixed @ u)
        u = _unit(v @ fixed)
        keep_update(self, "u", u)
        kernel = kernel / (v @ matrix @ u)
        return conv1d(x, kernel, bias, stride=self.stride, padding=self.padding, groups=self.groups)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class ScaleDiscriminator(nn.Module):
    """Sees the wave at one rate. Parameters: `convs_{i}`, `conv_post`."""

    divisor: int = 1
    spectral_norm: bool = False

    @nn.compact
    def __call__(self, wave: jax.Array) -> Judgement:
        """wave: (b n)."""

        def conv(features: int, taps: int, stride: int, groups: int, name: str) -> nn.Module:
            if self.spectral_norm:
                return SpectralConv(features, taps, stride, taps // 2, groups, name=name)
            return Conv(features, (taps,), stride=stride, padding=(taps // 2,), groups=groups, name=name)

        x, features = wave[..., None], []
        for i, (width, taps, stride, groups) in enumerate(SCALE_CONVS):
            layer = conv(max(1, width // self.divisor), taps, stride, max(1, groups // self.divisor), f"convs_{i}")
            x = leaky_relu(layer(x))
            features.append(x)
        logits = conv(1, 3, 1, 1, "conv_post")(x)
        return Judgement(logits, (*features, logits))


class StftDiscriminator(nn.Module):
    """Sees real and imaginary part of a spectrum as channels. Parameters: `convs_{i}`, `conv_post`."""

    size: int
    filters: int

    @nn.compact
    def __call__(self, wave: jax.Array) -> Judgement:
        """wave: (b n), n >= size."""
        bins = spectrum(wave, self.size, self.size // 4) / jnp.sqrt(jnp.sum(jnp.square(hann_window(self.size))))
        x = jnp.stack([bins.real, bins.imag], axis=-1)
        layers = [Conv(self.filters, (3, 9), padding=(1, 4), weight_norm=False, name="convs_0")]
        layers += [
            Conv(self.filters, (3, 9), stride=2, padding=(dilation, 4), dilation=dilation, name=f"convs_{i}")
            for i, dilation in enumerate(STFT_DILATIONS, start=1)
        ]
        layers.append(Conv(self.filters, (3, 3), padding=(1, 1), name=f"convs_{len(layers)}"))
        features = []
        for layer in layers:
            x = nn.leaky_relu(layer(x), STFT_SLOPE)
            features.append(x)
        return Judgement(Conv(1, (3, 3), padding=(1, 1), name="conv_post")(x), tuple(features))


def halve_rate(wave: jax.Array) -> jax.Array:
    """Mean of four samples at every second one, zeros beyond both ends: (b n) -> (b n // 2 + 1)."""
    b, n = wave.shape
    pairs = jnp.pad(wave, ((0, 0), (2, 2 + n % 2))).reshape(b, -1, 2).sum(axis=-1)
    return ((pairs[:, :-1] + pairs[:, 1:]) / 4)[:, : n // 2 + 1]


class Discriminators(nn.Module):
    """All of them. Parameters: `period_{p}`, `scale_{i}`, `stft_{size}`."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, wave: jax.Array) -> list[Judgement]:
        """Judges a batch of crops: (b n) samples in -1 .. 1 -> one judgement per discriminator."""
        c = self.config
        judgements = [PeriodDiscriminator(p, c.period_channels, name=f"period_{p}")(wave) for p in c.periods]
        scaled = wave
        for i in range(c.num_scales):
            scaled = halve_rate(scaled) if i else scaled
            judgements.append(ScaleDiscriminator(c.scale_divisor, spectral_norm=i == 0, name=f"scale_{i}")(scaled))
        return judgements + [StftDiscriminator(n, c.stft_filters, name=f"stft_{n}")(wave) for n in c.stft_sizes]
