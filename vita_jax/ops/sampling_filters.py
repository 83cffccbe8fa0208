"""Filters between logits and the random draw, as the original speech code applies them. Everything is float32.

They work on probabilities and keep exactly `k` entries, the lower id among equals; `vita_jax.inference.sampling` has
the usual filters on logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def keep_top_k_probabilities(probabilities: jax.Array, k: int) -> jax.Array:
    """The `k` largest of each row, renormalised to one; the rest 0. (b v) -> (b v)."""
    values, indices = jax.lax.top_k(probabilities, min(k, probabilities.shape[-1]))
    kept = jnp.zeros_like(probabilities)
    kept = jnp.put_along_axis(kept, indices, values, axis=-1, inplace=False)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def keep_top_p_probabilities(probabilities: jax.Array, p: float) -> jax.Array:
    """The most probable entries whose running sum does not exceed `p`, renormalised. (b v) -> (b v).

    Unlike nucleus sampling, the entry that crosses `p` goes, except where it is the very first one: then it alone
    stays (`AudioLLM._post_decode`).
    """
    order = jnp.argsort(-probabilities, axis=-1, stable=True)
    mass = jnp.cumsum(jnp.take_along_axis(probabilities, order, axis=-1), axis=-1)
    is_first = jnp.arange(probabilities.shape[-1]) == 0
    keep_sorted = (mass <= p) | is_first
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    kept = jnp.where(keep, probabilities, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def filtered_probabilities(
    logits: jax.Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0
) -> jax.Array:
    """The distribution that the original text sampler draws from.

    Args:
      logits: (b v).
      temperature: divides the logits.
      top_k, top_p: applied in this order; 0 turns a filter off.

    Returns:
      (b v) float32, rows sum to one.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    if top_k > 0:
        probabilities = keep_top_k_probabilities(probabilities, top_k)
    if top_p > 0:
        probabilities = keep_top_p_probabilities(probabilities, top_p)
    return probabilities


def repetition_penalty(logits: jax.Array, recent: jax.Array, penalty: float) -> jax.Array:
    """Divides the logits of recent tokens, once for every time they occur.

    A plain division, as in the original: a negative logit is raised by it.

    Args:
      logits: (b v).
      recent: (b w) int32 ids; -1 = none.
      penalty: the divisor.

    Returns:
      (b v).
    """
    occurrences = jnp.sum(jax.nn.one_hot(recent, logits.shape[-1], dtype=logits.dtype), axis=1)
    return logits / penalty**occurrences
