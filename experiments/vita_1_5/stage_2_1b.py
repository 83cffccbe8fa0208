"""VITA-1.5, stage 2.1b: speech alignment. The audio adapter learns the language model's words, by writing down speech.

    python -m vita_jax.train --config=experiments/vita_1_5/stage_2_1b.py --config.slice=v5p:4x4x2
    python -m vita_jax.plan --config=experiments/vita_1_5/stage_2_1b.py --config.slice=v5p:4x4x2 --topology=v5p:4x4x2

Trains adapter and language model, on speech and its transcripts (arXiv 2501.01957, section 3.3.2; 11,000 or 110,000 h,
the paper's summaries differ). The script `pretrain_audio_mlp_qwen_nodes.sh` trains the adapter alone at 5e-4: the
adapter has that rate here, the language model that of the other stages. For the script's way:
--config.stages.speech_alignment.trainable='("^audio/adapter/",)' and a learning rate of 5e-4 without a scale.
"""

from __future__ import annotations

from typing import Literal

from experiments.vita_1_5.curriculum import ASR, ROW_LENGTH, one_stage
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

STAGE = Stage(
    "speech_alignment",
    "2.1b speech alignment",
    ("^audio/adapter/", "^language/"),
    (ASR,),
    steps=9000,
    learning_rate=2e-5,
    learning_rate_scale=(("^audio/adapter/", 25.0),),
    batch_size=128,
    row_length=ROW_LENGTH,
    row_tiles=0,
    row_clips=14,
    clip_frames=3000,
    whole_clips=True,
    start_from=("runs/vita_1_5/vision_sft", "runs/vita_1_5/speech_encoder"),
)


def get_config(
    size: Literal["smoke", "full"] = "full", slice: Literal["v5e:8x8", "v6e:4x8", "v5p:4x4x2", "one"] = "v5p:4x4x2"
) -> ExperimentConfig:
    """The run of this stage; `slice` says what it is laid out for."""
    return one_stage(STAGE, size, slice)
