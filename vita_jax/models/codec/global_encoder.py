"""The codec's utterance branch: what does not change over time, as one vector (`ticodec/models.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.residual import hold, leaky_relu
from vita_jax.nn.convolution import Conv
from vita_jax.nn.layers import Dense

CONV_STDDEV = 0.01
UPDATES = "updates"  # collection of new running statistics


class BatchNorm(nn.Module):
    """Batch norm over (b c). The running statistics are parameters that get no gradient.

    Parameters: `scale`, `bias`, `running_mean`, `running_var`, (c) each. With `train` the batch's own statistics
    normalise, and the new running ones are left in the collection "updates" if the caller makes it mutable; see
    `apply_updates`.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (b c) -> (b c). Raises UserError for a single row in training, whose variance is not defined."""
        size = x.shape[-1]

        def param(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, ("embed",)), (size,), jnp.float32)

        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale, bias = param("scale", ones), param("bias", zeros)
        running_mean = jax.lax.stop_gradient(param("running_mean", zeros))
        running_var = jax.lax.stop_gradient(param("running_var", ones))
        mean, var = running_mean, running_var
        if train:
            b = x.shape[0]
            if b < 2:
                raise UserError(f"batch norm in training needs at least 2 rows, got {b}; make the batch larger")
            mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
            for name, old, new in (
                ("running_mean", running_mean, mean),
                ("running_var", running_var, var * b / (b - 1)),
            ):
                updated = jax.lax.stop_gradient((1 - self.momentum) * old + self.momentum * new)
                keep_update(self, name, updated)
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias


def keep_update(module: nn.Module, name: str, value: jax.Array) -> None:
    """Leaves the new value of a parameter that is a statistic in the collection "updates"."""
    module.sow(UPDATES, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def apply_updates(params: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the statistics that a training step left in the collection "updates"."""
    new = dict(params)
    for name, value in updates.items():
        new[name] = apply_updates(params[name], value) if isinstance(value, Mapping) else value
    return new


class GlobalTokenEncoder(nn.Module):
    """Three convolutions, the mean over time, a linear layer and batch norm.

    Parameters: `conv_{0,2,4}/kernel`, `fn_0/{kernel, bias}`, `fn_2/{scale, bias, running_mean, running_var}`.
    """

    config: CodecConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, inside: jax.Array | None = None) -> jax.Array:
        """x: (b t c), zeros where `inside` (b t 1) is False -> (b g) float32; `train` as in `BatchNorm`.

        Raises:
          UserError: `inside` for a branch that changes the number of frames.
        """
        _, hidden, width, taps, stride = self.config.global_feature_conv
        if inside is not None and (stride != 1 or taps % 2 == 0):
            raise UserError(f"padded rows need a utterance branch of stride 1 and odd taps, not {stride} and {taps}")
        for index, features in ((0, hidden), (2, hidden), (4, width)):
            conv = Conv(
                features,
                (taps,),
                stride=stride,
                padding=((taps - stride) // 2,),
                use_bias=False,
                weight_norm=False,
                init_stddev=CONV_STDDEV,
                dtype=self.dtype,
                name=f"conv_{index}",
            )
            x = hold(leaky_relu(conv(x)), inside)
        mean = jnp.mean(x.astype(jnp.float32), axis=1, where=inside)
        # A single vector per utterance: float32 from here on costs nothing, and batch statistics need it.
        return BatchNorm(name="fn_2")(leaky_relu(Dense((width,), (None, "embed"), name="fn_0")(mean)), train)
