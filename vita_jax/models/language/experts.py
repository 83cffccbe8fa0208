"""The mixture-of-experts feed-forward of Mixtral as a Linen shell; the maths is in `vita_jax.ops.experts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.nn.layers import Dense, Initializer, low_rank_factors, torch_linear_uniform
from vita_jax.ops.experts import ExpertLinear, Experts, apply_experts, route

# Collection that receives the router's logits when a caller makes it mutable: what the load-balancing loss needs.
ROUTER = "router"


class ExpertDense(nn.Module):
    """The parameters of one linear layer of every expert: `kernel` (e inputs outputs).

    Attributes:
      num_experts, inputs, features: sizes of the kernel.
      axes: logical names of inputs and outputs.
      kernel_init: None draws each expert as `torch.nn.Linear` does.
      dtype: compute dtype; parameters are float32.
    """

    num_experts: int
    inputs: int
    features: int
    axes: tuple[str, str]
    kernel_init: Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> ExpertLinear:
        """The layer in the compute dtype, for `vita_jax.ops.experts`."""
        init = nn.with_logical_partitioning(
            self.kernel_init or torch_linear_uniform(self.inputs), ("experts", *self.axes)
        )
        kernel = self.param("kernel", init, (self.num_experts, self.inputs, self.features), jnp.float32)
        return ExpertLinear(kernel.astype(self.dtype), *(low_rank_factors(self) or ()))


class SparseMoE(nn.Module):
    """Router and experts: `router/kernel` (d e), `{gate,up}_proj/kernel` (e d f), `down_proj/kernel` (e f d).

    Attributes:
      num_experts, experts_per_token: e, k.
      intermediate_size: f of each expert.
      implementation: see `apply_experts`.
      kernel_init: None draws as `torch.nn.Linear` does.
      dtype: compute dtype of the experts; the router works in float32.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    implementation: str = "ragged"
    kernel_init: Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b s d) -> (b s d). Padding is routed like everything else."""
        d, f = x.shape[-1], self.intermediate_size
        # A rounded logit sends tokens to other experts, so the router has full precision on every accelerator.
        with jax.default_matmul_precision("highest"):
            logits = Dense(
                (self.num_experts,), ("embed", None), use_bias=False, kernel_init=self.kernel_init, name="router"
            )(x)
        if not self.is_initializing():  # what `init` returns are parameters only
            self.sow(ROUTER, "logits", logits, reduce_fn=lambda _, new: new, init_fn=lambda: None)

        def linear(inputs: int, features: int, axes: tuple[str, str], name: str) -> ExpertLinear:
            return ExpertDense(self.num_experts, inputs, features, axes, self.kernel_init, self.dtype, name=name)()

        experts = Experts(
            gate=linear(d, f, ("embed", "mlp"), "gate_proj"),
            up=linear(d, f, ("embed", "mlp"), "up_proj"),
            down=linear(f, d, ("mlp", "embed"), "down_proj"),
        )
        routing = route(logits.reshape(-1, self.num_experts), self.experts_per_token)
        tokens = x.reshape(-1, d).astype(self.dtype)
        out = apply_experts(tokens, routing, experts, implementation=self.implementation).reshape(x.shape)
        # Kept only when the caller makes `intermediates` mutable.
        self.sow("intermediates", "input", x)
        self.sow("intermediates", "output", out)
        return out


def router_logits(variables: Mapping[str, Any]) -> jax.Array:
    """The logits (l b s e) of all layers from what `apply(..., mutable=[ROUTER])` returned beside its result."""
    (logits,) = jax.tree.leaves(variables[ROUTER])
    return logits
