"""Fine-tuning of a trained Flamingo to one task: the tower unfrozen, pictures larger than in its training.

    python -m vita_jax.train --config=experiments/flamingo/finetune.py --config.start=runs/flamingo_9b \\
        --config.data.folder=data/my_task --config.run_dir=runs/flamingo_9b_my_task
    python -m vita_jax.train --config=experiments/flamingo/finetune.py --config.size=small \\
        --config.start=runs/quickstart_flamingo --config.data.folder=runs/quickstart_flamingo/data

The task is a folder `task` of documents (data_pipelines.build records --layout documents, or pairs), each a picture or
several with their texts: `Question:... Short answer:...`, as it will be asked. With `--config.frames=8` their media are
clips. `--config.video=true` is for a start that was trained with clips, `--config.ablation` for one of another model
than the default, as `pretrain.py` was told. As in the paper (arXiv 2204.14198,
appendix B.2) the language model stays frozen, the tower trains along, and pictures are larger: 224 -> 336 pixels here,
CLIP's other size, for 320 -> 480; the tower's positions are resized as the run starts. Rates of the paper were searched
for each task; 1e-5, half a cosine, is where to begin.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.flamingo.curriculum import LOOKING, Scale, SliceName, full_model, one_stage, smoke_model
from experiments.flamingo.quickstart import SMALL, Ablation, small_model, with_new_tokens
from vita_jax.data.interleaved import DOCUMENT_TOKENS
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

SIDES = {"smoke": 48, "small": 48, "full": 336}  # pixels


def stage(size: str, start: str, frames: int) -> Stage:
    """The stage; every document is used, in full, with media of so many frames."""
    source = "task" if size == "full" else "pages" if frames == 1 else "clips"
    rows = 32 if size == "full" else 4
    task = DataSet(
        "task",
        (SourceConfig(source),),
        1.0,
        rows,
        row_images=9,
        max_images=9,
        drop_single=0.0,
        row_length=DOCUMENT_TOKENS,
        frames=frames,
    )
    return Stage(
        "finetuning",
        "fine-tuning",
        ("^vision/", *LOOKING),
        (),
        steps={"smoke": 3, "small": 500, "full": 5000}[size],
        learning_rate=1e-5 if size == "full" else 1e-4,
        batch_size=rows,
        row_length=DOCUMENT_TOKENS,
        row_tiles=task.row_images,
        objective="flamingo",
        sets=(task,),
        start_from=start,
    )


def get_config(
    start: str = "runs/flamingo_9b",
    size: Literal["smoke", "small", "full"] = "full",
    scale: Scale = "9b",
    ablation: Ablation = "none",
    video: bool = False,
    frames: int = 1,
    slice: SliceName = "v5p:2x2x2",
) -> ExperimentConfig:
    """The run.

    Args:
      start: a trained Flamingo of this scale, or of the quickstart's size.
      size: "smoke" and "small" are the quickstart's models.
      ablation, video: as the start was trained; the quickstart's models all know clips.
      frames: of the task's clips; 1 for pictures.
      slice: what it is laid out for.
    """
    side = SIDES[size]
    model = full_model(scale, ablation, video, side) if size == "full" else smoke_model(ablation, side)
    if size == "small":
        model = small_model(SMALL, ablation)
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=side))
    config = one_stage(
        stage(size, start, frames), model, f"flamingo_{scale}_finetuned", size, slice, f"{start}/tokenizer"
    )
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, folder=f"{start}/tokenizer"))


def prepare(config: ExperimentConfig) -> ExperimentConfig:
    """Tells the stage which embeddings are learnt: those of the tags in the tokenizer that it starts with."""
    return with_new_tokens(config)
