"""What the stages of VITA-1.0's curriculum share at full size; one file per stage beside this one.

    stage_1.py    bilingual text       the language model, whose vocabulary was enlarged for Chinese
    stage_2a.py   vision alignment     the visual adapter
    stage_2b.py   audio alignment      the audio adapter
    stage_3.py    instruction tuning   adapters and language model; answers begin with <1>, <2> or <3>

Each is a run of its own, `runs/vita_1_0/<stage>`, and starts from the runs before it; the first from Mixtral-8x7B with
the vocabulary enlarged to 51,760 rows, the later ones also from public towers:

    python -m vita_jax.convert import --model mixtral --from Mixtral-8x7B-v0.1 --to runs/public/mixtral ...
    python -m vita_jax.enlarge_vocabulary --checkpoint runs/public/mixtral --to runs/public/mixtral_zh --texts zh.txt \\
        --pieces 19757 --symbols "<1>" "<2>" "<3>"
    python -m vita_jax.convert import --model internvit --from InternViT-300M-448px --to runs/public/internvit ...
    python -m vita_jax.convert import --model whale --from audio_encoder --to runs/public/whale ...

The data is below `--config.data.folder` (default data/vita_1_0), built by `data_pipelines.build` into the folders that
the stages name: text, captions, questions, asr, spoken, negatives.

Hyper-parameters are those of the original scripts (AdamW 0.9, 0.999, 1e-8, no decay, clipping at 1, cosine with 3 %
warm-up, seed 42, bfloat16), trainable parameters and data those of the paper (arXiv 2408.05211, section 3). Rows are
packed: where the original pads conversations to 6,200 tokens (9,100 in its newest scripts), a row of 6,656 (13 x 512)
holds several. The router trains without a load-balancing loss, as the released one did; its load is logged, and
--config.model.language.router_aux_loss_coef=0.01 adds the loss.
"""

from __future__ import annotations

import dataclasses

from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.models.audio.tower import audio_small
from vita_jax.models.vita import VITA_1_0_VOCABULARY, VitaConfig, vita_1_0, vita_small
from vita_jax.parallel.mesh import MeshConfig
from vita_jax.training.experiment import (
    CheckpointConfig,
    DataConfig,
    DTypePolicy,
    ExperimentConfig,
    LogConfig,
    TokenizerConfig,
)
from vita_jax.training.stages import Stage

ROW_LENGTH = 6656
ROW_TILES = 24  # of 256 tokens: what a row of pictures can hold beside their conversations


@dataclasses.dataclass(frozen=True)
class Slice:
    """How a stage lies on a machine: its mesh, micro-batches of a step, remat of the language model's layers."""

    mesh: MeshConfig
    accumulation: int = 1
    remat: str = "full"


# One expert a chip in groups of eight; everything else in as many parts as there are chips.
SLICES = {
    "v6e:16x16": Slice(MeshConfig(fsdp=32, expert=8)),
    "v5p:4x4x8": Slice(MeshConfig(fsdp=16, expert=8), accumulation=2),
    "one": Slice(MeshConfig()),
}

TEXT, ASR, QUESTIONS, SPOKEN, NEGATIVES, CAPTIONS = (
    SourceConfig(name) for name in ("text", "asr", "questions", "spoken", "negatives", "captions")
)


def mixture(*parts: tuple[SourceConfig, float]) -> tuple[SourceConfig, ...]:
    """Sources with their weights."""
    return tuple(dataclasses.replace(source, weight=weight) for source, weight in parts)


def full_model(remat: str) -> VitaConfig:
    """VITA-1.0; towers keep only the inputs of their layers."""
    model = vita_1_0()
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, remat="full"),
        language=dataclasses.replace(model.language, remat=remat),
        audio=dataclasses.replace(model.audio, encoder=dataclasses.replace(model.audio.encoder, remat="full")),
    )


def smoke_model() -> VitaConfig:
    """The same parts, tiny, with four experts."""
    base = vita_small(32, 2, 48)
    language = dataclasses.replace(base.language, qkv_bias=False, num_experts=4)
    return dataclasses.replace(base, language=language, audio=audio_small(32, 48, 2))


def smoke_stage(stage: Stage) -> Stage:
    """Three steps of two small rows."""
    small = {"steps": 3, "batch_size": 2, "accumulation": 1, "row_tiles": min(stage.row_tiles, 8), "row_length": 256}
    clips = {"row_clips": min(stage.row_clips, 2), "clip_frames": min(stage.clip_frames, 400)}
    return dataclasses.replace(stage, **small, **clips)


def one_stage(stage: Stage, size: str, slice: str) -> ExperimentConfig:
    """The run of one stage.

    Args:
      stage: at full size; its accumulation becomes the slice's.
      size: "full", or "smoke" for a few steps of a tiny model on one device.
      slice: a name of `SLICES`; "one" is any single device.
    """
    full = size == "full"
    layout = SLICES[slice] if full else SLICES["one"]
    model = full_model(layout.remat) if full else smoke_model()
    stage = dataclasses.replace(stage, accumulation=layout.accumulation) if full else smoke_stage(stage)
    return ExperimentConfig(
        name=f"vita_1_0_{stage.name}",
        size=size,
        run_dir=f"runs/vita_1_0/{stage.name}",
        model=model,
        image=ImageConfig(image_size=model.vision.image_size),
        tokenizer=TokenizerConfig(
            vocab_size=VITA_1_0_VOCABULARY if full else model.language.vocab_size,
            folder="runs/public/mixtral_zh/tokenizer" if full else None,
        ),
        template="mixtral_two",
        # The released ones are not public; a run keeps its own.
        system_texts=SystemTexts(
            image="You are looking at a picture.", video="You are watching a video.", lang="You are reading a text."
        ),
        data=DataConfig(folder="data/vita_1_0", num_workers=8 if full else 0),
        stages=(stage,),
        seed=42,
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=10 if full else 1),
        mesh=layout.mesh,
        dtypes=DTypePolicy(compute_dtype="bfloat16" if full else "float32"),
    )
