"""LLaVA on ScienceQA: from the aligned projector of stage 1 straight to school questions, reasoning before the answer.

    python -m data_pipelines.scienceqa --from ScienceQA --split train --records train.json
    python -m data_pipelines.build records --json train.json --root ScienceQA --output data/llava/scienceqa
    python -m vita_jax.train --config=experiments/llava/scienceqa.py --config.scale=13b --config.slice=v5e:4x8

Trains projector and language model for 12 epochs of 12,726 questions at 2e-5 (arXiv 2304.08485, section 5.2; its best
result is 13B's 90.92 %, from the features before the tower's last layer, as here). About half of the questions have a
picture; some five of them fill a row. Questions of the test, answers and their scoring: docs/llava.md.
"""

from __future__ import annotations

from typing import Literal

from experiments.llava.curriculum import ALL_BUT_THE_TOWER, Scale, SliceName, one_stage, run_of
from vita_jax.data.loader import SourceConfig
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

EPOCHS, QUESTIONS, QUESTIONS_OF_ROW = 12, 12_726, 5
ROWS = 32


def stage(scale: Scale) -> Stage:
    """The stage at full size."""
    return Stage(
        "scienceqa",
        "ScienceQA",
        ALL_BUT_THE_TOWER,
        (SourceConfig("scienceqa"),),
        steps=EPOCHS * QUESTIONS // (ROWS * QUESTIONS_OF_ROW),
        learning_rate=2e-5,
        batch_size=ROWS,
        row_length=2048,
        row_tiles=4,
        start_from=run_of("v1", scale, "alignment"),
    )


def get_config(
    size: Literal["smoke", "full"] = "full", scale: Scale = "7b", slice: SliceName = "v5p:2x2x2"
) -> ExperimentConfig:
    """The run; `slice` says what it is laid out for."""
    return one_stage(stage(scale), "v1", scale, size, slice)
