"""Mel distances and real-time factors against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.voice import CODEC, SPEECH, training
from vita_jax.evaluation import waves
from vita_jax.evaluation.waves import mel_distances, real_time_factors
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig
from vita_jax.ops.spectrogram import slaney_mel_bands

SIZE, HOP, _ = training().losses.mel[0]


def log_mel_by_hand(wave: np.ndarray) -> np.ndarray:
    """(t m): the definition of the transform, a frame at a time, of a wave that is mirrored at both ends."""
    padded = np.pad(wave.astype(np.float64), (SIZE - HOP) // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(SIZE) / SIZE)
    turns = np.exp(-2j * np.pi * np.outer(np.arange(SIZE), np.arange(SIZE // 2 + 1)) / SIZE)
    frames = [padded[start : start + SIZE] * window for start in range(0, len(padded) - SIZE + 1, HOP)]
    bands = slaney_mel_bands(SIZE, training().losses.num_mels, CODEC.sampling_rate)
    return np.log(np.abs(np.stack(frames) @ turns) @ bands)


def test_mel_distances_by_hand():
    """A copy of twice the loudness is ln 2 away in every band of every frame.

    Of a wave of 800 samples among 1600, 52 of 100 frames of 64 samples, 16 apart, see some of it, where 50 are its own.
    """
    rng, rate, losses = np.random.default_rng(0), CODEC.sampling_rate, training().losses
    whole, other, short = (rng.normal(size=n).astype(np.float32) for n in (rate, rate, rate // 2))
    originals, copies = [whole, whole, whole, short], [whole, 2 * whole, other, 2 * short]
    same, louder, another, padded = mel_distances(originals, copies, rate, losses)
    assert same == 0.0 and louder == pytest.approx(np.log(2), rel=1e-4)
    assert another == pytest.approx(np.abs(log_mel_by_hand(whole) - log_mel_by_hand(other)).mean(), rel=1e-4)
    assert (rate, SIZE, HOP) == (1600, 64, 16) and padded == pytest.approx(np.log(2) * 52 / 50, rel=1e-4)


def test_real_time_factors_are_seconds_of_work_by_seconds_of_sound(monkeypatch):
    """4 s of sound: 400 frames of features, 4 s of codec frames; the second call of each part counts, 2, 6 and 1 s."""
    calls, now = [], iter((10.0, 12.0, 20.0, 26.0, 30.0, 31.0))
    monkeypatch.setattr(waves.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(waves, "_encode_speech", lambda encoder, params, x, lengths: calls.append(("e", x.shape)))
    monkeypatch.setattr(waves, "_draw", lambda decoder, params, rows, count: calls.append(("d", rows.shape, count)))
    monkeypatch.setattr(waves, "decode_codes", lambda codec, params, codes, voice: calls.append(("c", codes.shape)))

    class Config:
        audio = AudioTowerConfig(
            AudioEncoderConfig(hidden_size=24, num_layers=1, num_heads=2, intermediate_size=32),
            AudioAdapterConfig(input_size=24, output_size=16),
        )
        speech, codec = SPEECH, CODEC

    params = {"audio": {"encoder": {}}, "speech": {}, "codec": {}}
    assert real_time_factors(Config, params) == {"encoder": 0.5, "ar_decoder": 1.5, "codec": 0.25}
    frames = 4 * CODEC.sampling_rate // CODEC.hop
    expected = [("e", (1, 400, Config.audio.encoder.input_dim)), ("d", (1, 16, SPEECH.hidden_size), frames)]
    assert calls == [one for one in (*expected, ("c", (1, frames, CODEC.num_quantizers))) for _ in range(2)]
