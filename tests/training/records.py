"""The tiny experiment on real record files: pictures, text, a trained tokenizer, the whole data path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from tests.training.tiny import TILE, experiment, model_config, stage
from vita_jax.data.loader import SourceConfig
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.data.vocabulary import enlarge
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.vita import VitaConfig
from vita_jax.training.experiment import ExperimentConfig, TokenizerConfig, data_folder, tokenizer_folder
from vita_jax.training.families import family_of

VOCAB = 330
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def records_experiment(run_dir: str | Path, **fields) -> ExperimentConfig:
    """`naming`, then `joint` on pictures and text, from the folders that `prepare_records` makes."""
    small = model_config()
    language = DecoderConfig(VOCAB, 16, 1, 2, 1, 8, 24)
    model = VitaConfig(small.vision, ProjectorConfig("mlp2x_gelu", small.vision.output_size, 16), language)
    stages = (
        stage("naming", objective="cell_naming", trainable=("^vision/",), steps=2, sources=(SourceConfig("cells"),)),
        stage(
            "joint",
            trainable=("^projector/", "^language/"),
            start_from="naming",
            sources=(SourceConfig("pictures", split_rounds=True), SourceConfig("text", ratio=0.5)),
            row_length=96,
            row_tiles=2,
        ),
    )
    defaults = {"model": model, "tokenizer": TokenizerConfig(VOCAB), "stages": stages}
    return experiment(run_dir, **{**defaults, **fields})


def prepare_records(config: ExperimentConfig, symbols: Sequence[str] = ()) -> None:
    """Builds the three folders, and a tokenizer that has these special tokens, too."""
    folder = data_folder(config)
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict]] = {"pictures": [], "text": [], "cells": []}
    for number in range(24):
        name = list(COLOURS)[number % 3]
        pixels = np.full((TILE, TILE, 3), COLOURS[name], np.uint8)
        pixels[number % TILE] += np.uint8(number)
        Image.fromarray(pixels).save(source / f"{number}.png")
        picture = {"id": str(number), "image": f"{number}.png"}
        asked = [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": name}]
        again = [{"from": "human", "value": "number?"}, {"from": "gpt", "value": str(number)}]
        records["pictures"].append({**picture, "conversations": asked + again})
        cells = " | ".join([name] * family_of(config.model).layout(config.model).tokens_per_tile)
        records["cells"].append({**picture, "conversations": [asked[0], {"from": "gpt", "value": cells}]})
        records["text"].append({"id": f"t{number}", "conversations": again})
    for name, entries in records.items():
        (source / f"{name}.json").write_text(json.dumps(entries))
        build_records(RecordsFile(source / f"{name}.json", source), folder / name)
    texts = [turn["value"] for entry in records["pictures"] for turn in entry["conversations"]]
    tokenizer = train_sentencepiece(texts * 3, VOCAB - len(symbols), tokenizer_folder(config), at_most=True)
    if symbols:
        enlarge(tokenizer, [], symbols).tokenizer.save(tokenizer_folder(config))
