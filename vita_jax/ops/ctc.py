"""Connectionist temporal classification (Graves et al. 2006): loss, feasibility, greedy decoding.

Axes: b utterances, t encoder frames, v vocabulary with the blank, u target length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vita_jax.errors import UserError
from vita_jax.ops.masks import padding_mask

NO_TOKEN = -1  # padding of decoded rows


def ctc_feasible(input_lengths: jax.Array, targets: jax.Array, target_lengths: jax.Array) -> jax.Array:
    """Whether a target fits its input: one frame per label, and one blank between equal neighbours.

    Args:
      input_lengths: (b,) int, real frames.
      targets: (b u) int, padded on the right with anything.
      target_lengths: (b,) int.

    Returns:
      (b,) bool.
    """
    repeats = (targets[:, 1:] == targets[:, :-1]) & padding_mask(target_lengths - 1, targets.shape[1] - 1)
    return input_lengths >= target_lengths + jnp.sum(repeats, axis=1)


def ctc_loss(
    logits: jax.Array,
    input_lengths: jax.Array,
    targets: jax.Array,
    target_lengths: jax.Array,
    *,
    blank: int = 0,
    zero_infinity: bool = True,
) -> jax.Array:
    """Minus the log probability of each target, summed over its alignments; float32.

    Args:
      logits: (b t v), or log probabilities: the log-softmax inside changes neither them nor their gradient.
      input_lengths: (b,) int, real frames; others take no part.
      targets: (b u) int without blanks, padded on the right with anything in [0, v).
      target_lengths: (b,) int, may be 0.
      blank: id of the blank.
      zero_infinity: impossible targets (`ctc_feasible`) get loss and gradient 0 instead of infinity.

    Returns:
      (b,) float32.
    """
    feasible = ctc_feasible(input_lengths, targets, target_lengths)
    # optax picks the labels' probabilities by a matmul with one-hot rows, which must not round them.
    with jax.default_matmul_precision("highest"):
        losses = optax.ctc_loss(
            logits.astype(jnp.float32),
            1.0 - padding_mask(input_lengths, logits.shape[1]).astype(jnp.float32),
            targets,
            1.0 - padding_mask(target_lengths, targets.shape[1]).astype(jnp.float32),
            blank_id=blank,
        )
    return jnp.where(feasible, losses, 0.0 if zero_infinity else jnp.inf)


def reduce_ctc(losses: jax.Array, target_lengths: jax.Array, reduction: str = "batch") -> jax.Array:
    """One number of (b,) losses: () float32.

    Args:
      losses: (b,).
      target_lengths: (b,) int, for "mean".
      reduction: "batch": sum divided by the number of rows (the convention of the training stage); "sum"; "mean": of
        every loss divided by its target's length (torch's default).

    Raises:
      UserError: another reduction.
    """
    match reduction:
        case "batch":
            return jnp.sum(losses) / losses.shape[0]
        case "sum":
            return jnp.sum(losses)
        case "mean":
            return jnp.mean(losses / jnp.maximum(target_lengths, 1))
    raise UserError(f"CTC reduction {reduction!r} is unknown; use 'batch', 'sum' or 'mean'")


def ctc_greedy(scores: jax.Array, input_lengths: jax.Array, *, blank: int = 0) -> tuple[jax.Array, jax.Array]:
    """Best label per frame, equal neighbours merged, blanks removed.

    Args:
      scores: (b t v) logits or log probabilities.
      input_lengths: (b,) int.
      blank: id of the blank.

    Returns:
      tokens: (b t) int32, packed to the left, then -1.
      lengths: (b,) int32.
    """
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    previous = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
    kept = (best != previous) & (best != blank) & padding_mask(input_lengths, best.shape[1])
    lengths = jnp.sum(kept, axis=1, dtype=jnp.int32)
    order = jnp.argsort(~kept, axis=1, stable=True)
    packed = jnp.take_along_axis(best, order, axis=1)
    return jnp.where(padding_mask(lengths, best.shape[1]), packed, NO_TOKEN), lengths
