"""The codec's generator: latent frames and the utterance's vector to a wave (`ticodec/models.py`, `Generator`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.residual import ResBlock, check_even, hold, inside_mask, leaky_relu, used_dilations
from vita_jax.nn.convolution import Conv

END_KERNEL = 7  # taps of the first and the last convolution


class Generator(nn.Module):
    """Parameters: `conv_pre`, `ups_{i}`, `resblocks_{i * blocks + j}`, `conv_post`.

    The utterance's vector is added after the stage that has as many channels as it has entries. As in the original it
    has no effect where no stage has.
    """

    config: CodecConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array, global_vector: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Frames to samples.

        Args:
          latent: (b t c).
          global_vector: (b g).
          lengths: (b,) int32 real frames of each row; padding behind them gives silence and changes nothing before.
            None = all are real.

        Returns:
          (b t*hop) in -1 .. 1; one sample more per stage whose taps minus stride is odd.
        """
        c = self.config
        if lengths is not None:
            check_even(c)
        rate = 1

        def conv(features: int, name: str) -> Conv:
            padding = (END_KERNEL // 2,)
            return Conv(
                features, (END_KERNEL,), padding=padding, weight_norm=c.weight_norm, dtype=self.dtype, name=name
            )

        mask = inside_mask(lengths, latent.shape[1], rate)
        x = hold(conv(c.upsample_initial_channel, "conv_pre")(hold(latent, mask)), mask)
        self.sow("intermediates", "after_conv_pre", x)
        for i, (stride, taps) in enumerate(zip(c.upsample_rates, c.upsample_kernel_sizes, strict=True)):
            x = Conv(
                c.stage_channels(i),
                (taps,),
                stride=stride,
                padding=((taps - stride) // 2,),
                transposed=True,
                weight_norm=c.weight_norm,
                dtype=self.dtype,
                name=f"ups_{i}",
            )(leaky_relu(x))
            rate *= stride
            mask = inside_mask(lengths, x.shape[1], rate)
            x = hold(x, mask)
            self.sow("intermediates", f"after_ups_{i}", x)
            blocks = [self._block(i, j)(x, mask) for j in range(len(c.resblock_kernel_sizes))]
            self.sow("intermediates", f"blocks_{i}", blocks)
            x = sum(blocks[1:], start=blocks[0]) / len(blocks)
            if x.shape[-1] == global_vector.shape[-1]:
                x = hold(x + global_vector[:, None].astype(x.dtype), mask)
        x = hold(conv(1, "conv_post")(leaky_relu(x)), mask)
        self.sow("intermediates", "after_conv_post", x)
        return jnp.tanh(x)[..., 0]

    def _block(self, stage: int, j: int) -> ResBlock:
        c = self.config
        return ResBlock(
            c,
            c.resblock_kernel_sizes[j],
            c.resblock_dilation_sizes[j],
            dtype=self.dtype,
            name=f"resblocks_{stage * len(c.resblock_kernel_sizes) + j}",
        )


def context_frames(config: CodecConfig) -> int:
    """Frames on either side of a frame that its samples depend on: the generator's receptive field."""
    check_even(config)
    first, last = 0, config.hop - 1  # the samples of frame 0
    first, last = first - END_KERNEL // 2, last + END_KERNEL // 2
    for stride, taps in reversed(list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))):
        reach = max(
            sum((taps_of_block - 1) * dilation // 2 + pair for dilation in used_dilations(config, dilations))
            for taps_of_block, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            )
            for pair in [(taps_of_block - 1) // 2 if config.resblock == "1" else 0]
        )
        first, last = first - reach, last + reach
        padding = (taps - stride) // 2
        # Output m takes inputs n with 0 <= m + padding - n * stride < taps.
        first, last = -((taps - 1 - padding - first) // stride), (last + padding) // stride
    first, last = first - END_KERNEL // 2, last + END_KERNEL // 2
    return max(-first, last)
