"""The filter bank: host and device agree, streaming, resampling, lengths. tests/parity has the golden numbers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.errors import UserError
from vita_jax.ops import filter_bank
from vita_jax.ops.filter_bank import (
    FilterBankConfig,
    audio_tokens,
    encoder_length,
    log_mel,
    next_frames,
    num_frames,
    resample,
    start_stream,
    stream_block,
    token_length,
)


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    """Tones with noise, silent at the end."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * 180 * time) + 0.1 * np.sin(2 * np.pi * 2300 * time) + rng.normal(0, 0.01, samples)
    return np.where(np.arange(samples) < 0.9 * samples, wave, 0.0).astype(np.float32)


def test_host_and_device_agree():
    wave = speech_like(16_003)
    host, device = log_mel(wave), jax.jit(log_mel)(wave)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32 and host.shape == (num_frames(16_003), 80)
    np.testing.assert_allclose(device, host, atol=2e-3)
    np.testing.assert_allclose(host, log_mel(wave.astype(np.float64)), atol=2e-3)
    np.testing.assert_allclose(host[-1], np.log(2.0**-23), atol=1e-5)
    batch = log_mel(np.stack([wave, wave[::-1]]))
    np.testing.assert_allclose(batch[0], host, atol=1e-3)  # the matmul may round in another order


def test_a_tone_is_loudest_at_its_own_filter():
    for hertz in (300.0, 1000.0, 5000.0):
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16_000).astype(np.float32)
        step = (filter_bank.hz_to_mel(8000) - filter_bank.hz_to_mel(20)) / 81
        nearest = round((filter_bank.hz_to_mel(hertz) - filter_bank.hz_to_mel(20)) / step) - 1
        assert abs(int(log_mel(tone).mean(axis=0).argmax()) - nearest) <= 1


def test_dither_is_noise_of_its_own_in_every_frame():
    config = FilterBankConfig(dither=1.0)
    wave = np.zeros(800, np.float32)
    noise = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    features = log_mel(wave, config, noise)
    assert features.shape == (3, 80) and features.min() > -15 and not np.allclose(features[0], features[1])
    for wrong in (lambda: log_mel(wave, config), lambda: log_mel(wave, noise=noise)):
        with pytest.raises(UserError, match="dither"):
            wrong()


def test_blocks_of_a_stream_equal_the_whole():
    wave = speech_like(4 * 2560)
    state, step = start_stream(), jax.jit(stream_block)
    windows = []
    for block in np.split(wave, 4):
        state, window = step(state, block)
        windows.append(window)
    whole = np.pad(log_mel(np.pad(wave, (240, 0))), ((3, 0), (0, 0)))
    want = [whole[16 * i : 16 * i + 19] for i in range(4)]
    np.testing.assert_allclose(windows, want, atol=2e-3)
    with pytest.raises(UserError, match="2500 samples; they must be a multiple of 160"):
        stream_block(start_stream(), np.zeros(2500, np.float32))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3000), max_size=8))
def test_blocks_of_any_length_give_the_frames_of_the_whole(lengths):
    wave = speech_like(sum(lengths))
    held, pieces = np.zeros((0,), np.float32), []
    for block in np.split(wave, np.cumsum(lengths)):
        frames, held = next_frames(held, block)
        pieces.append(frames)
        assert len(held) < 400
    got = np.concatenate(pieces)
    assert len(got) == num_frames(len(wave))
    if len(got):
        # Up to the last bits: the matrix product rounds in another order for another number of rows.
        np.testing.assert_allclose(got, log_mel(wave), rtol=0, atol=4e-6)


def test_a_stream_has_no_dither():
    with pytest.raises(UserError, match="a stream has no dither"):
        next_frames(np.zeros(0, np.float32), np.zeros(900, np.float32), FilterBankConfig(dither=1.0))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(8000, 16000), (48000, 16000), (44100, 16000), (22050, 16000)]), st.integers(1, 3000))
def test_resampled_length(rates, samples):
    assert resample(np.zeros(samples, np.float32), *rates).shape == (-(-samples * rates[1] // rates[0]),)


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100])
def test_resampling_keeps_a_tone(rate):
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate).astype(np.float32)

    got = resample(tone(rate), rate)
    np.testing.assert_allclose(got[200:-200], tone(16_000)[200:-200], atol=5e-3)
    np.testing.assert_allclose(resample(jnp.asarray(tone(rate)), rate), got, atol=1e-5)
    assert resample(got, 16_000) is got


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5000))
def test_lengths_of_ints_and_arrays(samples):
    frames = num_frames(samples)
    mask = np.ones(frames, bool)[2::2][2::2]
    assert (encoder_length(frames), audio_tokens(frames)) == (mask.sum(), mask[::2].sum())
    for array in (np.array([samples]), jnp.array([samples])):
        assert token_length(encoder_length(num_frames(array))).tolist() == [audio_tokens(frames)]


def test_errors():
    with pytest.raises(UserError, match="399 samples, but a frame needs 400"):
        log_mel(np.zeros(399, np.float32))
    with pytest.raises(UserError, match="dtype int16"):
        log_mel(np.zeros(800, np.int16))
    with pytest.raises(UserError, match="from 0 Hz"):
        resample(np.zeros(8, np.float32), 0)
    with pytest.raises(UserError, match="9000"):
        replace(FilterBankConfig(), high_freq=9000.0)
