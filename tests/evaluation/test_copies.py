"""Copies through a codec: known values of the measures, and the command on a tiny codec."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from scipy.io import wavfile

from tests.evaluation.random_run import random_run
from tests.training.voice import CODEC, training
from vita_jax import evaluate
from vita_jax.evaluation import copies
from vita_jax.evaluation.copies import figures, load_mos, pesq, stoi

RATE = 16_000


def voice_like(seconds: float = 2.0) -> np.ndarray:
    """(n,) float32: syllables of a buzz, which PESQ takes for speech."""
    time = np.arange(int(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 20))
    return (0.1 * buzz * (np.sin(2 * np.pi * 2.5 * time) > -0.3)).astype(np.float32)


def loudness(samples: np.ndarray, rate: int) -> float:
    """For --mos."""
    return float(np.abs(samples).max()) + rate


def test_a_perfect_copy_has_the_best_figures_and_noise_lowers_them():
    wave, rng = voice_like(), np.random.default_rng(0)
    assert stoi(wave, wave, RATE) == pytest.approx(1.0, abs=1e-6)
    assert pesq(wave, wave, RATE) == pytest.approx(4.64, abs=0.01)  # the top of P.862.2
    noisy = wave + rng.normal(size=len(wave)).astype(np.float32) * np.float32(np.std(wave))
    assert stoi(wave, noisy, RATE) < 0.95 and pesq(wave, noisy, RATE) < 2.0
    silence = np.zeros(RATE, np.float32)
    assert pesq(silence, silence, RATE) is None and stoi(wave[:2000], wave[:2000], RATE) is None


def test_only_too_little_sound_has_no_stoi(monkeypatch):
    """What NumPy warns of on the way is no reason to leave a sound out."""

    def warning(wave, copy, rate):
        warnings.warn("invalid value encountered in divide", RuntimeWarning, stacklevel=1)
        return 0.5

    monkeypatch.setattr("pystoi.stoi", warning)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        assert stoi(voice_like(), voice_like(), RATE) == 0.5


def test_means_are_over_the_sounds_that_have_a_figure():
    lines = [{"stoi": 0.5, "pesq": None, "mel_distance": 1.0}, {"stoi": 0.9, "pesq": 2.0, "mel_distance": 1.0}]
    found = figures(lines)
    assert found["stoi"]["value"] == pytest.approx(0.7) and (found["stoi"]["low"], found["stoi"]["high"]) == (0.5, 0.9)
    assert found["pesq"] == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 1} and "mos" not in found


def test_the_command_measures_a_folder(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    random_run(run, hears=False, codec=CODEC, codec_training=training())
    (tmp_path / "sounds" / "deep").mkdir(parents=True)
    for name, seconds in (("a.wav", 1.0), ("deep/b.wav", 1.5)):
        wavfile.write(tmp_path / "sounds" / name, RATE, voice_like(seconds))
    line = ["--checkpoint", str(run), "--benchmark", "copies", "--data", str(tmp_path / "sounds")]
    assert evaluate.main([*line, "--mos", "tests.evaluation.test_copies:loudness"]) == 0
    assert "copies of 2 sounds at 1600 Hz" in capsys.readouterr().out
    result = json.loads((run / "evaluation" / "final.copies.json").read_text())
    said = [json.loads(one) for one in (run / "evaluation" / "final.copies.jsonl").read_text().splitlines()]
    assert [(one["file"], one["seconds"]) for one in said] == [("a.wav", 1.0), ("deep/b.wav", 1.5)]
    assert all(one["mel_distance"] > 0 and one["mos"] >= CODEC.sampling_rate for one in said)
    assert result["figures"]["mel_distance"]["n"] == 2 and result["config"]["name"] == "tiny"
    # The same command again measures only what is new.
    real, read = copies.read_audio, []
    monkeypatch.setattr(
        copies, "read_audio", lambda path, *rest, **more: read.append(path.name) or real(path, *rest, **more)
    )
    wavfile.write(tmp_path / "sounds" / "bb.wav", RATE, voice_like(1.0))
    assert evaluate.main([*line, "--mos", "tests.evaluation.test_copies:loudness"]) == 0 and read == ["bb.wav"]
    again = [json.loads(one) for one in (run / "evaluation" / "final.copies.jsonl").read_text().splitlines()]
    assert [one["file"] for one in again] == ["a.wav", "bb.wav", "deep/b.wav"] and again[::2] == said
    wavfile.write(tmp_path / "sounds" / "c.wav", RATE, voice_like(0.3))
    assert evaluate.main(line) == 2 and "c.wav: 0.30 s of sound; at least 0.5 s" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    deaf = tmp_path / "run"
    random_run(deaf, hears=False)
    line = ["--checkpoint", str(deaf), "--benchmark", "copies", "--data", str(tmp_path)]
    for more, message in (
        ([], "copies need a codec"),
        (["--mos", "nothing"], "--mos nothing: expected MODULE:FUNCTION"),
        (["--limit", "3"], "--limit is not for the benchmark copies"),
    ):
        assert evaluate.main([*line, *more]) == 2 and message in capsys.readouterr().err
    assert load_mos("tests.evaluation.test_copies:loudness") is not None
    monkeypatch.setattr(copies, "PACKAGES", ("pystoi", "no_such_package"))
    assert copies.missing_packages() == ["no_such_package"]
