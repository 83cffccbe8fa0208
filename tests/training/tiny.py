"""A model of a few thousand parameters, a two-stage experiment and endless synthetic batches, for tests that train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax import config as config_lib
from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.vision.internvit import InternViTConfig
from vita_jax.models.vita import VitaConfig
from vita_jax.training.checkpoint import CONFIG, StageCheckpoints, checkpoint_folder, snapshot_meta
from vita_jax.training.experiment import CheckpointConfig, DataConfig, ExperimentConfig, LogConfig, TokenizerConfig
from vita_jax.training.stages import Stage

VOCAB = 32
TILE = 8


def model_config(drop_path_rate: float = 0.0) -> VitaConfig:
    """One layer each; 4 visual tokens per 8-pixel tile."""
    vision = InternViTConfig(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=16,
        image_size=TILE,
        patch_size=2,
        drop_path_rate=drop_path_rate,
        embedding_init_stddev=0.02,
    )
    language = DecoderConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=24
    )
    return VitaConfig(vision, ProjectorConfig("mlp2x_gelu", vision.output_size, language.hidden_size), language)


def stage(name: str, **fields: Any) -> Stage:
    """A short stage that trains everything unless told otherwise."""
    defaults: dict[str, Any] = {
        "title": f"stage {name}",
        "trainable": (".",),
        "sources": (SourceConfig(path="none"),),
        "steps": 6,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "row_length": 16,
        "row_tiles": 1,
    }
    return Stage(name=name, **{**defaults, **fields})


def experiment(run_dir: Path | str, **fields: Any) -> ExperimentConfig:
    """Stage `naming` for the tower, then `joint` for projector and language, starting from it."""
    model = fields.pop("model", model_config(drop_path_rate=0.1))
    defaults: dict[str, Any] = {
        "name": "tiny",
        "size": "smoke",
        "run_dir": str(run_dir),
        "model": model,
        "image": ImageConfig(image_size=TILE, max_tiles=1),
        "tokenizer": TokenizerConfig(VOCAB),
        "template": "qwen2p5_instruct",
        "system_texts": SystemTexts("i", "v", "l"),
        "data": DataConfig(str(run_dir)),
        "stages": (
            stage("naming", objective="cell_naming", trainable=("^vision/",), steps=4, optimizer="muon"),
            stage("joint", trainable=("^projector/", "^language/"), start_from="naming"),
        ),
        "checkpoint": CheckpointConfig(every_steps=2, keep=2),
        "log": LogConfig(every_steps=2),
    }
    return ExperimentConfig(**{**defaults, **fields})


def make_batch(seed: int, rows: int = 4, length: int = 16, tiles: int = 1) -> dict[str, np.ndarray]:
    """Rows of two segments and some padding; the first holds a picture. Labels on the last part of each segment."""
    rng = np.random.default_rng(seed)
    cells = 4 * tiles
    tokens = rng.integers(1, VOCAB, (rows, length)).astype(np.int32)
    ends = rng.integers(cells + 3, length - 3, rows)
    used = rng.integers(length - 2, length + 1, rows)
    place = np.arange(length)
    segment_ids = np.where(place < ends[:, None], 1, np.where(place < used[:, None], 2, 0)).astype(np.int32)
    positions = np.where(place < ends[:, None], place, place - ends[:, None]).astype(np.int32)
    feature_index = np.where((place >= 1) & (place <= cells), place - 1, -1).astype(np.int32)
    answered = (segment_ids > 0) & (feature_index < 0) & (place > cells)
    names = rng.integers(-1, VOCAB, (rows, cells, 2)).astype(np.int32)
    return {
        "tokens": tokens,
        "labels": np.where(answered, tokens, -100).astype(np.int32),
        "positions": positions,
        "segment_ids": segment_ids,
        "feature_index": np.broadcast_to(feature_index, tokens.shape).copy(),
        "tiles": rng.integers(0, 256, (rows, tiles, TILE, TILE, 3)).astype(np.uint8),
        "cell_names": names,
    }


@dataclasses.dataclass
class Batches:
    """Batch number n is a function of the seed and n; `seen` records the numbers handed out."""

    seed: int
    rows: int
    length: int
    tiles: int
    position: int = 0
    seen: list[int] = dataclasses.field(default_factory=list)
    counts: None = None

    def __next__(self) -> dict[str, np.ndarray]:
        batch = make_batch(self.seed + self.position, self.rows, self.length, self.tiles)
        self.seen.append(self.position)
        self.position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        """Nothing is open."""


def make_batches(config: ExperimentConfig, stage: Stage) -> Batches:
    """For `loop.run(make_batches=...)`."""
    return Batches(1000 * config.stages.index(stage), stage.batch_size, stage.row_length, stage.row_tiles)


def save_model(config: ExperimentConfig, stage_name: str, step: int, params: dict[str, Any], tok: Tokenizer) -> None:
    """A run whose stage is finished with `params`."""
    tok.save(Path(config.run_dir) / "tokenizer")
    config_lib.save_json(config, Path(config.run_dir) / CONFIG)
    meta = snapshot_meta(config, config.stage(stage_name), step, [0, 0], None, 0.0) | {"finished": True}
    with StageCheckpoints(checkpoint_folder(config.run_dir, stage_name), keep=1) as checkpoints:
        checkpoints.save(step, params, None, meta)
