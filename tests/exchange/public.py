"""Public folders in miniature: random bits under the names of the released checkpoints, and their small files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml

from tests.training.tiny import model_config
from vita_jax.conversion.tables import Table
from vita_jax.conversion.torch_files import write_tensors
from vita_jax.models.audio import tower_weights
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.vita import VitaConfig
from vita_jax.models.vita_hf import config_to_hf
from vita_jax.models.vita_weights import weight_table

TOKENIZERS = Path(__file__).parents[1] / "golden" / "vita" / "tokenizer_tiny"
FINITE = {"bfloat16": 0xFF7F, "float16": 0xFBFF}  # the sign, and no exponent of all ones


def tiny_vita(*, sparse: bool = False) -> VitaConfig:
    """VITA-1.5, or with experts VITA-1.0, in a few thousand parameters; as many vocabulary rows as its tokenizer."""
    tiny = model_config()
    vision = replace(tiny.vision, embedding_init_stddev=1.0)  # how a fresh one is drawn is not in the files
    folder = TOKENIZERS / ("mixtral" if sparse else "qwen")
    rows = tokenizer_rows(folder)
    experts = {"num_experts": 3, "experts_per_token": 2, "qkv_bias": False} if sparse else {}
    language = DecoderConfig(rows, 16, 2, 4, 2, 4, 24, max_positions=512, **experts)
    tower = AudioTowerConfig(AudioEncoderConfig(80, 8, 2, 2, 12), AudioAdapterConfig(input_size=8, output_size=16))
    return replace(tiny, vision=vision, language=language, audio=tower)


def tokenizer_rows(folder: Path) -> int:
    """Ids of a `tokenizer.json`."""
    content = json.loads((folder / "tokenizer.json").read_text())
    return max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1


def random_tensors(table: Table, dtype: type | str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits, all of them finite numbers."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if dtype.name in FINITE:
            return (rng.integers(0, 1 << 16, shape, np.uint16) & FINITE[dtype.name]).view(dtype)
        return rng.normal(size=shape).astype(dtype)

    return {name: draw(rule.torch_shape) for rule in table.rules for name in rule.names}


def public_vita(folder: Path, *, sparse: bool = False, dtype: str = "bfloat16", shard_bytes: int = 8000) -> VitaConfig:
    """Writes a released checkpoint; the configs of its towers are said to be where they once were."""
    config = tiny_vita(sparse=sparse)
    write_tensors(folder, random_tensors(weight_table(config), dtype).items(), max_shard_bytes=shard_bytes)
    fields = config_to_hf(config) | {
        "mm_audio_encoder": "/data/someone/audio-encoder-v1.2",
        "mm_vision_tower": "/data/someone/InternViT-tiny",
    }
    fields.pop("vision_config")
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    (folder / "InternViT-tiny").mkdir()
    (folder / "InternViT-tiny" / "config.json").write_text(json.dumps(config_to_hf(config)["vision_config"]))
    (folder / "audio-encoder-v1.2").mkdir()
    train = yaml.safe_dump(tower_weights.config_to_train(config.audio))
    (folder / "audio-encoder-v1.2" / "train.yaml").write_text(train)
    for file in (TOKENIZERS / ("mixtral" if sparse else "qwen")).iterdir():
        shutil.copyfile(file, folder / file.name)
    return config
