"""The codec's encoder: a wave to latent frames and the utterance's vector (`ticodec/models.py`, `Encoder`).

Its group norms run over the whole utterance, so it cannot be streamed, and padding a batch changes what it gives.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.global_encoder import CONV_STDDEV, GlobalTokenEncoder
from vita_jax.models.codec.residual import ResBlock, leaky_relu
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

    def __call__(self, wave: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Encodes whole utterances of one length.

        Args:
          wave: (b n) samples in -1 .. 1.
          train: batch statistics in the utterance branch, see `BatchNorm`.

        Returns:
          latent frames (b t c), t = n // hop where n is a multiple of the hop, and the utterance's vectors (b g).
        """
        x = self.conv_pre(wave[..., None])
        self.sow("intermediates", "after_conv_pre", x)
        global_vector = None
        for i in range(len(self.ups)):
            x = self._stage(i, x)
            if i == self.config.global_stage:
                global_vector = self.global_encoder(x, train)
        x = self.conv_post(nn.leaky_relu(x, LAST_SLOPE))
        if self.is_initializing():
            self.linear(global_vector)
        return x, global_vector

    def global_vector(self, wave: jax.Array, train: bool = False) -> jax.Array:
        """Only the utterance's vector: (b n) -> (b g)."""
        x = self.conv_pre(wave[..., None])
        for i in range(self.config.global_stage + 1):
            x = self._stage(i, x)
        return self.global_encoder(x, train)

    def _stage(self, i: int, x: jax.Array) -> jax.Array:
        """One stage. The running sum of its blocks is normalised after each block."""
        x = self.ups[i](leaky_relu(x))
        self.sow("intermediates", f"after_ups_{i}", x)
        blocks = len(self.config.resblock_kernel_sizes)
        total = None
        for n in range(i * blocks, (i + 1) * blocks):
            y = self.resblocks[n](x)
            total = self.normalize[n](y if total is None else total + y)
            self.sow("intermediates", f"after_normalize_{n}", total)
        return total / blocks
