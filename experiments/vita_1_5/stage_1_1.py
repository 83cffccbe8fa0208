"""VITA-1.5, stage 1.1: vision alignment. The visual adapter alone learns to say pictures in the language model's words.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_1_1.py --config.slice=v5e:8x8
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_1_1.py --config.slice=v5e:8x8 --topology=v5e:8x8

Trains the projector, on 20 % of the captions (arXiv 2501.01957, section 3.3.1). Rate and batch of
`pretrain_mlp_qwen_nodes.sh`: 5e-4, 512 conversations a step, which is about 128 packed rows.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import ROW_LENGTH, ROW_TILES, captions, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "vision_alignment",
    "1.1 vision alignment",
    ("^projector/",),
    (captions(0.2),),
    steps=600,
    learning_rate=5e-4,
    batch_size=128,
    row_length=ROW_LENGTH,
    row_tiles=ROW_TILES,
    start_from=("runs/public/qwen2", "runs/public/internvit"),
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
