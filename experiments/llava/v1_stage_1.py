"""LLaVA, stage 1: alignment. The projector alone, one matrix, learns to say pictures in the language
model's words.

    python -m vita_jax.train --config=experiments/llava/v1_stage_1.py --config.slice=v5e:4x8
    python -m vita_jax.plan --config=experiments/llava/v1_stage_1.py --config.slice=v5e:4x8 --topology=v5e:4x8

Trains the projector for one epoch of 595,000 captions, 128 a step, at 2e-3 (arXiv 2304.08485). A sample is the picture
and its caption, nothing else (template `plain`).
"""

from __future__ import annotations

from typing import Literal

from experiments.llava.curriculum import CAPTIONS, PROJECTOR, Scale, SliceName, one_stage, public_weights
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage


def stage(scale: Scale) -> Stage:
    """The stage at full size."""
    return Stage(
        "alignment",
        "1 alignment",
        PROJECTOR,
        (CAPTIONS,),
        steps=4650,
        learning_rate=2e-3,
        batch_size=32,
        row_length=1280,
        row_tiles=4,
        template="plain",
        start_from=public_weights("v1", scale),
    )


def get_config(
    size: Literal["smoke", "full"] = "full", scale: Scale = "7b", slice: SliceName = "v5p:2x2x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(stage(scale), "v1", scale, size, slice)
