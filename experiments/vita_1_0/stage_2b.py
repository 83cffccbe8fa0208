"""VITA-1.0, stage 2b: audio alignment. The audio adapter learns, alone.

    python -m vita_jax.train --config=experiments/vita_1_0/stage_2b.py --config.slice=v5p:4x4x8
    python -m vita_jax.plan --config=experiments/vita_1_0/stage_2b.py --config.slice=v5p:4x4x8 --topology=v5p:4x4x8

Trains the audio adapter, on transcribed speech (arXiv 2408.05211, section 3.2.2). The rate is that of the visual
adapter, as in VITA-1.5's `pretrain_audio_mlp_qwen_nodes.sh`; for 1.0 no script was released.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_0.curriculum import ASR, ROW_LENGTH, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "audio_alignment",
    "2b audio alignment",
    ("^audio/adapter/",),
    (ASR,),
    steps=5000,
    learning_rate=5e-4,
    batch_size=256,
    row_length=ROW_LENGTH,
    row_tiles=0,
    row_clips=14,
    clip_frames=3000,
    start_from=("runs/vita_1_0/vision_alignment", "runs/public/whale"),
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v6e:16x16", "v5p:4x4x8", "one"] = "v5p:4x4x8"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
