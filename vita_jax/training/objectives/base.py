"""What an objective is: a tuple of pure functions. Axes: b rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vita_jax.training.families import Model

Batch = Mapping[str, jax.Array]
Params = Mapping[str, Any]


class LossSums(NamedTuple):
    """Sums over a batch; sums of micro-batches add up to those of the whole batch.

    Attributes:
      loss: () float32, summed loss.
      count: () float32, what the loss is divided by: answer tokens, or named cells.
      metrics: name -> (sum, count), both () float32.
      updates: flat path -> new value of a trainable parameter that is a statistic and not learnt by gradient; the step
        puts it in place of what the optimiser made of it. Micro-batches give the mean of their values.
    """

    loss: jax.Array
    count: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    updates: Mapping[str, jax.Array] = {}  # a dict because jax has to know it; never changed in place


class Objective(NamedTuple):
    """The functions of one objective.

    Attributes:
      loss: (model, params, batch, rng key) -> LossSums.
      batch_keys: arrays the objective reads from a batch.
      num_tokens: work in a host batch, for tokens per second.
      optional_keys: arrays it also reads where the batch has them.
      extra_params: (model, rng key) -> parameters beside those of the model, by component name, in Linen's boxes.
      extra_names: names of those components; dropped when the stage ends.
      decayed: pattern of the paths that weight decay acts on; None: the optimiser's own.
    """

    loss: Callable[[Model, Params, Batch, jax.Array], LossSums]
    batch_keys: tuple[str, ...]
    num_tokens: Callable[[Mapping[str, np.ndarray]], int]
    optional_keys: tuple[str, ...] = ()
    extra_params: Callable[[Model, jax.Array], dict[str, Any]] = lambda model, key: {}
    extra_names: tuple[str, ...] = ()
    decayed: re.Pattern[str] | None = None
