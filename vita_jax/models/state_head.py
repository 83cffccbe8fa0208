"""Heads that read a state from the language model's hidden states: what kind of input it heard, or what to do next.

Three uses of one linear layer, `predictor_head` in the checkpoints:

* input head, three classes: a spoken query, sound that is not meant for the model, text (VITA-1.5, arXiv 2501.01957,
  stage 2.2; the released weights say the same by their first token instead);
* input head, two classes and an unused third (`vita_fo_qwen2.py`);
* dialogue states while listening, four or more classes, the last one unused (`AudioLLM`, Freeze-Omni).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.conversion.tables import Table, linear
from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense
from vita_jax.ops.losses import IGNORE_LABEL

INPUT_CLASSES = ("speech", "noise", "text")
# Label of class i: -101 - i. It stands where LM labels stand, so it lies beyond their "ignored" value, -100.
FIRST_STATE_LABEL = -101
# Class weights of the two-class layout; noise is rare, and the third class never occurs.
TWO_CLASS_WEIGHTS = (1.0, 5.0, 1.0)

DIALOGUE_STATES = ("cl", "ss", "el")  # continue listening, start speaking, end listening without an answer
DIALOGUE_THRESHOLD = 0.5


@dataclass(frozen=True)
class StateHeadConfig:
    """A state head.

    Attributes:
      hidden_size: d of the language model.
      num_classes: outputs, an unused last one included.
      class_weights: weight of each class in the loss; empty = all 1.
      place: which hidden states it reads: "answer", those right before each answer; "audio", those at the end of clips.
    """

    hidden_size: int
    num_classes: int = len(INPUT_CLASSES)
    class_weights: tuple[float, ...] = ()
    place: Literal["answer", "audio"] = "answer"

    def __post_init__(self) -> None:
        if self.place not in ("answer", "audio"):
            raise UserError(f"state head: place {self.place!r} is unknown; use 'answer' or 'audio'")
        if self.class_weights and len(self.class_weights) != self.num_classes:
            raise UserError(
                f"class_weights has {len(self.class_weights)} entries for {self.num_classes} classes; give one for each"
            )


def two_class_head(hidden_size: int) -> StateHeadConfig:
    """The layout of `vita_fo_qwen2.py`: effective audio, noise, and a class that is never a target."""
    return StateHeadConfig(hidden_size, len(TWO_CLASS_WEIGHTS), TWO_CLASS_WEIGHTS, "audio")


class StateHead(nn.Module):
    """Parameters: `predictor_head/{kernel (d c), bias}`."""

    config: StateHeadConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Hidden states after the final norm (... d) -> logits (... c)."""
        return Dense((self.config.num_classes,), ("embed", None), dtype=self.dtype, name="predictor_head")(hidden)


def weight_table(config: StateHeadConfig) -> Table:
    """Names in a checkpoint; paths are relative to the head's own parameters."""
    return Table(linear("predictor_head", "predictor_head", (config.hidden_size,), (config.num_classes,)))


def language_labels(labels: jax.Array) -> jax.Array:
    """The labels without the state labels among them, for the language model's loss; same shape."""
    return jnp.where(labels >= 0, labels, IGNORE_LABEL)


def state_loss(logits: jax.Array, labels: jax.Array, config: StateHeadConfig) -> tuple[jax.Array, jax.Array]:
    """Weighted cross entropy at the positions that carry a state label. Labels are not shifted.

    Args:
      logits: (b s c).
      labels: (b s) int; -101 - i asks for class i, everything from -100 up is ignored.

    Returns:
      (sum of weight * loss, sum of weights), both () float32; the loss is their quotient.
    """
    wanted = FIRST_STATE_LABEL - labels
    valid = wanted >= 0
    classes = jnp.where(valid, wanted, 0)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, classes[..., None], axis=-1)[..., 0]
    per_class = jnp.asarray(config.class_weights or (1.0,) * config.num_classes, jnp.float32)
    weights = jnp.where(valid, per_class[classes], 0.0)
    return -jnp.sum(weights * picked), jnp.sum(weights)


def dialogue_states(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next state of a listener.

    Args:
      logits: (b c) at the last position of a chunk, c >= 4; the last class is left out of the softmax.

    Returns:
      probabilities (b c-1) float32, and indices into `DIALOGUE_STATES` (b,) int32.

    Raises:
      UserError: fewer than four classes.
    """
    if logits.shape[-1] < len(DIALOGUE_STATES) + 1:
        raise UserError(f"dialogue states need at least {len(DIALOGUE_STATES) + 1} classes, not {logits.shape[-1]}")
    probabilities = jax.nn.softmax(logits[..., :-1].astype(jnp.float32), axis=-1)
    listen, speak, end = range(len(DIALOGUE_STATES))
    state = jnp.where(probabilities[..., speak] > DIALOGUE_THRESHOLD, speak, listen)
    state = jnp.where(probabilities[..., end] > DIALOGUE_THRESHOLD, end, state)
    return probabilities, state.astype(jnp.int32)
