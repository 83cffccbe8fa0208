"""VITA-1.0, stage 2a: vision alignment. The visual adapter learns, alone.

    python -m vita_jax.train --config=experiments/vita_1_0/stage_2a.py --config.slice=v5p:4x4x8
    python -m vita_jax.plan --config=experiments/vita_1_0/stage_2a.py --config.slice=v5p:4x4x8 --topology=v5p:4x4x8

Trains the projector, on captions (arXiv 2408.05211, section 3.2.1). Rate and batch of `pretrain_mlp_nodes.sh`: 5e-4,
512 conversations a step, which is about 128 packed rows; 256 here, so that every chip of a slice has one.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_0.curriculum import CAPTIONS, ROW_LENGTH, ROW_TILES, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "vision_alignment",
    "2a vision alignment",
    ("^projector/",),
    (CAPTIONS,),
    steps=1500,
    learning_rate=5e-4,
    batch_size=256,
    row_length=ROW_LENGTH,
    row_tiles=ROW_TILES,
    start_from=("runs/vita_1_0/bilingual_text", "runs/public/internvit"),
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v6e:16x16", "v5p:4x4x8", "one"] = "v5p:4x4x8"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
