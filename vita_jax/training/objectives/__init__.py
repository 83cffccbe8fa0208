"""What a stage minimises. An objective is a tuple of pure functions, chosen by name from `OBJECTIVES`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vita_jax.models.vita import Vita, VitaInputs
from vita_jax.training.objectives.base import LossSums, Objective
from vita_jax.training.objectives.cell_naming import CELL_NAMING, multi_hot_loss
from vita_jax.training.objectives.language import (
    LANGUAGE_MODELING,
    TEXT_PRETRAINING,
    language_modeling_loss,
    model_inputs,
)
from vita_jax.training.objectives.recognition import CTC
from vita_jax.training.objectives.speech import CODEC, SPEECH_DECODER

__all__ = [
    "OBJECTIVES",
    "LossSums",
    "Objective",
    "init_extra",
    "init_model",
    "init_params",
    "language_modeling_loss",
    "model_inputs",
    "multi_hot_loss",
]

OBJECTIVES: dict[str, Objective] = {
    "language_modeling": LANGUAGE_MODELING,
    "text_pretraining": TEXT_PRETRAINING,
    "cell_naming": CELL_NAMING,
    "ctc": CTC,
    "codec": CODEC,
    "speech_decoder": SPEECH_DECODER,
}


def init_params(model: Vita, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Newly drawn parameters of the model and of the objective, boxed with their logical axes.

    The model's do not depend on the objective, so stages that start from scratch start from the same model.
    """
    return {**init_model(model, key), **init_extra(model, objective, key)}


def init_model(model: Vita, key: jax.Array) -> dict[str, Any]:
    """Those of the model."""
    size = model.config.vision.image_size
    row = jnp.zeros((1, 2), jnp.int32)
    inputs = VitaInputs(row, row, row, row - 1, jnp.zeros((1, 1, size, size, 3), jnp.uint8))
    return model.init(jax.random.split(key)[0], inputs)["params"]


def init_extra(model: Vita, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Those of the objective."""
    return objective.extra_params(model, jax.random.split(key)[1])
