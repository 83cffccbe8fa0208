"""LLaVA-1.5, stage 2: instruction tuning, end to end with the tower frozen.

    python -m vita_jax.train --config=experiments/llava/v1_5_stage_2.py --config.slice=v5e:4x8
    python -m vita_jax.plan --config=experiments/llava/v1_5_stage_2.py --config.slice=v5e:4x8 --topology=v5e:4x8

Trains projector and language model for one epoch of the mixture of 665,000, 128 a step, which is about 64 packed rows,
at 2e-5 (arXiv 2310.03744). Pictures are padded to squares.
"""

from __future__ import annotations

from typing import Literal

from experiments.llava.curriculum import ALL_BUT_THE_TOWER, CONVERSATIONS, Scale, SliceName, one_stage, run_of
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage


def stage(scale: Scale) -> Stage:
    """The stage at full size."""
    return Stage(
        "tuning",
        "2 instruction tuning",
        ALL_BUT_THE_TOWER,
        (CONVERSATIONS,),
        steps=5200,
        learning_rate=2e-5,
        batch_size=64,
        row_length=2048,
        row_tiles=3,
        start_from=run_of("v1_5", scale, "alignment"),
    )


def get_config(
    size: Literal["smoke", "full"] = "full", scale: Scale = "7b", slice: SliceName = "v5p:2x2x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(stage(scale), "v1_5", scale, size, slice, aspect="pad")
