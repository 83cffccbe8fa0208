"""VITA-1.5, stage 1.3: vision SFT. Questions about pictures, videos, documents, and plain text.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_1_3.py --config.slice=v5p:4x4x2
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_1_3.py --config.slice=v5p:4x4x2 --topology=v5p:4x4x2

Trains all that sees and reads, on all questions and 20 % of the captions (arXiv 2501.01957, section 3.3.1). The paper
trains the tower as well, which is the default here, at the rate that `finetune_qwen` gives it. The script
`finetuneTask_qwen_nodes.sh` leaves the tower as it is and takes 256 conversations a step, about 64 packed rows; for its
way: --config.stages.vision_sft.trainable='("^projector/", "^language/")'. Videos of up to 33,300 tokens (its
single-node variant) need rows of 33,792 and --config.mesh.context=8.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import QUESTIONS, ROW_LENGTH, ROW_TILES, captions, mixture, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "vision_sft",
    "1.3 vision SFT",
    ("^vision/", "^projector/", "^language/"),
    mixture((QUESTIONS, 0.94), (captions(0.2), 0.06)),
    steps=43000,
    learning_rate=2e-5,
    learning_rate_scale=(("^vision/", 0.1),),
    batch_size=128,
    row_length=ROW_LENGTH,
    row_tiles=ROW_TILES,
    start_from="runs/vita_1_5/vision_understanding",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
