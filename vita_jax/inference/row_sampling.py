"""How the next token of every row is chosen where each row has settings and draws of its own.

One compiled step serves rows with different samplers, because the settings are arrays. A row draws what its sampler
would draw alone from the same key (`sampling.py`); what the other rows do changes nothing.

Axes: b rows, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.inference.sampling import REMOVED, Filtered, Greedy, Sampler, Temperature, TopK, TopP


@dataclass(frozen=True)
class Penalties:
    """What tokens that the answer has already are less likely by; the defaults change nothing.

    Attributes:
      repetition: positive logits of such tokens are divided by it, negative ones multiplied (arXiv 1909.05858, section
        4.1).
      presence: subtracted from their logits once.
      frequency: subtracted once for every time they occur.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        if not self.repetition > 0:
            raise UserError(f"repetition penalty {self.repetition} must be above 0; 1 has no effect")


NO_PENALTIES = Penalties()


@struct.dataclass
class RowSampling:
    """Settings of every row; each (b,), or () for one row.

    Attributes:
      temperature: float32; 0 takes the most probable token.
      top_k: int32, 0 = no such filter.
      top_p: float32, 1 = no such filter.
      original: bool; the filters keep what those of `Filtered` keep: exactly k, and not the token that crosses p.
      repetition, presence, frequency: float32, see `Penalties`.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    original: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


def row_sampling(sampler: Sampler, penalties: Penalties = NO_PENALTIES) -> RowSampling:
    """The settings of one row, as numpy scalars.

    Raises:
      UnsupportedOption: a sampler of another kind.
    """
    top_k, top_p = 0, 1.0
    match sampler:
        case Greedy():
            temperature = 0.0
        case Temperature():
            temperature = sampler.temperature
        case TopK():
            temperature, top_k = sampler.temperature, sampler.k
        case TopP():
            temperature, top_p = sampler.temperature, sampler.p
        case Filtered():
            # Its 0 means no such filter, and at 1 only rounding would decide what goes.
            temperature, top_k, top_p = sampler.temperature, sampler.top_k, sampler.top_p or 1.0
        case _:
            raise UnsupportedOption(
                f"sampler {sampler!r} has no settings that rows could share a step with; use one of "
                "vita_jax.inference.sampling"
            )
    return RowSampling(
        temperature=np.float32(temperature),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        original=np.bool_(isinstance(sampler, Filtered)),
        repetition=np.float32(penalties.repetition),
        presence=np.float32(penalties.presence),
        frequency=np.float32(penalties.frequency),
    )


def greedy_rows(batch: int) -> RowSampling:
    """Settings of b rows that nobody has set yet."""
    return jax.tree.map(lambda x: np.full((batch,), x), row_sampling(Greedy()))


def penalised(logits: jax.Array, counts: jax.Array, sampling: RowSampling) -> jax.Array:
    """Logits after the penalties: (b v) float32, and how often the answer has each token, (b v) int -> (b v)."""
    repetition, presence, frequency = (x[:, None] for x in (sampling.repetition, sampling.presence, sampling.frequency))
    seen = counts > 0
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return jnp.where(seen, repeated, logits) - presence * seen - frequency * counts


def filtered(logits: jax.Array, sampling: RowSampling) -> jax.Array:
    """-inf for the tokens that top-k and then top-p remove: (b v) float32, already divided by temperature -> (b v)."""
    vocabulary = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocabulary)[None]
    original, top_p = sampling.original[:, None], sampling.top_p[:, None]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)[:, None]
    # Tokens as probable as the k-th stay, except with the original's filters.
    among = jnp.where(original, rank < k, ordered >= jnp.take_along_axis(ordered, k - 1, axis=-1))
    probabilities = jax.nn.softmax(jnp.where(among, ordered, REMOVED), axis=-1)
    mass = jnp.cumsum(probabilities, axis=-1)
    keep = jnp.where(original, (mass <= top_p) | (rank == 0), mass - probabilities < top_p)
    keep = among & (keep | (top_p >= 1))
    return jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), logits, REMOVED)


def draw_rows(logits: jax.Array, sampling: RowSampling, keys: jax.Array, counts: jax.Array) -> jax.Array:
    """One token of every row.

    Args:
      logits: (b v).
      sampling: settings (b,).
      keys: (b,) random keys.
      counts: (b v) int, how often the row's answer has each token.

    Returns:
      (b,) int32.
    """
    logits = penalised(logits.astype(jnp.float32), counts, sampling)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawing = sampling.temperature > 0

    def draw() -> jax.Array:
        scaled = logits / jnp.where(drawing, sampling.temperature, 1.0)[:, None]
        # Sorting a large vocabulary costs more than the rest, so it is left out where no row filters.
        filters = drawing & ((sampling.top_k > 0) | (sampling.top_p < 1))
        kept = jax.lax.cond(jnp.any(filters), lambda: filtered(scaled, sampling), lambda: scaled)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(drawing, drawn, greedy)

    return jax.lax.cond(jnp.any(drawing), draw, lambda: greedy)
