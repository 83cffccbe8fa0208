"""A small VITA-1.5 that sees, trained from nothing on handwritten digits: stages 0 to 1.3.

    python -m vita_jax.train --config=experiments/quickstart.py
    python -m vita_jax.train --config=experiments/quickstart.py --config.size=smoke --config.run_dir=/tmp/smoke

Sizes: `smoke` (all stages and commands in minutes, learns nothing), `small` (the quickstart: about 25 minutes on two
CPU cores), `full` (the same curriculum on VITA-1.5's full-size vision and language models; needs accelerators).

Stage 0 stands in for the public Qwen2 and InternViT weights: the language model learns questions about scenes written
in characters, the tower learns to name what each cell shows. The vision curriculum of the VITA-1.5 paper (section 3.3)
follows with its trainable parts and data fractions: 1.1 the adapter on 20 % of the captions, 1.2 tower, adapter and
language model on all captions, 1.3 all three on all questions and 20 % of the captions. Text-only questions stay in the
mixture of 1.2 and 1.3, as the paper's question data has them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from data_pipelines.quickstart.build import build_quickstart
from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vita_jax.evaluation.report import write_report
from vita_jax.evaluation.runner import evaluate_params, format_result, format_stages, save_stage_evaluation
from vita_jax.models.vita import vita_1_5, vita_small
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import (
    Amount,
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LogConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.optimizer import OptimizerConfig
from vita_jax.training.stages import Stage

# Evaluation after each stage. After "language" there is no tower yet; after "tower" both parts of stage 0 are measured
# together, joined by an adapter that has learnt nothing.
EVALUATED = {"language": (), "tower": ("typed", "text"), "vision_alignment": ("typed", "text")}
ALL_GROUPS = ("typed", "video_order", "text")
STAGE_QUESTIONS_PER_KIND = 120

TEXT = SourceConfig("text")
QUESTIONS = SourceConfig("questions")


def captions(ratio: float) -> SourceConfig:
    """A share of the caption records."""
    return SourceConfig("captions", ratio=ratio)


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in: steps of the five stages, rows of a batch, and the amounts of data."""

    steps: tuple[int, int, int, int, int]
    rates: tuple[float, float, float, float, float]
    rows: int
    row_length: int
    row_tiles: int
    amounts: dict[str, int]


BENCHMARK = {"typed": 504, "typed_unseen_writers": 104, "text_only": 120, "video_order": 402}
# Small batches: at this size the number of updates counts for more than what is in each.
SMALL = Size(
    steps=(1650, 1000, 250, 400, 1650),
    rates=(1.5e-3, 1e-3, 2e-3, 7e-4, 1e-3),
    rows=6,
    row_length=304,  # three conversations
    row_tiles=12,
    amounts={"text": 36000, "cells": 12000, "captions": 8000, "pictures": 18000, "clips": 4000, **BENCHMARK},
)
SMOKE = Size(
    steps=(4, 4, 3, 3, 4),
    rates=SMALL.rates,
    rows=4,
    row_length=256,
    row_tiles=12,
    amounts={"text": 40, "cells": 40, "captions": 40, "pictures": 40, "clips": 6}
    | {"typed": 8, "typed_unseen_writers": 8, "text_only": 8, "video_order": 6},
)
# Learning rates and lengths of the original scripts; stage 0 is replaced by the public weights once they are converted.
FULL = dataclasses.replace(SMALL, rates=(1e-4, 1e-4, 5e-4, 2e-5, 2e-5), rows=128, row_length=6144, row_tiles=26)


def stages(size: Size) -> tuple[Stage, ...]:
    """The curriculum."""
    shared = {"batch_size": size.rows, "row_length": size.row_length, "row_tiles": size.row_tiles}
    language, tower, alignment, understanding, sft = zip(size.steps, size.rates, strict=True)

    def stage(name: str, title: str, plan: tuple[int, float], *trainable: str, **fields: Any) -> Stage:
        steps, rate = plan
        return Stage(name, title, trainable, steps=steps, learning_rate=rate, **{**shared, **fields})

    return (
        stage(
            "language",
            "0a language model",
            language,
            "^language/",
            sources=(TEXT,),
            objective="text_pretraining",
            row_tiles=0,
        ),
        stage(
            "tower",
            "0b vision tower",
            tower,
            "^vision/",
            "^naming_head/",
            sources=(SourceConfig("cells"),),
            objective="cell_naming",
            batch_size=2 * size.rows,
            row_tiles=8,
        ),
        stage(
            "vision_alignment",
            "1.1 vision alignment",
            alignment,
            "^projector/",
            sources=(captions(0.2),),
            start_from=("language", "tower"),
        ),
        stage(
            "vision_understanding",
            "1.2 vision understanding",
            understanding,
            "^vision/",
            "^projector/",
            "^language/",
            sources=(
                dataclasses.replace(captions(1.0), weight=0.7),
                dataclasses.replace(TEXT, weight=0.3),
            ),
            start_from="vision_alignment",
        ),
        stage(
            "vision_sft",
            "1.3 vision SFT",
            sft,
            "^vision/",
            "^projector/",
            "^language/",
            sources=(
                dataclasses.replace(QUESTIONS, weight=0.78),
                dataclasses.replace(captions(0.2), weight=0.06),
                dataclasses.replace(TEXT, weight=0.16),
            ),
            start_from="vision_understanding",
        ),
    )


def get_config(size: Literal["smoke", "small", "full"] = "small") -> ExperimentConfig:
    """The configuration of one size."""
    plan = {"smoke": SMOKE, "small": SMALL, "full": FULL}[size]
    models = {"smoke": lambda: vita_small(32, 2, 48), "small": vita_small, "full": vita_1_5}
    model = models[size]()
    return ExperimentConfig(
        name="quickstart",
        size=size,
        run_dir="runs/quickstart",
        model=model,
        image=ImageConfig(image_size=model.vision.image_size),
        tokenizer=TokenizerConfig(vocab_size=1000),
        template="qwen2p5_instruct",
        system_texts=SystemTexts(image="Look.", video="Watch.", lang="Read."),
        data=DataConfig(
            num_threads=0 if size != "full" else 2,
            amounts=tuple(Amount(name, count) for name, count in plan.amounts.items()),
        ),
        optimizer=OptimizerConfig() if size == "full" else OptimizerConfig(beta2=0.98),
        stages=stages(plan),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=25 if size == "small" else 1),
    )


def prepare(config: ExperimentConfig) -> None:
    """Builds the data and trains the tokenizer, unless they are there."""
    folder = data_folder(config)
    build_quickstart(folder, {entry.name: entry.count for entry in config.data.amounts}, config.seed)
    if not tokenizer_folder(config).is_dir():
        lines = (folder / "tokenizer_text.txt").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line) for line in lines]
        # The fixed parts of every prompt are frequent; repeated, they become single pieces.
        fixed = [*dataclasses.astuple(config.system_texts), "system\n", "user\n", "assistant\n"] * len(texts)
        train_sentencepiece([*texts, *fixed], config.tokenizer.vocab_size, tokenizer_folder(config), at_most=True)


def after_stage(config: ExperimentConfig, stage: Stage, params: Any) -> None:
    """Measures the model on a part of the held-out questions."""
    groups = EVALUATED.get(stage.name, ALL_GROUPS)
    if not groups:
        return
    if stage.name == "tower":
        params = {**params, "language": load_params(checkpoint_folder(config.run_dir, "language")).params["language"]}
    tokenizer = load_tokenizer(tokenizer_folder(config))
    result = evaluate_params(config, params, tokenizer, groups=groups, limit=STAGE_QUESTIONS_PER_KIND)
    save_stage_evaluation(config, stage.name, result)
    print(f"after {stage.title}\n{format_result(result)}", flush=True)


def finish(config: ExperimentConfig) -> None:
    """Measures the final model on every held-out question and writes the report."""
    loaded = load_params(config.run_dir)
    result = evaluate_params(config, loaded.params, load_tokenizer(tokenizer_folder(config)))
    save_stage_evaluation(config, "final", result)
    print(format_result(result))
    print(format_stages(Path(config.run_dir), config))
    print(f"report: {write_report(config.run_dir)}")
