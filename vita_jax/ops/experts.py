"""Mixture of experts: which experts a token goes to, what they compute, and how evenly they are used.

Mixtral (arXiv 2401.04088, section 2.1; `vita_mixtral.py`): every token goes to its k most likely experts, without a
limit per expert, so no token is ever dropped:

    p = softmax(router(x));  y = sum over the k largest p of p / (their sum) * expert(x)

Axes: n tokens, e experts, k experts per token, d model width, f hidden width, r rank of a low-rank update.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError


class Routing(NamedTuple):
    """Where tokens go: `experts` (n k) int32, most likely first; `weights` (n k) float32, each row sums to 1."""

    experts: jax.Array
    weights: jax.Array


class ExpertLinear(NamedTuple):
    """One linear layer of every expert: `x @ kernel`, plus `x @ down @ up` if there is a low-rank update.

    Attributes:
      kernel: (e inputs outputs).
      down, up: (e inputs r) and (e r outputs), or None.
    """

    kernel: jax.Array
    down: jax.Array | None = None
    up: jax.Array | None = None


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


def apply_experts(x: jax.Array, routing: Routing, experts: Experts, *, implementation: str = "ragged") -> jax.Array:
    """Sum of what each token's experts make of it.

    Args:
      x: (n d).
      routing: of the n tokens.
      experts: parameters in the dtype of `x`.
      implementation: a name of `IMPLEMENTATIONS`. "ragged" sorts tokens by expert and multiplies group by group;
        "dense" runs every expert on every token, e / k times the work, and is there to check the others against.

    Returns:
      (n d) in the dtype of `x`.

    Raises:
      UserError: unknown `implementation`.
    """
    check_implementation(implementation)
    return IMPLEMENTATIONS[implementation](x, routing, experts)


def check_implementation(implementation: str) -> None:
    """Raises UserError if `IMPLEMENTATIONS` has no such name."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"expert implementation {implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")


def _dense(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    # All experts side by side are one wide feed-forward, in which what each makes of a token is weighted. As products
    # of two matrices it takes a CPU three quarters of the time that it takes as a batch of experts.
    e, d, f = experts.gate.kernel.shape

    def kernel(layer: ExpertLinear) -> jax.Array:
        return layer.kernel if layer.down is None else layer.kernel + layer.down @ layer.up

    gate, up = (jnp.swapaxes(kernel(layer), 0, 1).reshape(d, e * f) for layer in (experts.gate, experts.up))
    chosen = jax.nn.one_hot(routing.experts, e)
    weights = jnp.einsum("nke,nk->ne", chosen, routing.weights).astype(x.dtype)
    hidden = (jax.nn.silu(x @ gate) * (x @ up)).reshape(-1, e, f) * weights[..., None]
    return hidden.reshape(-1, e * f) @ kernel(experts.down).reshape(e * f, d)


def _ragged(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    n, k = routing.experts.shape
    assignments = routing.experts.reshape(-1)
    order = jnp.argsort(assignments, stable=True)
    sizes = jnp.bincount(assignments, length=experts.gate.kernel.shape[0]).astype(jnp.int32)
    out = grouped_feed_forward(x[order // k], sizes, experts)
    # Gathering by the inverse permutation puts each token's k results side by side again.
    out = out[jnp.argsort(order)].reshape(n, k, -1)
    return jnp.einsum("nkd,nk->nd", out, routing.weights.astype(x.dtype))


def grouped_feed_forward(rows: jax.Array, sizes: jax.Array, experts: Experts) -> jax.Array:
    """The experts on rows that are sorted by expert.

    Args:
      rows: (m d), first the rows of expert 0, then those of expert 1, and so on.
      sizes: (e) int32, rows of each expert; they sum to at most m, and what is behind them may be undefined.
      experts: parameters in the dtype of `rows`.

    Returns:
      (m d) in the dtype of `rows`.
    """

    def linear(inputs: jax.Array, layer: ExpertLinear) -> jax.Array:
        y = jax.lax.ragged_dot(inputs, layer.kernel, sizes)
        if layer.down is not None:
            y = y + jax.lax.ragged_dot(jax.lax.ragged_dot(inputs, layer.down, sizes), layer.up, sizes)
        return y

    return linear(jax.nn.silu(linear(rows, experts.gate)) * linear(rows, experts.up), experts.down)


# All take (x, routing, experts) and return (n d).
IMPLEMENTATIONS = {"ragged": _ragged, "dense": _dense}


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
