"""Flamingo's training on web pages and captions: resampler, gated blocks and the embeddings of two tags.

    python -m vita_jax.train --config=experiments/flamingo/pretrain.py --config.scale=9b --config.slice=v5p:2x2x2
    python -m vita_jax.train --config=experiments/flamingo/pretrain.py --config.scale=3b --config.ablation=no_gate
    python -m vita_jax.plan --config=experiments/flamingo/pretrain.py --config.slice=v5p:2x2x2 --topology=v5p:2x2x2

Hyper-parameters are open_flamingo's: pages weigh 1 and captions 0.2; a page is cut to 256 tokens and six pictures, a
caption to 32 tokens; half of the pages with one picture are left out; pictures are mirrored half of the time; AdamW
0.9, 0.999, 1e-8 at 1e-4, constant behind 1,875 steps of warm-up; decay 0.1 on gated blocks alone; clipping at 1; 60
million pages, 120 million captions. Its batches are 32 pages and 64 captions a device, here of 64 devices: that
number is a guess, since only batches a device are published. A row has room for one full page, or for eight captions.
`--config.next_picture=0.5` and `--config.window=random` are the paper's rules for pages.

`--config.ablation`: no_gate (66.5 overall in the paper, of 70.7), every_1, every_2 (68.2), every_4 (68.8), transformer
(66.7) or mlp (66.6) in place of the Perceiver, unfrozen (62.7: the language model trains along). `--config.video=true`
adds clips of eight frames with the paper's weight, 0.03, and time embeddings.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.flamingo.curriculum import (
    FRAMES,
    LOOKING,
    NEW_TOKENS,
    Scale,
    SliceName,
    full_model,
    one_stage,
    public_weights,
    smoke_model,
    smoke_stage,
)
from experiments.flamingo.quickstart import Ablation
from vita_jax.data.interleaved import DOCUMENT_TOKENS, PAIR_TOKENS
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.stages import Stage

PAGES, CAPTIONS = 60_000_000, 120_000_000
ROWS = 2048  # pages of a step: 32 on each of 64 devices
CAPTIONS_OF_ROW = DOCUMENT_TOKENS // PAIR_TOKENS
WARM_UP = 1875  # steps
ACCUMULATION = 8


def data_sets(next_picture: float, window: str, video: bool, flip: float = 0.5) -> tuple[DataSet, ...]:
    """Pages, captions, and with `video` clips."""
    pages = DataSet("pages", (SourceConfig("pages"),), 1.0, ROWS, window=window, next_picture=next_picture, flip=flip)
    pairs = {"kind": "pairs", "max_tokens": PAIR_TOKENS, "row_images": CAPTIONS_OF_ROW, "flip": flip}
    captions = DataSet("captions", (SourceConfig("captions"),), 0.2, 2 * ROWS // CAPTIONS_OF_ROW, **pairs)
    clips = DataSet("clips", (SourceConfig("clips"),), 0.03, ROWS // CAPTIONS_OF_ROW, frames=FRAMES, **pairs)
    return (pages, captions, clips) if video else (pages, captions)


def stage(scale: Scale, ablation: Ablation, sets: tuple[DataSet, ...]) -> Stage:
    """The stage at full size."""
    steps = PAGES // ROWS
    return Stage(
        "pretraining",
        "pretraining",
        (*LOOKING[:2], "^language/") if ablation == "unfrozen" else LOOKING,
        (),
        steps=steps,
        learning_rate=1e-4,
        batch_size=sum(data.batch_size for data in sets),
        row_length=DOCUMENT_TOKENS,
        row_tiles=max(data.row_images for data in sets),
        objective="flamingo",
        warmup_ratio=WARM_UP / steps,
        schedule="constant",
        accumulation=ACCUMULATION,
        sets=sets,
        trained_tokens=() if ablation == "unfrozen" else NEW_TOKENS,
        start_from=public_weights(scale),
    )


def get_config(
    size: Literal["smoke", "full"] = "full",
    scale: Scale = "9b",
    ablation: Ablation = "none",
    video: bool = False,
    next_picture: float = 0.0,
    window: Literal["start", "random"] = "start",
    slice: SliceName = "v5p:2x2x2",
) -> ExperimentConfig:
    """The run; `slice` says what it is laid out for."""
    full = size == "full"
    chosen = stage(scale, ablation, data_sets(next_picture, window, video))
    model = full_model(scale, ablation, video) if full else smoke_model(ablation)
    if not full:
        chosen = dataclasses.replace(smoke_stage(chosen), start_from=None)
    name = f"flamingo_{scale}" if ablation == "none" else f"flamingo_{scale}_{ablation}"
    return one_stage(chosen, model, name, size, slice, f"{public_weights(scale)[0]}/tokenizer")
