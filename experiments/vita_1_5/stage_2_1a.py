"""VITA-1.5, stage 2.1a: the speech encoder, by CTC.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_2_1a.py --config.slice=v6e:4x8
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_2_1a.py --config.slice=v6e:4x8 --topology=v6e:4x8

Trains the encoder and its CTC head, on 110,000 h of transcribed speech (arXiv 2501.01957, section 3.3.2). No script was
released: rate and warm-up are those usual for Transformer encoders of this size, chunks are drawn anew in every step so
that the encoder can be streamed. Rows are 30 s of clips; 512 of them are 4.3 h of speech a step, an epoch 26,000 steps.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import RECORDINGS, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "speech_encoder",
    "2.1a speech encoder",
    ("^audio/encoder/", "^ctc_head/"),
    (RECORDINGS,),
    steps=26000,
    learning_rate=5e-4,
    warmup_ratio=0.1,
    batch_size=512,
    row_length=3000,
    row_tiles=0,
    clip_frames=3000,
    objective="ctc",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
