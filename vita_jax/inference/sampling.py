"""How the next token is chosen. Each method is a frozen dataclass, so a compiled step can be kept per method.

Every method is called with logits (b v) of any float dtype and a random key, and returns (b,) int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.ops.sampling_filters import filtered_probabilities

# Given to the logits of tokens that must not be drawn.
REMOVED = float("-inf")


class Sampler(Protocol):
    """Chooses one token per row."""

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """logits: (b v), key: a random key -> (b,) int32."""


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """(b v) -> (b v): -inf for all but the `k` largest of each row (ties with the k-th stay)."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < threshold, REMOVED, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """(b v) -> (b v): -inf for all but the smallest set of most probable tokens whose mass reaches `p`.

    Nucleus sampling (arXiv 1904.09751).
    """
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep_sorted = mass_before < p  # the first token always stays: nothing is before it
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, REMOVED)


def _draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"temperature {temperature} must be above 0; for the most probable token use Greedy()")


@dataclass(frozen=True)
class Greedy:
    """The most probable token; the lowest id among equals."""

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


GREEDY = Greedy()


@dataclass(frozen=True)
class Temperature:
    """Draws from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        return _draw(logits.astype(jnp.float32) / self.temperature, key)


@dataclass(frozen=True)
class TopK:
    """Draws from the `k` most probable tokens."""

    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.k < 1:
            raise UserError(f"top-k {self.k} must be at least 1")

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        return _draw(keep_top_k(logits.astype(jnp.float32) / self.temperature, self.k), key)


@dataclass(frozen=True)
class TopP:
    """Draws from the smallest set of most probable tokens whose mass reaches `p`."""

    p: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not 0 < self.p <= 1:
            raise UserError(f"top-p {self.p} must be above 0 and at most 1")

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        return _draw(keep_top_p(logits.astype(jnp.float32) / self.temperature, self.p), key)


@dataclass(frozen=True)
class Filtered:
    """Temperature, then top-k, then top-p as the original text sampler of the speech models applies them.

    See `vita_jax.ops.sampling_filters`: its top-p also removes the token that crosses `p`.
    """

    temperature: float = 0.7
    top_k: int = 5
    top_p: float = 0.8

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} must be at least 1, or 0 for no such filter")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must be above 0 and at most 1, or 0 for no such filter")

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        probabilities = filtered_probabilities(logits, self.temperature, self.top_k, self.top_p)
        return _draw(jnp.log(probabilities), key)
