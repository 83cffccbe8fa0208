"""The quickstart's small model on your own records: pictures, videos and text, in any mixture.

    python -m vita_jax.train --config=experiments/own_data.py \\
        --config.data.json=my.json --config.data.root=my_media --config.run_dir=runs/mine

The records file is described in the README and in `vita_jax/data/records.py`; bad records are listed in
`<run_dir>/data/records/rejects.jsonl`. A tokenizer is trained on the records' own text. Talk to the result with
`python -m vita_jax.chat --checkpoint runs/mine`.

Sizes: `smoke` (a few steps), `small` (the quickstart's model; minutes on a laptop), `full` (VITA-1.5's full-size vision
and language models; needs accelerators). `--config.stages.own_data.steps=N` sets the length of training, `.row_length`
and `.row_tiles` the longest record (tokens, picture tiles and frames).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipelines.build import build_records
from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.records import read_json_records
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.errors import UserError
from vita_jax.models.vita import vita_1_5, vita_small
from vita_jax.training.experiment import (
    DataConfig,
    ExperimentConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.stages import Stage

RECORDS = "records"
VOCAB_SIZE = 4096


def get_config(size: Literal["smoke", "small", "full"] = "small") -> ExperimentConfig:
    """The configuration of one size; `data.json` and `data.root` must be set."""
    model = {
        "smoke": lambda: vita_small(32, 2, 48, VOCAB_SIZE),
        "small": lambda: vita_small(vocab_size=VOCAB_SIZE),
        "full": vita_1_5,
    }[size]()
    steps, rows, rate = {"smoke": (6, 2, 3e-3), "small": (600, 8, 1.5e-3), "full": (5000, 128, 2e-5)}[size]
    image = ImageConfig(image_size=model.vision.image_size)
    return ExperimentConfig(
        name="own_data",
        size=size,
        run_dir="runs/own_data",
        model=model,
        image=image,
        tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
        template="qwen2p5_instruct",
        system_texts=SystemTexts(image="Look.", video="Watch.", lang="Read."),
        data=DataConfig(num_threads=2 if size == "full" else 0),
        stages=(
            Stage(
                "own_data",
                "own data",
                trainable=(".",),
                sources=(SourceConfig(RECORDS),),
                steps=steps,
                learning_rate=rate,
                batch_size=rows,
                row_length=512 if size != "full" else 6144,
                row_tiles=2 * image.most_tiles,
            ),
        ),
    )


def _texts(path: Path) -> Iterator[str]:
    """Every turn of every record that has its turns where they belong; the builder reports the others."""
    for record in read_json_records(path):
        turns = record.get("conversations") if isinstance(record, dict) else None
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                yield turn["value"].replace("<image>", "").replace("<video>", "")


def prepare(config: ExperimentConfig) -> ExperimentConfig:
    """Builds the records, trains the tokenizer, and leaves out the tiles where no record has any."""
    if config.data.json is None or config.data.root is None:
        raise UserError("own_data needs your records: --config.data.json=FILE and --config.data.root=DIR")
    manifest = build_records(
        Path(config.data.json),
        Path(config.data.root),
        data_folder(config) / RECORDS,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    print(f"data: {manifest.counts}", flush=True)
    if not tokenizer_folder(config).is_dir():
        texts = list(_texts(Path(config.data.json)))
        fixed = [*dataclasses.astuple(config.system_texts), "system\n", "user\n", "assistant\n"] * 20
        train_sentencepiece([*texts, *fixed], config.tokenizer.vocab_size, tokenizer_folder(config), at_most=True)
    if manifest.counts["images"] or manifest.counts["videos"]:
        return config
    stages = tuple(dataclasses.replace(s, row_tiles=0, trainable=("^language/",)) for s in config.stages)
    return dataclasses.replace(config, stages=stages)
