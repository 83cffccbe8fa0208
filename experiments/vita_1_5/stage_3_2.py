"""VITA-1.5, stage 3.2: the speech decoders, which make codec tokens of what the language model writes.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_3_2.py --config.slice=v6e:4x8
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_3_2.py --config.slice=v6e:4x8 --topology=v6e:4x8

Trains the NAR and AR decoders, on the text and the codec tokens of 3,000 h of speech; the language model is frozen
(arXiv 2501.01957, section 3.3.3). No script was released. The tokens are made once by `data_pipelines.codes`.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import CODES, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "speech_decoders",
    "3.2 speech decoders",
    ("^speech/",),
    (CODES,),
    steps=50000,
    learning_rate=5e-4,
    batch_size=256,
    row_length=96,
    row_tiles=0,
    codec_frames=800,
    objective="speech_decoder",
    start_from=("runs/vita_1_5/audio_sft", "runs/vita_1_5/codec"),
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
