"""The codec's encoder: a wave to latent frames and the utterance's vector (`ticodec/models.py`, `Encoder`).

Its group norms run over the whole utterance, so it cannot be streamed. Padding changes what it gives unless it is told
the length of every row, which then gives what the row alone would.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.global_encoder import CONV_STDDEV, GlobalTokenEncoder
from vita_jax.models.codec.residual import ResBlock, check_even, hold, inside_mask, leaky_relu
from vita_jax.nn.convolution import Conv, GroupNorm
from vita_jax.nn.layers import Dense

FIRST_KERNEL, LAST_KERNEL = 7, 3
LAST_SLOPE = 0.01


class Encoder(nn.Module):
    """Parameters: `conv_pre`, `ups_{i}`, `resblocks_{n}`, `normalize_{n}`, `conv_post`, `global_encoder`, `linear`.

    `linear` is part of the published weights and has no effect.
    """

    config: CodecConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        c.check_encoder()
        common = {"weight_norm": c.weight_norm, "dtype": self.dtype}
        self.conv_pre = Conv(c.base_channels, (FIRST_KERNEL,), padding=(FIRST_KERNEL // 2,), **common)
        stages = list(zip(c.upsample_rates, c.upsample_kernel_sizes, strict=True))[::-1]
        self.ups = [
            Conv(
                c.base_channels * 2 ** (i + 1),
                (taps,),
                stride=stride,
                padding=((taps - stride) // 2,),
                **common,
            )
            for i, (stride, taps) in enumerate(stages)
        ]
        blocks = list(zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes, strict=True))[::-1]
        self.resblocks = [ResBlock(c, taps, dilations, self.dtype) for _ in stages for taps, dilations in blocks]
        self.normalize = [GroupNorm(c.group_norm_channels, dtype=self.dtype) for _ in self.resblocks]
        self.conv_post = Conv(
            c.latent_dim,
            (LAST_KERNEL,),
            padding=(LAST_KERNEL // 2,),
            weight_norm=False,
            init_stddev=CONV_STDDEV,
            dtype=self.dtype,
        )
        self.global_encoder = GlobalTokenEncoder(c, dtype=self.dtype)
        self.linear = Dense((c.global_dim,), (None, "embed"))

    def __call__(
        self, wave: jax.Array, train: bool = False, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes whole utterances.

        Args:
          wave: (b n) samples in -1 .. 1.
          train: batch statistics in the utterance branch, see `BatchNorm`.
          lengths: (b,) int32 real frames of each row, at least 1; n is then a multiple of the hop. None = all are real.

        Returns:
          latent frames (b t c), t = n // hop where n is a multiple of the hop, and the utterance's vectors (b g).
        """
        if lengths is not None:
            check_even(self.config)
        mask = inside_mask(lengths, wave.shape[1], self.config.hop)
        x = hold(self.conv_pre(hold(wave[..., None], mask)), mask)
        self.sow("intermediates", "after_conv_pre", x)
        global_vector = None
        for i in range(len(self.ups)):
            x, mask = self._stage(i, x, lengths)
            if i == self.config.global_stage:
                global_vector = self.global_encoder(x, train, mask)
        x = hold(self.conv_post(nn.leaky_relu(x, LAST_SLOPE)), mask)
        if self.is_initializing():
            self.linear(global_vector)
        return x, global_vector

    def global_vector(self, wave: jax.Array, train: bool = False) -> jax.Array:
        """Only the utterance's vector: (b n) -> (b g)."""
        x = self.conv_pre(wave[..., None])
        for i in range(self.config.global_stage + 1):
            x, _ = self._stage(i, x, None)
        return self.global_encoder(x, train)

    def _stage(self, i: int, x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """One stage and the mask of its samples. The running sum of its blocks is normalised after each block."""
        x = self.ups[i](leaky_relu(x))
        # The encoder's strides are the generator's, reversed.
        rate = math.prod(self.config.upsample_rates[: self.config.num_stages - 1 - i])
        mask = inside_mask(lengths, x.shape[1], rate)
        x = hold(x, mask)
        self.sow("intermediates", f"after_ups_{i}", x)
        blocks = len(self.config.resblock_kernel_sizes)
        total = None
        for n in range(i * blocks, (i + 1) * blocks):
            y = self.resblocks[n](x, mask)
            total = hold(self.normalize[n](y if total is None else total + y, mask), mask)
            self.sow("intermediates", f"after_normalize_{n}", total)
        return total / blocks, mask
