"""VITA-1.0, stage 1: bilingual tuning of Mixtral-8x7B on its enlarged vocabulary.

    python -m vita_jax.train --config=experiments/vita_1_0/stage_1.py --config.slice=v5p:4x4x8
    python -m vita_jax.plan --config=experiments/vita_1_0/stage_1.py --config.slice=v5p:4x4x8 --topology=v5p:4x4x8

Trains the language model, on 5 M bilingual conversations (arXiv 2408.05211, section 3.1). No script was released; rate
and batch are those of the later tuning.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_0.curriculum import ROW_LENGTH, TEXT, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "bilingual_text",
    "1 bilingual text",
    ("^language/",),
    (TEXT,),
    steps=4000,
    learning_rate=2e-5,
    batch_size=256,
    row_length=ROW_LENGTH,
    row_tiles=0,
    start_from="runs/public/mixtral_zh",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v6e:16x16", "v5p:4x4x8", "one"] = "v5p:4x4x8"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
