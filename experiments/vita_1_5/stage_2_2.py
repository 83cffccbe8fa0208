"""VITA-1.5, stage 2.2: audio SFT. Questions aloud or in writing, and sounds that are no questions.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_2_2.py --config.slice=v5p:4x4x2
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_2_2.py --config.slice=v5p:4x4x2 --topology=v5p:4x4x2

Trains all that sees, hears and reads, and the input head, on 4 % of the captions and 20 % of the questions, about half
of them spoken, and sounds that are not for the model (arXiv 2501.01957, section 3.3.2). The script
`finetuneTaskNeg_qwen_nodes.sh` takes 1e-5 and 512 conversations a step, and leaves both encoders as they are; its way:
--config.stages.audio_sft.trainable='("^projector/", "^audio/adapter/", "^language/", "^state_head/")'.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.vita_1_5.curriculum import NEGATIVES, QUESTIONS, ROW_LENGTH, SPOKEN, captions, mixture, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "audio_sft",
    "2.2 audio SFT",
    ("^vision/", "^projector/", "^audio/encoder/", "^audio/adapter/", "^language/", "^state_head/"),
    mixture(
        (SPOKEN, 0.42), (dataclasses.replace(QUESTIONS, ratio=0.2), 0.42), (NEGATIVES, 0.12), (captions(0.04), 0.04)
    ),
    steps=9000,
    learning_rate=1e-5,
    learning_rate_scale=(("^vision/", 0.1), ("^audio/encoder/", 0.1)),
    batch_size=128,
    row_length=ROW_LENGTH,
    row_tiles=20,
    row_clips=8,
    clip_frames=1500,
    state_labels=True,
    start_from="runs/vita_1_5/speech_alignment",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
