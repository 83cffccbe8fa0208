"""The objective of Flamingo: next-token cross entropy on several data sets at once (arXiv 2204.14198, section 3.2;
`open_flamingo/train/train_utils.py`).

Every step has one batch of each data set; the loss is the weighted sum of their means, which is what accumulating the
gradients of weighted means gives. Of the embedding table only the rows of tokens that the language model did not have
before are learnt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.mixture import DataSet
from vita_jax.models.flamingo import Flamingo, FlamingoInputs
from vita_jax.ops.losses import IGNORE_LABEL, next_token_scores
from vita_jax.training.objectives.base import Batch, LossSums, Objective, Params
from vita_jax.training.objectives.language import loss_axes

INPUT_KEYS = ("tokens", "positions", "segment_ids", "media_times", "images")
# Weights of open_flamingo: captioned pictures and interleaved documents.
OPEN_WEIGHTS = {"pairs": 0.2, "interleaved": 1.0}
# What trains, and what of it decays, as patterns of parameter paths.
TRAINED = re.compile(r"^(resampler|cross_attention)/|^language/embed_tokens/embedding$")
DECAYED = re.compile(r"^cross_attention/")
LOSS_CHUNK = 512


def flamingo_loss(
    model: Flamingo,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    weights: Mapping[str, float],
    new_tokens: tuple[int, ...] | None = None,
) -> LossSums:
    """The weighted sum of the mean losses of several data sets.

    Args:
      model: the composition.
      params: nested parameters.
      batch: for every data set `<name>/<key>`: the fields of `FlamingoInputs`, and `labels` (b s).
      key: unused; nothing is random.
      weights: name of a data set -> its weight.
      new_tokens: ids whose embeddings are learnt; None: all.

    Returns:
      The sum with count 1, so that micro-batches give the mean of theirs; metrics `<name>_loss` and `<name>_accuracy`
      over labelled tokens.
    """
    del key
    if new_tokens is not None:
        table = rows_that_train(params["language"]["embed_tokens"]["embedding"], new_tokens)
        params = {**params, "language": {**params["language"], "embed_tokens": {"embedding": table}}}
    total, metrics = jnp.zeros((), jnp.float32), {}
    for name, weight in weights.items():
        inputs = FlamingoInputs(**{field: batch[f"{name}/{field}"] for field in INPUT_KEYS})
        hidden = model.apply({"params": params}, inputs)
        kernel = params["language"]["lm_head"]["kernel"]
        loss, count, correct = next_token_scores(
            hidden, kernel, batch[f"{name}/labels"], inputs.segment_ids, chunk_size=LOSS_CHUNK, **loss_axes()
        )
        total = total + weight * loss / jnp.maximum(count, 1.0)
        metrics |= {f"{name}_loss": (loss, count), f"{name}_accuracy": (correct, count)}
    return LossSums(total, jnp.ones((), jnp.float32), metrics)


@lru_cache(maxsize=64)  # one object for equal stages, by which traces are known again
def flamingo_objective(sets: tuple[DataSet, ...], trained_tokens: tuple[int, ...]) -> Objective:
    """The objective of a stage.

    Args:
      sets: its data sets.
      trained_tokens: ids whose embeddings are learnt, where the stage trains the table at all; (): all.
    """
    weights = {one.name: one.weight for one in sets}
    keys = tuple(f"{name}/{field}" for name in weights for field in (*INPUT_KEYS, "labels"))

    def learnt_tokens(batch: Mapping[str, np.ndarray]) -> int:
        return sum(int(np.count_nonzero(batch[f"{name}/labels"] != IGNORE_LABEL)) for name in weights)

    loss = partial(flamingo_loss, weights=weights, new_tokens=trained_tokens or None)
    return Objective(loss, keys, learnt_tokens, decayed=DECAYED)


def rows_that_train(table: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """The same table (v d), through which gradients reach the given rows only."""
    learnt = jnp.zeros((table.shape[0], 1), bool).at[jnp.asarray(rows)].set(True)
    return jnp.where(learnt, table, jax.lax.stop_gradient(table))
