"""The mixture-of-experts feed-forward of Mixtral as a Linen shell.

The maths is in `vita_jax.ops.experts`, and for several devices in `vita_jax.ops.expert_parallel`. Which of the two runs
depends on the mesh and the rule table that are current when the model is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from vita_jax.nn.layers import Dense, Initializer, kernel_scale, low_rank_factors, torch_linear_uniform
from vita_jax.ops.expert_parallel import ExpertAxes, apply_sharded_experts
from vita_jax.ops.experts import ExpertLinear, Experts, apply_experts, route
from vita_jax.ops.meshes import num_parts, used_axes

# Collection that receives what the router did when a caller makes it mutable: its logits, which the load-balancing loss
# needs, and where buffers are bounded how many assignments of each token were dropped.
ROUTER = "router"
LOGITS, DROPPED = "logits", "dropped"


class ExpertDense(nn.Module):
    """The parameters of one linear layer of every expert: `kernel` (e inputs outputs), maybe in int8.

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
        down, up = low_rank_factors(self) or (None, None)
        return ExpertLinear(kernel.astype(self.dtype), down, up, kernel_scale(self, kernel))


class SparseMoE(nn.Module):
    """Router and experts: `router/kernel` (d e), `{gate,up}_proj/kernel` (e d f), `down_proj/kernel` (e f d).

    Attributes:
      num_experts, experts_per_token: e, k.
      intermediate_size: f of each expert.
      implementation: see `apply_experts` and `apply_sharded_experts`.
      buffer_factor: see `apply_sharded_experts`.
      kernel_init: None draws as `torch.nn.Linear` does.
      dtype: compute dtype of the experts; the router works in float32.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    implementation: str = "ragged"
    buffer_factor: float | None = None
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

        def linear(inputs: int, features: int, axes: tuple[str, str], name: str) -> ExpertLinear:
            return ExpertDense(self.num_experts, inputs, features, axes, self.kernel_init, self.dtype, name=name)()

        experts = Experts(
            gate=linear(d, f, ("embed", "mlp"), "gate_proj"),
            up=linear(d, f, ("embed", "mlp"), "up_proj"),
            down=linear(f, d, ("mlp", "embed"), "down_proj"),
        )
        out, dropped = self._apply_experts(x.astype(self.dtype), logits, experts)
        self._keep(LOGITS, logits)
        if self.buffer_factor is not None:
            self._keep(DROPPED, dropped)
        # Kept only when the caller makes `intermediates` mutable.
        self.sow("intermediates", "input", x)
        self.sow("intermediates", "output", out)
        return out

    def _apply_experts(self, x: jax.Array, logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
        """x (b s d), logits (b s e) -> (b s d), and how many assignments of each token were dropped (b s) int32."""
        mesh = jax.sharding.get_abstract_mesh()
        axes = expert_axes(mesh, *experts.gate.kernel.shape)
        # What `init` runs the model on is one short row, which no mesh could divide.
        if axes == ExpertAxes() or self.implementation == "dense" or self.is_initializing():
            routing = route(logits.reshape(-1, self.num_experts), self.experts_per_token)
            out = apply_experts(x.reshape(-1, x.shape[-1]), routing, experts, implementation=self.implementation)
            return out.reshape(x.shape), jnp.zeros(x.shape[:-1], jnp.int32)
        return apply_sharded_experts(
            x,
            logits,
            experts,
            mesh,
            axes,
            experts_per_token=self.experts_per_token,
            implementation=self.implementation,
            buffer_factor=self.buffer_factor,
        )

    def _keep(self, name: str, value: jax.Array) -> None:
        """Puts a value in the collection ROUTER. What `init` returns are parameters only."""
        if not self.is_initializing():
            self.sow(ROUTER, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def expert_axes(mesh: AbstractMesh, num_experts: int, width: int, hidden: int) -> ExpertAxes:
    """The mesh axes larger than 1 over which the current rule table cuts tokens and kernels; none without a mesh.

    Args:
      mesh: the current one.
      num_experts, width, hidden: e, d, f. Kernels that a mesh does not divide are whole at rest, if they are allowed to
        be (`vita_jax.parallel.rules`), and so they are here.
    """

    def axes_of(name: str, size: int = 0) -> tuple[str, ...]:
        axes = used_axes(mesh, *nn.logical_to_mesh_axes((name,)))
        return () if size % num_parts(mesh, axes) else axes

    batch, length = axes_of("batch"), axes_of("length")
    # What is cut over devices that have the same tokens is made whole before the layer, where all of them need all.
    embed = tuple(axis for axis in axes_of("embed", width) if axis in batch + length)
    return ExpertAxes(batch, length, axes_of("experts", num_experts), embed, axes_of("mlp", hidden))


def router_logits(variables: Mapping[str, Any]) -> jax.Array:
    """The logits (l b s e) of all layers from what `apply(..., mutable=[ROUTER])` returned beside its result."""
    return _kept(variables, LOGITS)


def dropped_assignments(variables: Mapping[str, Any]) -> jax.Array | None:
    """Likewise how many assignments of each token were dropped, (l b s) int32; None if buffers are not bounded."""
    return _kept(variables, DROPPED)


def _kept(variables: Mapping[str, Any], name: str) -> jax.Array | None:
    leaves = jax.tree_util.tree_leaves_with_path(variables[ROUTER])
    return next((leaf for path, leaf in leaves if path[-1].key == name), None)
