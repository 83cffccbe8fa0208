"""What a stage minimises. An objective is a tuple of pure functions, chosen by name from `OBJECTIVES`."""

from __future__ import annotations

from typing import Any

import jax

from vita_jax.training.families import Model, family_of
from vita_jax.training.objectives.base import LossSums, Objective
from vita_jax.training.objectives.cell_naming import CELL_NAMING, multi_hot_loss
from vita_jax.training.objectives.flamingo import flamingo_objective
from vita_jax.training.objectives.language import (
    LANGUAGE_MODELING,
    TEXT_PRETRAINING,
    language_modeling_loss,
    model_inputs,
)
from vita_jax.training.objectives.recognition import CTC
from vita_jax.training.objectives.speech import CODEC, SPEECH_DECODER
from vita_jax.training.stages import Stage

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
    "objective_of",
]

OBJECTIVES: dict[str, Objective] = {
    "language_modeling": LANGUAGE_MODELING,
    "text_pretraining": TEXT_PRETRAINING,
    "cell_naming": CELL_NAMING,
    "ctc": CTC,
    "codec": CODEC,
    "speech_decoder": SPEECH_DECODER,
    "flamingo": flamingo_objective((), ()),  # of no data set yet, see `objective_of`
}


def objective_of(stage: Stage) -> Objective:
    """What a stage minimises; Flamingo's depends on the data sets of the stage."""
    if stage.objective == "flamingo":
        return flamingo_objective(stage.sets, stage.trained_tokens)
    return OBJECTIVES[stage.objective]


def init_params(model: Model, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Newly drawn parameters of the model and of the objective, boxed with their logical axes.

    The model's do not depend on the objective, so stages that start from scratch start from the same model.
    """
    return {**init_model(model, key), **init_extra(model, objective, key)}


def init_model(model: Model, key: jax.Array) -> dict[str, Any]:
    """Those of the model."""
    inputs = family_of(model.config).inputs(model.config)
    return model.init(jax.random.split(key)[0], inputs)["params"]


def init_extra(model: Model, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Those of the objective."""
    return objective.extra_params(model, jax.random.split(key)[1])
