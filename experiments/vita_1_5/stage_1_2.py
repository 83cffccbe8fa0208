"""VITA-1.5, stage 1.2: vision understanding. Tower, adapter and language model learn to describe pictures.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_1_2.py --config.slice=v5p:4x4x2
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_1_2.py --config.slice=v5p:4x4x2 --topology=v5p:4x4x2

Trains all that sees and reads, on all captions (arXiv 2501.01957, section 3.3.1). Rates of `finetune_qwen_nodes.sh`:
2e-5, and 2e-6 for the tower; its batch of 512 conversations is about 128 packed rows.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import ROW_LENGTH, ROW_TILES, captions, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "vision_understanding",
    "1.2 vision understanding",
    ("^vision/", "^projector/", "^language/"),
    (captions(1.0),),
    steps=2800,
    learning_rate=2e-5,
    learning_rate_scale=(("^vision/", 0.1),),
    batch_size=128,
    row_length=ROW_LENGTH,
    row_tiles=ROW_TILES,
    start_from="runs/vita_1_5/vision_alignment",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
