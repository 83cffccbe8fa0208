"""What a stage minimises. An objective is a tuple of pure functions, chosen by name from `OBJECTIVES`.

language_modeling: next-token cross entropy on the labelled (answer) tokens, through the whole model.
text_pretraining: the same on all text tokens, with a small weight on those that are no answers. It stands in for the
public pre-training of the language model.
cell_naming: every visual token of the tower names the words that describe what its cell shows. It stands in for the
public pre-training of the vision tower; its linear head is thrown away at the end of the stage.
ctc: see `recognition_objective`. codec, speech_decoder: see `speech_objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.models.vita import Vita, VitaInputs
from vita_jax.nn.layers import Dense
from vita_jax.ops.losses import IGNORE_LABEL, next_token_scores, position_scores, shift_labels
from vita_jax.training.objective import Batch, LossSums, Objective, Params
from vita_jax.training.recognition_objective import CTC
from vita_jax.training.speech_objectives import CODEC, SPEECH_DECODER

NAMING_HEAD = "naming_head"
# Positions whose logits exist at one time in the language loss.
LOSS_CHUNK = 512
# Weight of a token that is no answer in `text_pretraining`. Prompts are mostly random here, but predicting them makes
# words of one kind alike, after which looking them up is learnt several times faster.
PROMPT_WEIGHT = 0.08


# ---------------------------------------------------------------------------------------------------------------------
# Language modelling
# ---------------------------------------------------------------------------------------------------------------------


def model_inputs(batch: Batch) -> VitaInputs:
    """The model's part of a batch; `audio` and `audio_lengths` are optional."""
    names = ["tokens", "positions", "segment_ids", "feature_index", "tiles"]
    names += [name for name in ("audio", "audio_lengths") if name in batch]
    return VitaInputs(**{name: batch[name] for name in names})


def language_modeling_loss(model: Vita, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Next-token cross entropy of the answers.

    Args:
      model: the composition.
      params: nested parameters.
      batch: `tokens`, `labels`, `positions`, `segment_ids`, `feature_index` (b s) and `tiles` (b t S S 3).
      key: for drop path.

    Returns:
      Sums over answer tokens; metric `accuracy`: share of them that the largest logit gets right.
    """
    hidden, kernel = _hidden_states(model, params, batch, key), params["language"]["lm_head"]["kernel"]
    loss, count, correct = next_token_scores(
        hidden, kernel, batch["labels"], batch["segment_ids"], chunk_size=LOSS_CHUNK
    )
    return LossSums(loss, count, {"accuracy": (correct, count)})


def text_pretraining_loss(model: Vita, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Next-token cross entropy of answers, and with `PROMPT_WEIGHT` of all other text.

    Args and returns: as `language_modeling_loss`; `count` is the sum of the weights, the metric is that of the answers.
    """
    hidden, kernel = _hidden_states(model, params, batch, key), params["language"]["lm_head"]["kernel"]
    text = jnp.where(batch["feature_index"] < 0, batch["tokens"], IGNORE_LABEL)
    targets = shift_labels(text, batch["segment_ids"])
    answers = (shift_labels(batch["labels"], batch["segment_ids"]) != IGNORE_LABEL).astype(jnp.float32)
    others = (targets != IGNORE_LABEL) - answers
    losses, correct = position_scores(hidden, kernel, targets, chunk_size=LOSS_CHUNK)
    weights = answers + PROMPT_WEIGHT * others
    accuracy = (jnp.sum(correct * answers), jnp.sum(answers))
    return LossSums(jnp.sum(losses * weights), jnp.sum(weights), {"accuracy": accuracy})


def _hidden_states(model: Vita, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    model_params = {name: tree for name, tree in params.items() if name != NAMING_HEAD}
    return model.apply({"params": model_params}, model_inputs(batch), deterministic=False, rngs={"dropout": key})


# ---------------------------------------------------------------------------------------------------------------------
# Cell naming
# ---------------------------------------------------------------------------------------------------------------------


def _naming_head(model: Vita) -> Dense:
    return Dense((model.config.language.vocab_size,), axes=("embed", "vocab"), dtype=model.dtype)


def naming_head_params(model: Vita, key: jax.Array) -> dict[str, Any]:
    """The throw-away head, (4c v): boxed, under `naming_head`.

    Its bias starts where every word is as unlikely as one word in the vocabulary, so that the loss starts with what the
    cells show and not with learning that most words are absent.
    """
    width, vocab = model.config.vision.output_size, model.config.language.vocab_size
    params = _naming_head(model).init(key, jnp.zeros((1, width), model.dtype))["params"]
    bias = params["bias"]
    return {
        NAMING_HEAD: {**params, "bias": bias.replace_boxed(jnp.full((vocab,), -jnp.log(float(vocab)), jnp.float32))}
    }


def cell_naming_loss(model: Vita, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Binary cross entropy of every vocabulary word, summed over the words, per named cell.

    Args:
      model: the composition; only its tower runs.
      params: nested parameters with `naming_head`.
      batch: `tiles` (b t S S 3) and `cell_names` (b t*k m) int32: the words of each visual token, in any order, padded
        with -1. A token whose entries are all -1 is left out.
      key: for drop path.

    Returns:
      Sums over cells; metric `accuracy`: share of cells whose m most likely words are exactly their m words.
    """
    tiles, names = batch["tiles"], batch["cell_names"]
    if tiles.shape[1] == 0:
        raise UserError(
            "objective 'cell_naming' needs pictures, but the rows hold no tiles; set row_tiles of the stage above 0"
        )
    features = model.apply(
        {"params": {"vision": params["vision"]}},
        rearrange(tiles, "b t ... -> (b t) ..."),
        deterministic=False,
        method="tower_features",
        rngs={"dropout": key},
    )
    if names.shape[1] != tiles.shape[1] * features.shape[1]:
        raise UserError(
            f"cell_names has {names.shape[1]} cells per row, but {tiles.shape[1]} tiles "
            f"have {tiles.shape[1] * features.shape[1]}"
        )
    logits = _naming_head(model).apply({"params": params[NAMING_HEAD]}, features).astype(jnp.float32)
    return multi_hot_loss(rearrange(logits, "n k v -> (n k) v"), rearrange(names, "b k m -> (b k) m"))


def multi_hot_loss(logits: jax.Array, names: jax.Array) -> LossSums:
    """Sigmoid cross entropy against sets of words, without ever making the multi-hot targets.

    Args:
      logits: (n v) float32.
      names: (n m) int32 words, padded with -1; a repeated word counts once; rows of -1 are left out.

    Returns:
      Sums over rows, see `cell_naming_loss`.
    """
    is_word = names >= 0
    repeats = jnp.tril(names[:, :, None] == names[:, None, :], k=-1).any(axis=-1)
    is_word = is_word & ~repeats
    named = is_word.any(axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(names, 0), axis=-1)
    # BCE with logits is softplus(x) for an absent word and softplus(x) - x for a present one.
    losses = jax.nn.softplus(logits).sum(axis=-1) - jnp.where(is_word, picked, 0.0).sum(axis=-1)
    loss = jnp.where(named, losses, 0.0).sum()
    count = named.sum(dtype=jnp.float32)
    # The words are the m most likely ones exactly if no other logit reaches the lowest of theirs.
    lowest = jnp.where(is_word, picked, jnp.inf).min(axis=-1, keepdims=True)
    reached = jnp.sum(jax.lax.stop_gradient(logits) >= jax.lax.stop_gradient(lowest), axis=-1)
    correct = (named & (reached == is_word.sum(axis=-1))).sum(dtype=jnp.float32)
    return LossSums(loss, count, {"accuracy": (correct, count)})


def _row_tokens(batch: Mapping[str, np.ndarray]) -> int:
    return int(np.count_nonzero(batch["segment_ids"]))


def _named_cells(batch: Mapping[str, np.ndarray]) -> int:
    return int(np.count_nonzero((batch["cell_names"] >= 0).any(axis=-1)))


def _no_extra_params(model: Vita, key: jax.Array) -> dict[str, Any]:
    return {}


LANGUAGE_KEYS = ("tokens", "labels", "positions", "segment_ids", "feature_index", "tiles")

OBJECTIVES: dict[str, Objective] = {
    "language_modeling": Objective(language_modeling_loss, _no_extra_params, (), LANGUAGE_KEYS, _row_tokens),
    "text_pretraining": Objective(text_pretraining_loss, _no_extra_params, (), LANGUAGE_KEYS, _row_tokens),
    "cell_naming": Objective(
        cell_naming_loss, naming_head_params, (NAMING_HEAD,), ("tiles", "cell_names"), _named_cells
    ),
    "ctc": CTC,
    "codec": CODEC,
    "speech_decoder": SPEECH_DECODER,
}


def init_params(model: Vita, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Newly drawn parameters of the model and of the objective, boxed with their logical axes.

    The model's do not depend on the objective, so stages that start from scratch start from the same model.
    """
    size = model.config.vision.image_size
    row = jnp.zeros((1, 2), jnp.int32)
    inputs = VitaInputs(row, row, row, row - 1, jnp.zeros((1, 1, size, size, 3), jnp.uint8))
    model_key, extra_key = jax.random.split(key)
    params = model.init(model_key, inputs)["params"]
    return {**params, **objective.extra_params(model, extra_key)}
