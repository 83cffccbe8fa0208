"""VITA-1.5, stage 3.1: the codec, which makes 40 tokens of a second of speech and speech of tokens.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_3_1.py --config.slice=v6e:4x8
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_3_1.py --config.slice=v6e:4x8 --topology=v6e:4x8

Trains TiCodec with one codebook against its discriminators, on 3,000 h of speech (arXiv 2501.01957, section 3.3.3).
Rate and crops of `ticodec/train.py`.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import ASSISTANT, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "codec",
    "3.1 codec",
    ("^codec/",),
    (ASSISTANT,),
    steps=400000,
    learning_rate=2e-4,
    batch_size=128,
    row_length=1,
    row_tiles=0,
    codec_frames=40,
    objective="codec",
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
