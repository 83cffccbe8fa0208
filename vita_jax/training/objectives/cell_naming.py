"""Cell naming: every visual token of the tower names the words that describe what its cell shows.

It stands in for the public pre-training of the vision tower; its linear head is thrown away at the end of the stage.
Axes: b rows, t tiles, k tokens per tile, m words per name, c channels of the tower, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense
from vita_jax.training.families import Model, family_of
from vita_jax.training.objectives.base import Batch, LossSums, Objective, Params

NAMING_HEAD = "naming_head"


def _naming_head(model: Model) -> Dense:
    return Dense((model.config.language.vocab_size,), axes=("embed", "vocab"), dtype=model.dtype)


def naming_head_params(model: Model, key: jax.Array) -> dict[str, Any]:
    """The throw-away head, (4c v): boxed, under `naming_head`.

    Its bias starts where every word is as unlikely as one word in the vocabulary, so that the loss starts with what the
    cells show and not with learning that most words are absent.
    """
    width, vocab = family_of(model.config).tower_size(model.config), model.config.language.vocab_size
    params = _naming_head(model).init(key, jnp.zeros((1, width), model.dtype))["params"]
    bias = params["bias"]
    return {
        NAMING_HEAD: {**params, "bias": bias.replace_boxed(jnp.full((vocab,), -jnp.log(float(vocab)), jnp.float32))}
    }


def cell_naming_loss(model: Model, params: Params, batch: Batch, key: jax.Array) -> LossSums:
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


def _named_cells(batch: Mapping[str, np.ndarray]) -> int:
    return int(np.count_nonzero((batch["cell_names"] >= 0).any(axis=-1)))


CELL_NAMING = Objective(
    cell_naming_loss,
    batch_keys=("tiles", "cell_names"),
    num_tokens=_named_cells,
    extra_params=naming_head_params,
    extra_names=(NAMING_HEAD,),
)
