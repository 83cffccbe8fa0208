"""What Flamingo's full-size runs share; `pretrain.py` and `finetune.py` are the runs.

Models are as open_flamingo's 3B, 4B and 9B (arXiv 2308.01390), but around LLaMAs: CLIP ViT-L/14 at 224 pixels, 64
latents, heads of 8 x 64, a block before every layer, every second, every fourth. NFNet, the paper's tower, has no
public weights and is not offered; MPT and GPT-NeoX, the language models of the released checkpoints, are refused. A
LLaMA gets rows for the two tags and padding, then is started from:

    python -m vita_jax.convert import --model llama --from llama-7b --to runs/public/llama_7b
    python -m vita_jax.enlarge_vocabulary --checkpoint runs/public/llama_7b --to runs/public/flamingo_9b \\
        --symbols "<|endofchunk|>" "<image>" "<PAD>" --multiple-of 1
    python -m vita_jax.convert import --model clip --from clip-vit-large-patch14 --to runs/public/clip_224px

The data is below `--config.data.folder` (default data/flamingo), built by `data_pipelines.build records` into pages
(--layout mmc4) and captions (--layout pairs); clips (--layout pairs, with videos) for `--config.video=true`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.flamingo.quickstart import EMBEDDINGS, SMOKE, Ablation, small_model
from vita_jax.data.images import ImageConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.models.flamingo import LLAMA_VOCABULARY, FlamingoConfig, flamingo_3b, flamingo_4b, flamingo_llama_7b
from vita_jax.parallel.mesh import MeshConfig
from vita_jax.training.experiment import (
    CheckpointConfig,
    DataConfig,
    DTypePolicy,
    ExperimentConfig,
    LogConfig,
    TokenizerConfig,
)
from vita_jax.training.optimizer import OptimizerConfig
from vita_jax.training.stages import Stage

Scale = Literal["3b", "4b", "9b"]
SliceName = Literal["v5e:4x8", "v6e:4x4", "v5p:2x2x2", "one"]
MODELS = {"3b": flamingo_3b, "4b": flamingo_4b, "9b": flamingo_llama_7b}
# Parameters in as many parts as there are chips; "one" is any single device.
SLICES = {
    "v5e:4x8": MeshConfig(fsdp=32),
    "v6e:4x4": MeshConfig(fsdp=16),
    "v5p:2x2x2": MeshConfig(fsdp=8),
    "one": MeshConfig(),
}
# Ids of the end of a chunk and of the tag, behind LLaMA's 32,000.
NEW_TOKENS = (32000, 32001)
LOOKING = ("^resampler/", "^cross_attention/", EMBEDDINGS)
FRAMES = 8  # of a clip: one a second of eight seconds, in the paper's training


def public_weights(scale: Scale) -> tuple[str, str]:
    """The runs that training starts from."""
    return f"runs/public/flamingo_{scale}", "runs/public/clip_224px"


def full_model(scale: Scale, ablation: Ablation = "none", video: bool = False, image_size: int = 224) -> FlamingoConfig:
    """A preset with one change, see `pretrain.py`; with `video` also time embeddings of frames."""
    model = MODELS[scale]()
    resampler = dataclasses.replace(
        model.resampler,
        kind=ablation if ablation in ("transformer", "mlp") else "perceiver",
        max_frames=FRAMES if video else 0,
    )
    every = {"every_1": 1, "every_2": 2, "every_4": 4}.get(ablation, model.cross_attention_every)
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, image_size=image_size),
        resampler=resampler,
        cross_attention=dataclasses.replace(model.cross_attention, gated=ablation != "no_gate"),
        cross_attention_every=every,
    )


def smoke_model(ablation: Ablation = "none", image_size: int = 32) -> FlamingoConfig:
    """The quickstart's, tiny."""
    model = small_model(SMOKE, ablation)
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=image_size))


def smoke_stage(stage: Stage) -> Stage:
    """Three steps of two rows of every data set."""
    sets = tuple(dataclasses.replace(data, batch_size=2) for data in stage.sets)
    return dataclasses.replace(stage, steps=3, batch_size=2 * len(sets), accumulation=1, sets=sets, trained_tokens=())


def one_stage(
    stage: Stage, model: FlamingoConfig, name: str, size: str, slice: str, tokenizer: str
) -> ExperimentConfig:
    """The run of one stage.

    Args:
      stage: at full size, or made small by `smoke_stage`.
      model: of that size.
      name: of the run, which lies in `runs/<name>`.
      slice: a name of `SLICES`.
      tokenizer: folder; of the smoke size, the experiment's own.
    """
    full = size == "full"
    return ExperimentConfig(
        name=name,
        size=size,
        run_dir=f"runs/{name}",
        model=model,
        image=ImageConfig.clip(model.vision.image_size),
        tokenizer=TokenizerConfig(
            vocab_size=LLAMA_VOCABULARY if full else model.language.vocab_size, folder=tokenizer if full else None
        ),
        template="plain",
        system_texts=SystemTexts("", "", ""),
        data=DataConfig(folder="data/flamingo", num_workers=8 if full else 0),
        optimizer=OptimizerConfig(weight_decay=0.1),
        stages=(stage,),
        seed=42,
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=10 if full else 1),
        mesh=SLICES[slice] if full else SLICES["one"],
        dtypes=DTypePolicy(compute_dtype="bfloat16" if full else "float32"),
    )
