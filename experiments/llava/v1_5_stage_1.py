"""LLaVA-1.5, stage 1: alignment. The projector alone, two layers, learns to say pictures in the language
model's words.

    python -m vita_jax.train --config=experiments/llava/v1_5_stage_1.py --config.slice=v5e:4x8
    python -m vita_jax.plan --config=experiments/llava/v1_5_stage_1.py --config.slice=v5e:4x8 --topology=v5e:4x8

Trains the projector for one epoch of 558,000 captions, 256 a step, at 1e-3 (arXiv 2310.03744). A sample is the picture
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
        steps=2180,
        learning_rate=1e-3,
        batch_size=64,
        row_length=2560,
        row_tiles=4,
        template="plain",
        start_from=public_weights("v1_5", scale),
    )


def get_config(
    size: Literal["smoke", "full"] = "full", scale: Scale = "7b", slice: SliceName = "v5p:2x2x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(stage(scale), "v1_5", scale, size, slice)
