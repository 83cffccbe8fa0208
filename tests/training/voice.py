"""The tiny model with a voice, and batches of tones for it."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.training.tiny import VOCAB, model_config
from vita_jax.models.codec.codebook_training import CodebookTraining
from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.discriminators import DiscriminatorConfig
from vita_jax.models.codec.losses import CodecLossConfig, CodecTraining
from vita_jax.models.speech.config import SpeechDecoderConfig
from vita_jax.models.vita import VitaConfig

CODEC = CodecConfig(
    upsample_rates=(4, 4),
    upsample_kernel_sizes=(8, 8),
    upsample_initial_channel=16,
    resblock="2",
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    latent_dim=16,
    base_channels=4,
    global_feature_conv=(8, 6, 8, 3, 1),
    group_norm_channels=4,
    num_codes=12,
    num_global_codes=2,
    sampling_rate=1600,
)
SPEECH = SpeechDecoderConfig(12, 8, 16, 2, 2, nar_layers=1, initial_head=True, contiguous_positions=True)
DISCRIMINATORS = DiscriminatorConfig((2,), (2, 2), 1, 128, (16,), 2)


def training(adversarial_start: int = 0) -> CodecTraining:
    """Two resolutions, three small discriminators, codebooks by averages."""
    losses = CodecLossConfig(mel=((64, 16, 10.0), (32, 8, 1.0)), num_mels=8)
    return CodecTraining(losses, DISCRIMINATORS, adversarial_start, CodebookTraining(decay=0.9))


def voice_config(adversarial_start: int = 0) -> VitaConfig:
    """`tiny.model_config` that speaks."""
    return dataclasses.replace(model_config(), codec=CODEC, speech=SPEECH, codec_training=training(adversarial_start))


def tones(rng: np.random.Generator, rows: int, samples: int) -> np.ndarray:
    """(rows samples) float32: two tones in turn, with a random phase."""
    pitch = rng.choice([50.0, 200.0], (rows, 1)) * (1 + (np.arange(samples) * 4 // samples % 2))
    phase = 2 * np.pi * (np.cumsum(pitch / CODEC.sampling_rate, axis=1) + rng.random((rows, 1)))
    return (0.5 * np.sin(phase)).astype(np.float32)


def crops(seed: int, rows: int = 4, frames: int = 8) -> dict[str, np.ndarray]:
    """A batch of objective `codec`."""
    rng = np.random.default_rng(seed)
    samples = frames * CODEC.hop
    return {"waves": tones(rng, rows, samples), "other_waves": tones(rng, rows, samples)}


def pairs(seed: int, rows: int = 4, frames: int = 8, tokens: int = 5) -> dict[str, np.ndarray]:
    """A batch of objective `speech_decoder`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(frames // 2, frames + 1, rows).astype(np.int32)
    waves = tones(rng, rows, frames * CODEC.hop)
    waves[np.arange(waves.shape[1]) >= lengths[:, None] * CODEC.hop] = 0
    return {
        "text_tokens": rng.integers(1, VOCAB, (rows, tokens)).astype(np.int32),
        "text_lengths": rng.integers(1, tokens + 1, rows).astype(np.int32),
        "waves": waves,
        "frames": lengths,
    }
