"""Mixture of experts: which experts a token goes to, what they compute, and how evenly they are used.

Mixtral (arXiv 2401.04088, section 2.1; `vita_mixtral.py`): every token goes to its k most likely experts, without a
limit per expert, so no token is ever dropped:

    p = softmax(router(x));  y = sum over the k largest p of p / (their sum) * expert(x)

Axes: n tokens, e experts, k experts per token, d model width, f hidden width, r rank of a low-rank update.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.ops.grouped_matmul import grouped_matmul

# "ragged": sorted by expert and multiplied group by group; between devices the exchange that suits them. "dense": every
# expert on every token. The others are "ragged" with the exchange named; see `vita_jax.ops.expert_parallel`.
IMPLEMENTATIONS = ("ragged", "dense", "ragged_all_to_all", "padded_all_to_all")


class Routing(NamedTuple):
    """Where tokens go: `experts` (n k) int32, most likely first; `weights` (n k) float32, each row sums to 1."""

    experts: jax.Array
    weights: jax.Array


class ExpertLinear(NamedTuple):
    """One linear layer of every expert: `x @ kernel`, plus `x @ down @ up` if there is a low-rank update.

    Attributes:
      kernel: (e inputs outputs).
      down, up: (e inputs r) and (e r outputs), or None.
      scale: (e outputs) float32, which multiplies what the kernel gives; None where it is no kernel of integers.
    """

    kernel: jax.Array
    down: jax.Array | None = None
    up: jax.Array | None = None
    scale: jax.Array | None = None


class Experts(NamedTuple):
    """The feed-forwards, `down(silu(gate(x)) * up(x))`: gate and up map d to f, down maps f to d."""

    gate: ExpertLinear
    up: ExpertLinear
    down: ExpertLinear


def route(logits: jax.Array, experts_per_token: int) -> Routing:
    """The most likely experts of each token.

    Args:
      logits: (n e), any float dtype; the softmax is over all experts and in float32.
      experts_per_token: k.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), experts_per_token)
    return Routing(experts.astype(jnp.int32), weights / jnp.sum(weights, axis=-1, keepdims=True))


class Assignments(NamedTuple):
    """The n k assignments of tokens to experts, sorted by expert; assignment a is slot a % k of token a // k.

    Attributes:
      order: (n k) int32, the assignment at each place of the sorted list.
      place: (n k) int32, the place of each assignment: the inverse of `order`.
      sizes: (e) int32, how many assignments each expert has.
    """

    order: jax.Array
    place: jax.Array
    sizes: jax.Array


def sort_assignments(experts: jax.Array, num_experts: int) -> Assignments:
    """Sorts `Routing.experts` (n k); assignments of one expert stay in the order of their tokens."""
    assignments = experts.reshape(-1)
    order = jnp.argsort(assignments, stable=True)
    sizes = jnp.sum(assignments[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Assignments(order.astype(jnp.int32), jnp.argsort(order).astype(jnp.int32), sizes)


def apply_experts(x: jax.Array, routing: Routing, experts: Experts, *, implementation: str = "ragged") -> jax.Array:
    """Sum of what each token's experts make of it, all on one device or partitioned automatically.

    Args:
      x: (n d).
      routing: of the n tokens.
      experts: parameters in the dtype of `x`.
      implementation: a name of `IMPLEMENTATIONS`. "dense" does e / k times the work and is there to check the others
        against; those are all the same here, where there is nothing to exchange.

    Returns:
      (n d) in the dtype of `x`.

    Raises:
      UserError: unknown `implementation`.
    """
    check_implementation(implementation)
    if implementation == "dense":
        return _dense(x, routing, experts)
    assignments = sort_assignments(routing.experts, experts.gate.kernel.shape[0])
    rows = take_rows(x, assignments.order, assignments.place, routing.experts.shape[1])
    return weighted_sum(grouped_feed_forward(rows, assignments.sizes, experts), assignments, routing.weights)


def check_implementation(implementation: str) -> None:
    """Raises UserError if `IMPLEMENTATIONS` has no such name."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"expert implementation {implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")


def _dense(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    # All experts side by side are one wide feed-forward, in which what each makes of a token is weighted. As products
    # of two matrices it takes a CPU three quarters of the time that it takes as a batch of experts.
    e, d, f = experts.gate.kernel.shape

    def kernel(layer: ExpertLinear) -> jax.Array:
        whole = layer.kernel
        if layer.scale is not None:
            whole = (whole * layer.scale[:, None]).astype(x.dtype)
        return whole if layer.down is None else whole + layer.down @ layer.up

    gate, up = (jnp.swapaxes(kernel(layer), 0, 1).reshape(d, e * f) for layer in (experts.gate, experts.up))
    chosen = jax.nn.one_hot(routing.experts, e)
    weights = jnp.einsum("nke,nk->ne", chosen, routing.weights).astype(x.dtype)
    hidden = (jax.nn.silu(x @ gate) * (x @ up)).reshape(-1, e, f) * weights[..., None]
    return hidden.reshape(-1, e * f) @ kernel(experts.down).reshape(e * f, d)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(x: jax.Array, order: jax.Array, place: jax.Array, copies: int = 1) -> jax.Array:
    """`x[order // copies]`: the rows of x, each `copies` times, in another order.

    Args:
      x: (n d).
      order: (n copies) int32, a permutation.
      place: (n copies) int32, its inverse. With it the gradient is read as well, where jax would add rows up one by
        one in memory.
      copies: how often each row is taken.

    Returns:
      (n copies, d).
    """
    return x[order // copies]


def _take_forward(
    x: jax.Array, order: jax.Array, place: jax.Array, copies: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return take_rows(x, order, place, copies), (order, place)


def _take_backward(
    copies: int, permutation: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    order, place = permutation
    rows = take_rows(gradient, place, order)
    return jnp.sum(rows.reshape(-1, copies, *rows.shape[1:]), axis=1), None, None


take_rows.defvjp(_take_forward, _take_backward)


def weighted_sum(rows: jax.Array, assignments: Assignments, weights: jax.Array) -> jax.Array:
    """Each token's k results times their weights, summed. rows (n k, d) sorted by expert, weights (n k) -> (n d)."""
    rows = take_rows(rows, assignments.place, assignments.order).reshape(*weights.shape, -1)
    return jnp.einsum("nkd,nk->nd", rows, weights.astype(rows.dtype))


def grouped_feed_forward(rows: jax.Array, sizes: jax.Array, experts: Experts) -> jax.Array:
    """The experts on rows that are sorted by expert.

    Args:
      rows: (m d), first the rows of expert 0, then those of expert 1, and so on.
      sizes: (e) int32, rows of each expert; they sum to at most m. What is behind them changes nothing.
      experts: parameters in the dtype of `rows`.

    Returns:
      (m d) in the dtype of `rows`; zero behind the last expert's rows. Gradients to these rows are undefined.
    """
    used = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]

    def product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        # Kernels leave rows behind the last group undefined, in the products as in the gradients. Selecting after every
        # product keeps both out of the gradient of the next kernel, where even 0 times such a row may be no number.
        return jnp.where(used, grouped_matmul(inputs, kernel, sizes), 0)

    def linear(inputs: jax.Array, layer: ExpertLinear) -> jax.Array:
        y = product(inputs, layer.kernel)
        if layer.scale is not None:
            scales = jnp.repeat(layer.scale, sizes, axis=0, total_repeat_length=rows.shape[0])
            y = (y * scales).astype(y.dtype)
        return y if layer.down is None else y + product(product(inputs, layer.down), layer.up)

    return linear(jax.nn.silu(linear(rows, experts.gate)) * linear(rows, experts.up), experts.down)


class Balance(NamedTuple):
    """How evenly experts are used.

    Attributes:
      loss: () float32, the load-balancing loss; k for a router that treats all experts alike.
      load: (e) float32, the share of all assignments that each expert gets; sums to 1.
    """

    loss: jax.Array
    load: jax.Array


def balance(logits: jax.Array, experts_per_token: int, mask: jax.Array | None = None) -> Balance:
    """Load-balancing loss (`load_balancing_loss_func` of `vita_mixtral.py`) over all layers at once, and the load.

    loss = e * sum over slots j < k and experts i of f[j, i] * P[i], with f the share of tokens whose j-th expert is i
    and P the mean probability of expert i. Gradients flow through P only.

    Args:
      logits: (... e) of the router; (l b s e) for a stack of layers.
      experts_per_token: k.
      mask: bool or int, broadcastable to (...); tokens where it is 0 (padding) do not count. None counts all.
    """
    num_experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    counted = jnp.ones(logits.shape[:-1]) if mask is None else jnp.broadcast_to(mask != 0, logits.shape[:-1])
    counted = counted.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(counted), 1.0)
    chosen = jax.nn.one_hot(jax.lax.top_k(probabilities, experts_per_token)[1], num_experts)
    used = jnp.einsum("...ke,...->e", chosen, counted) / total  # sum of f over slots
    mean = jnp.einsum("...e,...->e", probabilities, counted) / total
    return Balance(num_experts * jnp.sum(used * mean), used / experts_per_token)


def dropped_share(dropped: jax.Array, experts_per_token: int, mask: jax.Array | None = None) -> jax.Array:
    """Share of all assignments that were dropped, () float32.

    Args:
      dropped: (...) int32, how many of a token's k assignments were; (l b s) for a stack of layers.
      experts_per_token: k.
      mask: see `balance`.
    """
    counted = jnp.broadcast_to(True if mask is None else mask != 0, dropped.shape)
    return jnp.sum(dropped, where=counted) / (experts_per_token * jnp.maximum(jnp.sum(counted), 1))
