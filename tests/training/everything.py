"""The tiny model with every part it can have, with random parameters; nothing is trained or compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.training.records import COLOURS
from tests.training.tiny import experiment, stage
from tests.training.voice import voice_config
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig
from vita_jax.models.state_head import StateHeadConfig
from vita_jax.models.vita import Vita, VitaConfig
from vita_jax.parallel.rules import unbox
from vita_jax.training.experiment import ExperimentConfig, TokenizerConfig
from vita_jax.training.objectives import OBJECTIVES, init_params

VOCAB = 330


def everything_config(vocab_size: int = VOCAB) -> VitaConfig:
    """Sees, hears (with prompts, a recogniser's head and a state head) and speaks."""
    config = voice_config()
    width = config.language.hidden_size
    encoder = AudioEncoderConfig(80, 8, 2, 2, 12)
    return dataclasses.replace(
        config,
        language=dataclasses.replace(config.language, vocab_size=vocab_size),
        audio=AudioTowerConfig(encoder, AudioAdapterConfig(input_size=8, output_size=width), num_prompt_tokens=3),
        ctc_vocab_size=7,
        state_head=StateHeadConfig(width),
    )


def random_params(config: VitaConfig, seed: int = 0) -> dict[str, Any]:
    """Normal numbers in the shapes of the model's parameters: nested numpy arrays, float32."""
    rng = np.random.default_rng(seed)
    boxed = jax.eval_shape(
        lambda key: init_params(Vita(config), OBJECTIVES["language_modeling"], key), jax.random.key(0)
    )
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), unbox(boxed))


def everything_run(run_dir: Path) -> tuple[ExperimentConfig, dict[str, Any]]:
    """A run directory with a tokenizer, and what its last checkpoint would hold. Its paths are absolute on purpose."""
    train_sentencepiece([*COLOURS, "number?", "colour?"] * 9, VOCAB, run_dir / "tokenizer", at_most=True)
    config = experiment(run_dir, model=everything_config(), tokenizer=TokenizerConfig(VOCAB))
    earlier = stage("earlier", start_from=str(run_dir))
    return dataclasses.replace(config, stages=(earlier, *config.stages)), random_params(config.model)
