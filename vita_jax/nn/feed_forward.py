"""The feed-forward that Flamingo's resampler and gated blocks share; beside `layers.py`, whose shells it is made of."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.activations import activation

LAYER_NORM_EPS = 1e-5


class NormedFeedForward(nn.Module):
    """`down(act(up(norm(x))))`, no biases but the norm's.

    Attributes:
      size: d, in and out.
      hidden_size: f.
      hidden_act: a name in `ops/activations.py`.
    """

    size: int
    hidden_size: int
    hidden_act: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (... d) -> (... d); the residual is the caller's."""

        def linear(features: int, axes: tuple[str, str], name: str) -> Dense:
            return Dense((features,), axes, use_bias=False, dtype=self.dtype, name=name)

        x = LayerNorm(LAYER_NORM_EPS, self.dtype, name="norm")(x)
        x = activation(self.hidden_act)(linear(self.hidden_size, ("embed", "mlp"), "up")(x))
        return linear(self.size, ("mlp", "embed"), "down")(x)
