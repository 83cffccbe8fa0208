"""What the stages of LLaVA's two trainings share at full size; one file per version and stage beside this one.

    v1_stage_1.py      alignment            the projector, captions (CC3M's subset)
    v1_stage_2.py      instruction tuning   projector and language model, conversations
    v1_5_stage_1.py    alignment            the projector, captions (LAION, CC, SBU)
    v1_5_stage_2.py    instruction tuning   projector and language model, the mixture of 665,000
    scienceqa.py       after v1_stage_1     projector and language model, school questions

`--config.scale=13b` takes the larger model. Each is a run of its own, `runs/llava/<version>_<scale>/<stage>`; the first
starts from public weights, Vicuna (v1: LLaMA's first; v1.5: v1.5) and CLIP ViT-L/14 (224 or 336 pixels):

    python -m vita_jax.convert import --model llama --from vicuna-7b-v1.5 --to runs/public/vicuna_v1_5_7b
    python -m vita_jax.convert import --model clip --from clip-vit-large-patch14-336 --to runs/public/clip_336px

The data is below `--config.data.folder` (default data/llava), built by `data_pipelines.build` into the folders that the
stages name: captions, conversations.

Hyper-parameters are those of the papers (arXiv 2304.08485, 2310.03744) and their scripts: AdamW 0.9, 0.999, 1e-8, no
decay, clipping at 1, cosine with 3 % warm-up, bfloat16. The tower is frozen in every stage. Rows are packed: one of the
first stage holds four captions with their pictures, so a quarter of the batch in rows is the batch; how many
conversations fit in a row of the second is a guess (`data_pipelines.rows` says it of yours). Text that is longer than a
row loses its end, as in the scripts; a conversation with pictures is left out then. The paper's order of question and
picture in a first turn is `--config.prompt.image_order=random`; the scripts put the picture first.

LoRA as in the script of v1.5 is, each behind `--config.stages.tuning`: `.lora.rank=128`, `.lora.alpha=256`,
`.learning_rate=2e-4`, `.trainable='["^projector/"]'`, `.learning_rate_scale='[["^projector/", 0.1]]'`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from vita_jax.data.images import ImageConfig
from vita_jax.data.llava_prompts import LlavaPromptOptions
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.models.llava import (
    LlavaConfig,
    llava_small,
    llava_v1_5_7b,
    llava_v1_5_13b,
    llava_v1_7b,
    llava_v1_13b,
)
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

Version = Literal["v1", "v1_5"]
Scale = Literal["7b", "13b"]
SliceName = Literal["v5e:4x8", "v6e:4x4", "v5p:2x2x2", "one"]

LLAMA_TOKENS = 32_000
MODELS: dict[tuple[str, str], Callable[[], LlavaConfig]] = {
    ("v1", "7b"): llava_v1_7b,
    ("v1", "13b"): llava_v1_13b,
    ("v1_5", "7b"): llava_v1_5_7b,
    ("v1_5", "13b"): llava_v1_5_13b,
}
# Parameters and optimiser in as many parts as there are chips; "one" is any single device.
SLICES = {
    "v5e:4x8": MeshConfig(fsdp=32),
    "v6e:4x4": MeshConfig(fsdp=16),
    "v5p:2x2x2": MeshConfig(fsdp=8),
    "one": MeshConfig(),
}
CAPTIONS, CONVERSATIONS = SourceConfig("captions"), SourceConfig("conversations")
PROJECTOR, ALL_BUT_THE_TOWER = ("^projector/",), ("^projector/", "^language/")


def public_weights(version: Version, scale: Scale) -> tuple[str, str]:
    """The runs that a first stage starts from."""
    vicuna, clip = ("vicuna", "clip_224px") if version == "v1" else ("vicuna_v1_5", "clip_336px")
    return f"runs/public/{vicuna}_{scale}", f"runs/public/{clip}"


def run_of(version: Version, scale: Scale, stage: str) -> str:
    """Where a stage's run lies."""
    return f"runs/llava/{version}_{scale}/{stage}"


def smoke_stage(stage: Stage) -> Stage:
    """Three steps of two small rows."""
    return dataclasses.replace(stage, steps=3, batch_size=2, accumulation=1, row_length=256, row_tiles=2)


def one_stage(
    stage: Stage, version: Version, scale: Scale, size: str, slice: str, aspect: str = "square"
) -> ExperimentConfig:
    """The run of one stage.

    Args:
      stage: at full size; its micro-batches become one row a device.
      version, scale: of the model.
      size: "full", or "smoke" for a few steps of a tiny model on one device.
      slice: a name of `SLICES`.
      aspect: of the pictures, see `vita_jax.data.images.ImageConfig`.
    """
    full = size == "full"
    model, mesh = (MODELS[version, scale](), SLICES[slice]) if full else (llava_small(48, 2, 48), SLICES["one"])
    rows = max(1, stage.batch_size // mesh.fsdp) if mesh.fsdp > 1 else 1
    stage = dataclasses.replace(stage, accumulation=rows) if full else smoke_stage(stage)
    vicuna, _ = public_weights(version, scale)
    return ExperimentConfig(
        name=f"llava_{version}_{scale}_{stage.name}",
        size=size,
        run_dir=run_of(version, scale, stage.name),
        model=model,
        image=ImageConfig.clip(model.vision.image_size, aspect),
        tokenizer=TokenizerConfig(
            vocab_size=LLAMA_TOKENS if full else model.language.vocab_size,
            folder=f"{vicuna}/tokenizer" if full else None,
        ),
        template="vicuna_v1",
        # The original's is not repeated here; a run keeps its own.
        system_texts=SystemTexts("", "", "Somebody asks about pictures, and an assistant answers."),
        # ShareGPT's conversations, 6 % of the second stage's, are often longer than 2,048 tokens.
        data=DataConfig(folder="data/llava", num_workers=8 if full else 0, cut_text=True),
        stages=(stage,),
        prompt=LlavaPromptOptions(),
        seed=42,
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=10 if full else 1),
        mesh=mesh,
        dtypes=DTypePolicy(compute_dtype="bfloat16" if full else "float32"),
    )
