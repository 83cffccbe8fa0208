"""A run whose tiny model sees and hears and has random parameters; nothing is trained, and Beam is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.training.tiny import experiment, model_config, save_model
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.vita import Vita, VitaConfig
from vita_jax.parallel.rules import unbox
from vita_jax.training.experiment import ExperimentConfig, TokenizerConfig
from vita_jax.training.objectives import OBJECTIVES, init_params

VOCAB, WIDTH = 330, 16
TEXTS = ("red", "green", "blue", "colour?", "number?", "Write it down.", "A B C D yes no 0 1 2 3 4 5 6 7 8 9")


def random_run(run_dir: Path, hears: bool = True, seed: int = 0, **parts: Any) -> ExperimentConfig:
    """Writes the run, with its stage `joint` finished, and returns its configuration; `parts`: more of the model."""
    vision = model_config().vision
    audio = AudioTowerConfig(
        AudioEncoderConfig(hidden_size=24, num_layers=1, num_heads=2, intermediate_size=32),
        AudioAdapterConfig(input_size=24, output_size=WIDTH),
    )
    model = VitaConfig(
        vision,
        ProjectorConfig("mlp2x_gelu", vision.output_size, WIDTH),
        DecoderConfig(VOCAB, WIDTH, 2, 4, 2, 4, 24),
        audio=audio if hears else None,
        **parts,
    )
    config = experiment(run_dir, model=model, tokenizer=TokenizerConfig(VOCAB))
    tokenizer = train_sentencepiece([*TEXTS] * 9, VOCAB, run_dir / "tokenizer", at_most=True)
    shapes = unbox(
        jax.eval_shape(lambda key: init_params(Vita(model), OBJECTIVES["language_modeling"], key), jax.random.key(0))
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_model(config, "joint", 6, params, tokenizer)
    return config
