"""Sound heard in pieces is sound heard as a whole, however it is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.hearing import hearing_model
from vita_jax.errors import UserError
from vita_jax.inference import listen
from vita_jax.inference.listen import Listener, ListenOptions, describe_listening, listening_tower
from vita_jax.models.audio.tower import AudioTower
from vita_jax.models.vita import VitaConfig, vita_small
from vita_jax.ops.filter_bank import FilterBankConfig, log_mel, num_frames
from vita_jax.training.checkpoint import load_params

WEIGHTS = Path(__file__).parents[2] / "experiments/quickstart/weights"


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def kept():
    """Config and parameters of the quickstart, which was trained with chunk masks."""
    loaded = load_params(WEIGHTS)
    return loaded.config.model, loaded.params


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """Tones that change, with noise."""
    rng, time = np.random.default_rng(seed), np.arange(samples) / 16_000
    pitch = 200 + 150 * np.sin(2 * np.pi * 1.3 * time)
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + rng.normal(0, 0.01, samples)).astype(np.float32)


def whole(config: VitaConfig, params, wave: np.ndarray, options: ListenOptions) -> np.ndarray:
    """The chunk-masked pass over the whole sound."""
    tower, features = listening_tower(config, options), log_mel(wave)
    lengths = np.array([len(features)], np.int32)
    embeds = listen.hear_whole(AudioTower(tower), params["audio"], listen.pad_frames(features), lengths)
    return np.asarray(embeds[0, : tower.num_tokens(len(features))])


def heard(listener: Listener, wave: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, list[int]]:
    """All tokens, and how many came with each block and with the end."""
    listener.begin()
    pieces = [listener.hear(block) for block in np.split(wave, cuts)]
    pieces.append(listener.end())
    return np.concatenate(pieces), [len(piece) for piece in pieces]


@pytest.mark.parametrize("samples", [16_000, 30_480, 30_639, 41_000, 52_001])
def test_any_cuts_give_the_chunk_masked_whole(kept, samples):
    config, params = kept
    wave, options = sound(samples), ListenOptions(chunk_size=8, left_chunks=3)
    want = whole(config, params, wave, options)
    listener, rng = Listener(config, params, options), np.random.default_rng(samples)
    for cuts in (
        [],
        sorted(rng.integers(0, samples, 4)),
        list(range(160, samples, 2560)),
        list(range(7, samples, 999)),
    ):
        got, _ = heard(listener, wave, cuts)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want).max() > 0.1


def test_only_the_last_chunk_is_left_at_the_end(kept):
    config, params = kept
    listener, wave = Listener(config, params), sound(5 * 16_000)
    tokens, counts = heard(listener, wave, list(range(1600, len(wave), 1600)))
    # 16 frames of 40 ms make 8 tokens, of which 2 wait for what comes next.
    assert len(tokens) == config.audio.num_tokens(num_frames(len(wave)))
    assert [n for n in counts if n][:3] == [6, 8, 8] and counts[-1] <= 10
    np.testing.assert_allclose(tokens, whole(config, params, wave, ListenOptions()), atol=1e-4)


def test_a_conversation_compiles_nothing_new(kept):
    config, params = kept
    listener = Listener(config, params)
    heard(listener, sound(40_000), [])
    before = [call._cache_size() for call in (listen._hear_chunk, listen._hear_end)]
    for samples in (9_000, 33_333, 70_000):
        heard(listener, sound(samples), [samples // 3])
    assert [call._cache_size() for call in (listen._hear_chunk, listen._hear_end)] == before


@pytest.mark.parametrize("streaming", ["full", "chunked"])
def test_sound_too_short_to_be_heard_gives_nothing(kept, streaming):
    config, params = kept
    listener = Listener(config, params, ListenOptions(streaming))
    for samples in (0, 399, 1_300):
        assert heard(listener, sound(samples), [])[0].shape == (0, config.language.hidden_size)
    assert heard(listener, sound(1_400), [])[0].shape == (1, config.language.hidden_size)


def test_full_context_hears_at_the_end(kept):
    config, params = kept
    options = ListenOptions("full")
    tokens, counts = heard(Listener(config, params, options), sound(30_000), [9_000])
    assert counts[:-1] == [0, 0]
    np.testing.assert_allclose(tokens, whole(config, params, sound(30_000), options), atol=1e-4)


def test_auto_follows_the_training():
    plain = hearing_model()
    assert "auto: full" in describe_listening(plain)
    dynamic = replace(plain.audio.encoder, dynamic_chunks=True)
    assert "auto: chunked, 640 ms" in describe_listening(replace(plain, audio=replace(plain.audio, encoder=dynamic)))
    fixed = replace(plain.audio.encoder, chunk_size=4, left_chunks=16)
    fixed = replace(plain, audio=replace(plain.audio, encoder=fixed))
    assert "chunked, 160 ms at a time with 16" in describe_listening(fixed)
    assert "full" in describe_listening(fixed, ListenOptions("full"))


def test_what_cannot_be_heard_is_said(kept):
    config, params = kept
    for wrong, message in (
        (lambda: ListenOptions("always"), "'always' is unknown"),
        (lambda: ListenOptions(chunk_size=0), "chunk_size 0"),
        (lambda: Listener(config, params, ListenOptions(chunk_size=3)), "chunk_size 3 must be even"),
        (lambda: Listener(vita_small(), params), "does not hear"),
        (lambda: Listener(config, params, filter_bank=FilterBankConfig(dither=1.0)), "no dither"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
