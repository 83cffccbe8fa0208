"""Objectives of the language model: the answers, all of the text, and the kind of input that a state head tells.

language_modeling: next-token cross entropy on the labelled (answer) tokens, through the whole model. If the batch has
state labels, the loss of the model's state head is added, as in `vita_fo_qwen2.py` (stage 2.2 of VITA-1.5).
text_pretraining: next-token cross entropy on all text tokens, with a small weight on those that are no answers. It
stands in for the public pre-training of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vita_jax.errors import UserError
from vita_jax.models.language.experts import ROUTER, dropped_assignments, router_logits
from vita_jax.models.state_head import FIRST_STATE_LABEL, state_loss
from vita_jax.models.vita import VitaInputs
from vita_jax.ops.experts import Balance, balance, dropped_share
from vita_jax.ops.losses import IGNORE_LABEL, next_token_scores, position_scores, shift_labels
from vita_jax.training.families import Model
from vita_jax.training.objectives.base import Batch, LossSums, Objective, Params

# Positions of a row whose logits exist at one time in the language loss.
LOSS_CHUNK = 512
# Answers are a small part of most rows, so even short rows have chunks to pass over.
LEAST_CHUNKS = 4
# Weight of a token that is no answer in `text_pretraining`. Prompts are mostly random here, but predicting them makes
# words of one kind alike, after which looking them up is learnt several times faster.
PROMPT_WEIGHT = 0.08


class ExpertUse(NamedTuple):
    """How experts were used in a batch: evenly or not, and the share of assignments that found no room, () float32, or
    None where there is room for all.
    """

    balance: Balance
    dropped: jax.Array | None


def model_inputs(batch: Batch) -> VitaInputs:
    """The model's part of a batch; `audio` and `audio_lengths` are optional."""
    names = ["tokens", "positions", "segment_ids", "feature_index", "tiles"]
    names += [name for name in ("audio", "audio_lengths") if name in batch]
    return VitaInputs(**{name: batch[name] for name in names})


def loss_axes() -> dict[str, PartitionSpec]:
    """What the current rule table says about the loss: arguments of `next_token_scores` and `position_scores`."""
    return {
        "row_axes": nn.logical_to_mesh_axes(("batch", "length")),
        "kernel_axes": nn.logical_to_mesh_axes(("embed", "vocab")),
    }


def language_modeling_loss(model: Model, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Next-token cross entropy of the answers, and what the state head has to tell.

    Args:
      model: the composition.
      params: nested parameters.
      batch: `tokens`, `labels`, `positions`, `segment_ids`, `feature_index` (b s) and `tiles` (b t S S 3); where there
        is sound `audio` (b a f m) and `audio_lengths` (b a); where the head trains `state_labels` (b s).
      key: for dropout, drop path and the chunks of the audio encoder.

    Returns:
      Sums over answer tokens; metric `accuracy`: share of them that the largest logit gets right. With state labels the
      mean loss of the head is added to the mean loss of the answers (of this batch, or micro-batch); metrics
      `state_loss` and `state_accuracy`. With a mixture of experts also what `_with_balance` adds.
    """
    hidden, used = _hidden_states(model, params, batch, key)
    kernel = params["language"]["lm_head"]["kernel"]
    chunk = min(LOSS_CHUNK, -(-hidden.shape[1] // LEAST_CHUNKS))
    loss, count, correct = next_token_scores(
        hidden, kernel, batch["labels"], batch["segment_ids"], chunk_size=chunk, **loss_axes()
    )
    metrics = {"accuracy": (correct, count)}
    if "state_labels" in batch:
        head_loss, weight, state_metrics = _state_sums(model, params, batch["state_labels"], hidden)
        loss = loss + head_loss * count / jnp.maximum(weight, 1e-6)
        metrics |= state_metrics
    return _with_balance(model, LossSums(loss, count, metrics), used)


def _state_sums(
    model: Model, params: Params, labels: jax.Array, hidden: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Summed loss of the state head, summed weights, and metrics. labels (b s), hidden (b s d)."""
    if model.config.state_head is None:
        raise UserError("the batch has state labels, but the model has no state head; set the model's `state_head`")
    logits = model.apply({"params": {"state_head": params["state_head"]}}, hidden, method="state_logits")
    loss, weight = state_loss(logits, labels, model.config.state_head)
    wanted = FIRST_STATE_LABEL - labels
    correct = jnp.sum((wanted >= 0) & (jnp.argmax(logits, axis=-1) == wanted), dtype=jnp.float32)
    number = jnp.sum(wanted >= 0, dtype=jnp.float32)
    return loss, weight, {"state_loss": (loss, weight), "state_accuracy": (correct, number)}


def text_pretraining_loss(model: Model, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Next-token cross entropy of answers, and with `PROMPT_WEIGHT` of all other text.

    Args and returns: as `language_modeling_loss`; `count` is the sum of the weights, the metric is that of the answers.
    """
    hidden, used = _hidden_states(model, params, batch, key)
    kernel = params["language"]["lm_head"]["kernel"]
    text = jnp.where(batch["feature_index"] < 0, batch["tokens"], IGNORE_LABEL)
    targets = shift_labels(text, batch["segment_ids"])
    answers = (shift_labels(batch["labels"], batch["segment_ids"]) != IGNORE_LABEL).astype(jnp.float32)
    others = (targets != IGNORE_LABEL) - answers
    losses, correct = position_scores(hidden, kernel, targets, chunk_size=LOSS_CHUNK, **loss_axes())
    weights = answers + PROMPT_WEIGHT * others
    accuracy = (jnp.sum(correct * answers), jnp.sum(answers))
    sums = LossSums(jnp.sum(losses * weights), jnp.sum(weights), {"accuracy": accuracy})
    return _with_balance(model, sums, used)


def _hidden_states(model: Model, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, ExpertUse | None]:
    """Hidden states (b s d); and how experts are used by what is not padding, if there are experts."""
    inputs, rngs, language = model_inputs(batch), {"dropout": key}, model.config.language
    if not language.num_experts:
        return model.apply({"params": params}, inputs, deterministic=False, rngs=rngs), None
    hidden, kept = model.apply({"params": params}, inputs, deterministic=False, rngs=rngs, mutable=[ROUTER])
    number, mask, dropped = language.experts_per_token, batch["segment_ids"], dropped_assignments(kept)
    share = None if dropped is None else dropped_share(dropped, number, mask)
    return hidden, ExpertUse(balance(router_logits(kept), number, mask), share)


def _with_balance(model: Model, sums: LossSums, used: ExpertUse | None) -> LossSums:
    """Adds the load-balancing loss with the config's weight, and metrics of a mixture of experts.

    The metrics are `router_balance`, the loss without its weight; for every expert `expert_load_<number>`, its share of
    all assignments; and where buffers are bounded `dropped`, the share of all assignments that found no room. All are
    means over a batch, so they count by the batch's answers like the loss itself.
    """
    if used is None:
        return sums
    loads = {f"expert_load_{i}": load for i, load in enumerate(used.balance.load)}
    metrics = {"router_balance": used.balance.loss, **loads}
    if used.dropped is not None:
        metrics["dropped"] = used.dropped
    weighted = {name: (value * sums.count, sums.count) for name, value in metrics.items()}
    weight = model.config.language.router_aux_loss_coef
    loss = sums.loss + weight * used.balance.loss * sums.count if weight else sums.loss
    return LossSums(loss, sums.count, {**sums.metrics, **weighted})


def _row_tokens(batch: Mapping[str, np.ndarray]) -> int:
    return int(np.count_nonzero(batch["segment_ids"]))


LANGUAGE_KEYS = ("tokens", "labels", "positions", "segment_ids", "feature_index", "tiles")
AUDIO_KEYS = ("audio", "audio_lengths")

LANGUAGE_MODELING = Objective(
    language_modeling_loss, LANGUAGE_KEYS, _row_tokens, optional_keys=(*AUDIO_KEYS, "state_labels")
)
TEXT_PRETRAINING = Objective(text_pretraining_loss, LANGUAGE_KEYS, _row_tokens, optional_keys=AUDIO_KEYS)
