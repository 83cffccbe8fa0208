"""VITA-1.0, stage 3: multimodal instruction tuning with state tokens.

    python -m vita_jax.train --config=experiments/vita_1_0/stage_3.py --config.slice=v5p:4x4x8
    python -m vita_jax.plan --config=experiments/vita_1_0/stage_3.py --config.slice=v5p:4x4x8 --topology=v5p:4x4x8

Trains both adapters and the language model, on questions about pictures, videos and text, half of them spoken, and on
sounds that are not for the model (arXiv 2408.05211, section 3.3): answers begin with <1> after speech, <2> after such
sounds, <3> after text. Rate of `finetuneTask_nodes.sh`: 2e-5; its batch of 768 conversations is about 256 packed rows.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_0.curriculum import NEGATIVES, QUESTIONS, ROW_LENGTH, SPOKEN, TEXT, mixture, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "instruction_tuning",
    "3 instruction tuning",
    ("^projector/", "^audio/adapter/", "^language/"),
    mixture((QUESTIONS, 0.35), (SPOKEN, 0.4), (NEGATIVES, 0.1), (TEXT, 0.15)),
    steps=10000,
    learning_rate=2e-5,
    batch_size=256,
    row_length=ROW_LENGTH,
    row_tiles=20,
    row_clips=8,
    clip_frames=1500,
    start_from="runs/vita_1_0/audio_alignment",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v6e:16x16", "v5p:4x4x8", "one"] = "v5p:4x4x8"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
