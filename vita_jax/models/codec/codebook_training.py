"""Codebooks by moving averages, with restart of dead entries (VQ-VAE, arXiv 1711.00937, appendix A.1).

Each entry is the mean of the vectors that chose it, over the last steps. An entry that hardly any vector chooses is put
onto a vector of the batch. So the first step takes the codebook from the data, and later ones keep all of it in use;
moved by the loss alone, as in the original, a small codebook trained for minutes ends with a few entries in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.errors import UserError


@dataclass(frozen=True)
class CodebookTraining:
    """How a codebook follows its inputs.

    Attributes:
      decay: of the averages, per step.
      dead_share: an entry chosen less often than this share of the mean is dead.
      ease_in: steps over which the chosen entries take the place of what was encoded, little by little. Where they do
        so at once, an encoder that has learnt nothing often falls to a few entries that say nothing, and stays there
        for a thousand steps and more. Counted from the start of the stage; 0 = at once, for a codec that goes on.
    """

    decay: float = 0.98
    dead_share: float = 0.1
    ease_in: int = 0

    def __post_init__(self) -> None:
        for name, value in (("decay", self.decay), ("dead_share", self.dead_share)):
            if not 0 <= value < 1:
                raise UserError(f"{name} {value} must be at least 0 and below 1")
        if self.ease_in < 0:
            raise UserError(f"ease_in {self.ease_in} must be at least 0")

    def share(self, step: jax.Array) -> jax.Array:
        """How far the entries have taken the place of what was encoded: () step -> () in 0 .. 1."""
        return jnp.minimum(1.0, step / self.ease_in) if self.ease_in else jnp.ones(())


@struct.dataclass
class CodebookState:
    """Averages of one codebook: `counts` (n,), how many vectors of a step chose each entry; `sums` (n d), of them."""

    counts: jax.Array
    sums: jax.Array


def fresh_state(num_codes: int, width: int) -> CodebookState:
    """Nothing seen yet: every entry is dead, so the first step places all of them."""
    return CodebookState(jnp.zeros((num_codes,)), jnp.zeros((num_codes, width)))


def follow(
    state: CodebookState, vectors: jax.Array, codes: jax.Array, key: jax.Array, config: CodebookTraining
) -> tuple[CodebookState, jax.Array]:
    """One step of the averages.

    Args:
      state: before the step.
      vectors: (... d), what was quantised.
      codes: (...) int32, the entries they were given.
      key: draws the vectors that dead entries are put onto, different ones as far as there are enough.

    Returns:
      The state and the codebook (n d) after the step.
    """
    num_codes, width = state.sums.shape
    vectors, codes = jax.lax.stop_gradient(vectors).reshape(-1, width), codes.reshape(-1)
    chosen = jax.nn.one_hot(codes, num_codes)
    counts = config.decay * state.counts + (1 - config.decay) * jnp.sum(chosen, axis=0)
    sums = config.decay * state.sums + (1 - config.decay) * (chosen.T @ vectors)
    mean = len(vectors) / num_codes
    dead = counts < config.dead_share * mean
    order = jax.random.permutation(key, len(vectors))
    placed = vectors[order[jnp.arange(num_codes) % len(vectors)]]
    counts = jnp.where(dead, mean, counts)
    sums = jnp.where(dead[:, None], mean * placed, sums)
    return CodebookState(counts, sums), sums / counts[:, None]


def perplexity(counts: jax.Array) -> jax.Array:
    """Number of entries in use, as the exponential of the entropy of how often each is chosen: (n,) -> () float32."""
    share = counts / jnp.maximum(jnp.sum(counts), 1e-9)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0)))
