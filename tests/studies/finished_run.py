"""A run with the quickstart's stages whose tiny model has random parameters: what the studies start from."""

from __future__ import annotations

from pathlib import Path

import jax

from tests.training.hearing import VOICE, hearing_experiment, hearing_model, prepare_hearing
from tests.training.tiny import save_model, stage
from tests.training.voice import SPEECH
from vita_jax.data.loader import SourceConfig
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.models.speech.config import SpeechDecoderConfig
from vita_jax.parallel.rules import unbox
from vita_jax.training.experiment import ExperimentConfig, build_model, tokenizer_folder
from vita_jax.training.objectives import init_model

# As the quickstart's: without a head on the NAR decoder.
SPEAKS = SpeechDecoderConfig(SPEECH.num_codes, 8, 16, 2, 2, contiguous_positions=True)


def finished_run(run_dir: Path, *finished: str) -> ExperimentConfig:
    """Builds data and writes a run of which these stages are finished, all with the same parameters."""
    heard = {"row_length": 320, "row_clips": 2, "clip_frames": 416, "batch_size": 2}
    voice = {"sources": (SourceConfig("raw/speech_out"),), "row_tiles": 0, "batch_size": 2, "steps": 4}
    stages = (
        stage("speech_alignment", sources=(SourceConfig("asr"),), **heard),
        stage(
            "audio_sft",
            trainable=("^audio/adapter/", "^language/", "^state_head/"),
            sources=(
                SourceConfig("spoken", weight=0.5, split_rounds=True),
                SourceConfig("negatives", weight=0.5, split_rounds=True),
            ),
            start_from="speech_alignment",
            state_labels=True,
            **heard,
        ),
        stage("codec", objective="codec", trainable=("^codec/",), codec_frames=16, **voice),
        stage(
            "speech_decoders",
            objective="speech_decoder",
            trainable=("^speech/",),
            codec_frames=40,
            row_length=24,
            start_from=("audio_sft", "codec"),
            **voice,
        ),
    )
    config = hearing_experiment(run_dir, model=hearing_model(**{**VOICE, "speech": SPEAKS}), stages=stages)
    prepare_hearing(config)
    params = unbox(jax.jit(lambda key: init_model(build_model(config), key))(jax.random.key(0)))
    tokenizer = load_tokenizer(tokenizer_folder(config))
    for name in finished:
        save_model(config, name, config.stage(name).steps, params, tokenizer)
    return config
