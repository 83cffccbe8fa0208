"""What the stages of VITA-1.5's curriculum share at full size; one file per stage beside this one.

    stage_1_1.py    vision alignment       the visual adapter, 20 % of the captions
    stage_1_2.py    vision understanding   tower, adapter, language model, all captions
    stage_1_3.py    vision SFT             the same, all questions and 20 % of the captions
    stage_2_1a.py   speech encoder         by CTC, transcribed speech
    stage_2_1b.py   speech alignment       audio adapter and language model, speech and its transcripts
    stage_2_2.py    audio SFT              everything that sees, hears and reads, half of the questions spoken
    stage_3_1.py    codec                  on speech alone
    stage_3_2.py    speech decoders        NAR and AR, the language model frozen

Each is a run of its own, `runs/vita_1_5/<stage>`, and starts from the runs before it; the first from public weights:

    python -m vita_jax.convert import --model qwen2 --from Qwen2.5-7B-Instruct --to runs/public/qwen2 ...
    python -m vita_jax.convert import --model internvit --from InternViT-300M-448px --to runs/public/internvit ...

The data is below `--config.data.folder` (default data/vita_1_5), built by `data_pipelines.build` into the folders that
the stages name: captions, questions, asr, spoken, negatives; and manifests: raw/asr, raw/speech_out, raw/speech_codes.

Hyper-parameters are those of the original scripts where there are any (AdamW 0.9, 0.999, 1e-8, no decay, clipping at 1,
cosine with 3 % warm-up, seed 42, bfloat16, a checkpoint every 500 steps), trainable parameters and data those of the
paper (arXiv 2501.01957, section 3.3). Rows are packed: where the original pads conversations to at most 6,200 tokens,
a row of 6,656 (13 x 512) holds several. Lengths are one epoch of the paper's data at a guess of what fits in a row;
`data_pipelines.rows` says how many rows yours makes, `--config.stages.NAME.steps=N` sets it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.models.vita import VitaConfig, vita_1_5_with_voice, vita_small_with_voice
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
CTC_ROWS = 8192
QWEN_TOKENS = 151_665


@dataclasses.dataclass(frozen=True)
class Slice:
    """How a stage lies on a machine.

    Attributes:
      mesh: of its devices.
      accumulation: micro-batches of a step.
      remat: of the language model's layers.
    """

    mesh: MeshConfig
    accumulation: int = 1
    remat: str = "full"


# Parameters and optimiser in as many parts as there are chips, one row a chip at a time.
SLICES = {
    "v5e:8x8": Slice(MeshConfig(fsdp=64), accumulation=2),
    "v6e:4x8": Slice(MeshConfig(fsdp=32), accumulation=4),
    "v5p:4x4x2": Slice(MeshConfig(fsdp=32), accumulation=4),
    "one": Slice(MeshConfig()),
}


def captions(ratio: float) -> SourceConfig:
    """A share of the caption records."""
    return SourceConfig("captions", ratio=ratio)


QUESTIONS, ASR, SPOKEN, NEGATIVES = (SourceConfig(name) for name in ("questions", "asr", "spoken", "negatives"))
# Manifests of recordings, for the stages without a language model; the last has the tokens of the codec.
RECORDINGS, ASSISTANT, CODES = (SourceConfig(f"raw/{name}") for name in ("asr", "speech_out", "speech_codes"))


def mixture(*parts: tuple[SourceConfig, float]) -> tuple[SourceConfig, ...]:
    """Sources with their weights."""
    return tuple(dataclasses.replace(source, weight=weight) for source, weight in parts)


def full_model(remat: str) -> VitaConfig:
    """VITA-1.5 with everything that its stages train; towers keep only the inputs of their layers."""
    model = vita_1_5_with_voice()
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, remat="full"),
        language=dataclasses.replace(model.language, remat=remat),
        audio=dataclasses.replace(model.audio, encoder=dataclasses.replace(model.audio.encoder, remat="full")),
        ctc_vocab_size=CTC_ROWS,
    )


def smoke_model() -> VitaConfig:
    """The same parts, tiny."""
    return dataclasses.replace(vita_small_with_voice(48, 2, 48), ctc_vocab_size=256)


def smoke_stage(stage: Stage) -> Stage:
    """Three steps of two small rows."""
    clips = {"row_clips": min(stage.row_clips, 2), "clip_frames": min(stage.clip_frames, 400)}
    speech = {"codec_frames": min(stage.codec_frames, 40)}
    small = {"steps": 3, "batch_size": 2, "accumulation": 1, "row_tiles": min(stage.row_tiles, 8)}
    return dataclasses.replace(stage, **small, **clips, **speech, row_length=min(stage.row_length, 256))


def one_stage(stage: Stage, size: str, slice: str, *, slices: Mapping[str, Slice] = SLICES) -> ExperimentConfig:
    """The run of one stage.

    Args:
      stage: at full size; its accumulation becomes the slice's.
      size: "full", or "smoke" for a few steps of a tiny model on one device.
      slice: a name of `slices`; "one" is any single device.
      slices: how the stage lies on each machine.
    """
    layout = slices[slice] if size == "full" else slices["one"]
    full = size == "full"
    model = full_model(layout.remat) if full else smoke_model()
    stage = dataclasses.replace(stage, accumulation=layout.accumulation) if full else smoke_stage(stage)
    return ExperimentConfig(
        name=f"vita_1_5_{stage.name}",
        size=size,
        run_dir=f"runs/vita_1_5/{stage.name}",
        model=model,
        image=ImageConfig(image_size=model.vision.image_size),
        tokenizer=TokenizerConfig(
            vocab_size=QWEN_TOKENS if full else model.language.vocab_size,
            folder="runs/public/qwen2/tokenizer" if full else None,
        ),
        template="qwen2p5_instruct",
        # The released ones are not public; a run keeps its own.
        system_texts=SystemTexts(
            image="You are looking at a picture.", video="You are watching a video.", lang="You are reading a text."
        ),
        data=DataConfig(folder="data/vita_1_5", num_workers=8 if full else 0),
        stages=(stage,),
        seed=42,
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=10 if full else 1),
        mesh=layout.mesh,
        dtypes=DTypePolicy(compute_dtype="bfloat16" if full else "float32"),
    )
