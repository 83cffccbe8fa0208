"""Flamingo in a few thousand parameters, its stages, and documents of coloured pictures for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from tests.training import tiny
from vita_jax.data.images import ImageConfig
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.data.video import write_video
from vita_jax.data.vocabulary import enlarge
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.language.gated_cross_attention import GatedCrossAttentionConfig
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.training.experiment import ExperimentConfig, TokenizerConfig, data_folder, tokenizer_folder
from vita_jax.training.stages import Stage

VOCAB, SIDE, FRAMES = 330, 8, 3
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
LOOKING = ("^resampler/", "^cross_attention/", "^language/embed_tokens/")


def flamingo_config(vocab_size: int = tiny.VOCAB, **changes: Any) -> FlamingoConfig:
    """Two layers each, a block before every layer; 4 patches a picture."""
    vision = ViTConfig(8, 2, 2, 16, SIDE, 4, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    language = DecoderConfig(
        vocab_size, 16, 2, 4, 4, 4, 24, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, max_positions=512
    )
    defaults: dict[str, Any] = {
        "resampler": ResamplerConfig(8, num_layers=2, num_heads=2, head_dim=4, num_latents=3, max_frames=FRAMES),
        "cross_attention": GatedCrossAttentionConfig(16, 8, num_heads=2, head_dim=4),
        "cross_attention_every": 1,
    }
    return FlamingoConfig(vision, language=language, **{**defaults, **changes})


def data_sets(rows: int = 2) -> tuple[DataSet, ...]:
    """Pages, captioned pictures, and clips."""
    size = {"batch_size": rows, "row_length": 48, "max_tokens": 48}
    return (
        DataSet("pages", (SourceConfig("pages"),), row_images=3, max_images=3, drop_single=0.0, **size),
        DataSet("pairs", (SourceConfig("pairs"),), 0.2, kind="pairs", row_images=3, **size),
        DataSet("clips", (SourceConfig("clips"),), 0.1, kind="pairs", row_images=2, frames=FRAMES, **size),
    )


def mixture_stage(name: str, sets: tuple[DataSet, ...], **fields: Any) -> Stage:
    """A short stage on these data sets."""
    return tiny.stage(
        name,
        objective="flamingo",
        sources=(),
        sets=sets,
        batch_size=sum(data.batch_size for data in sets),
        row_length=max(data.row_length for data in sets),
        row_tiles=max(data.row_images for data in sets),
        **fields,
    )


def flamingo_experiment(run_dir: Path | str, **fields: Any) -> ExperimentConfig:
    """A language model on text alone, then, frozen, what sees; on the files that `prepare_documents` makes."""
    texts = DataSet(
        "texts", (SourceConfig("texts"),), kind="text", batch_size=2, row_length=48, max_tokens=48, row_images=0
    )
    model = fields.pop("model", flamingo_config(VOCAB))
    defaults: dict[str, Any] = {
        "model": model,
        "image": ImageConfig.clip(SIDE),
        "template": "plain",
        "system_texts": SystemTexts("", "", ""),
        "tokenizer": TokenizerConfig(VOCAB),
        "stages": (
            mixture_stage("language", (texts,), trainable=("^language/",), steps=4),
            mixture_stage("seeing", data_sets(), trainable=LOOKING, start_from="language", steps=6),
        ),
    }
    return tiny.experiment(run_dir, **{**defaults, **fields})


def prepare_documents(config: ExperimentConfig) -> ExperimentConfig:
    """Builds four folders of documents and a tokenizer; returns the configuration with its new tokens."""
    folder = data_folder(config)
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    for number, name in enumerate(names):
        pixels = np.full((SIDE, SIDE, 3), COLOURS[name], np.uint8)
        Image.fromarray(pixels).save(source / f"{name}.png")
        frames = np.stack([np.full((16, 16, 3), COLOURS[names[(number + i) % 3]], np.uint8) for i in range(FRAMES)])
        write_video(source / f"{name}.mp4", frames, 1.0)
    entries: dict[str, list[dict]] = {"texts": [], "pages": [], "pairs": [], "clips": []}
    for i in range(24):
        shown = [names[(i + k) % 3] for k in range(1 + i % 3)]
        entries["texts"].append({"document": [f"{name} Output:{name}" for name in shown]})
        pieces = [piece for name in shown for piece in ({"image": f"{name}.png"}, f"Output:{name}")]
        entries["pages"].append({"id": str(i), "document": pieces})
        entries["pairs"].append({"document": [{"image": f"{shown[0]}.png"}, f"Output:{shown[0]}"]})
        entries["clips"].append({"document": [{"video": f"{shown[0]}.mp4"}, f"Output:{shown[0]} first"]})
    for name, documents in entries.items():
        file = source / f"{name}.json"
        file.write_text(json.dumps(documents))
        build_records(RecordsFile(file, source, layout="documents"), folder / name)
    texts = [piece for one in entries["texts"] for piece in one["document"]] + ["Output: first Question: Short answer:"]
    first = train_sentencepiece(texts * 3, VOCAB - 2, None, at_most=True)
    tokenizer = enlarge(first, [], [END_OF_CHUNK, IMAGE]).tokenizer
    tokenizer.save(tokenizer_folder(config))
    new = tuple(tokenizer.special_tokens[tag] for tag in (END_OF_CHUNK, IMAGE))
    stages = tuple(
        dataclasses.replace(stage, trained_tokens=new) if stage.trainable == LOOKING else stage
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=stages)
