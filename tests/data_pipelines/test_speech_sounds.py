"""Voices, noises and clips: held out is held out, ratios are what they say, files depend on their clip alone."""

import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.speech import noises
from data_pipelines.speech.clips import SPEECH, Clip, read_wav, render_all, waveform_of, write_wav
from data_pipelines.speech.noises import (
    SYNTHETIC_KINDS,
    TRAINING_KINDS,
    UNSEEN_KIND,
    equalized,
    in_room,
    mix,
    root_mean_square,
    synthetic_noise,
    with_loudness,
)
from data_pipelines.speech.synthesizer import SAMPLE_RATE, Synthesizer, list_variants, list_voices
from data_pipelines.speech.voices import (
    LANGUAGES,
    UNSEEN_VARIANT,
    Delivery,
    assistant_voice,
    draw_delivery,
    held_out_voices,
    training_voices,
    voices_of,
)
from vita_jax.errors import UserError


class Tone:
    """A synthesiser without speech: a tone that depends on text and pitch."""

    def __init__(self, rate=SAMPLE_RATE):
        self.rate = rate

    def speak(self, text, voice, *, rate_wpm=175, pitch=50, pitch_range=50, variant=None):
        times = np.arange(self.rate * len(text) // 20) / self.rate
        return (0.5 * np.sin(2 * np.pi * (100 + pitch) * times)).astype(np.float32), self.rate


def tone(frequency=300.0, seconds=0.5, level=0.1):
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (level * np.sin(2 * np.pi * frequency * times)).astype(np.float32)


# ---- voices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_enough_voices_and_none_in_both_splits(language):
    train, held_out = training_voices(language), held_out_voices(language)
    assert len({v.name for v in train}) == len(train) >= 20
    assert len({v.name for v in held_out}) == len(held_out) >= 4
    assert not {v.name for v in train} & {v.name for v in held_out}
    assert assistant_voice(language).name in {v.name for v in train}
    assert voices_of(language, "held_out") == held_out
    assert all(v.accent in list_voices() and v.variant in list_variants() for v in (*train, *held_out))


def test_one_variant_is_entirely_unseen():
    trained = {voice.variant for language in LANGUAGES for voice in training_voices(language)}
    assert UNSEEN_VARIANT not in trained
    assert all(held_out_voices(language)[-1].variant == UNSEEN_VARIANT for language in LANGUAGES)


def test_a_delivery_keeps_to_the_ranges_of_its_voice():
    rng = np.random.default_rng(0)
    voices = training_voices("zh")
    drawn = [draw_delivery(voices, rng) for _ in range(200)]
    assert len({(d.accent, d.variant) for d in drawn}) > 20
    assert all(160 <= d.rate_wpm <= 230 and 30 <= d.pitch <= 70 and 50 <= d.pitch_range <= 70 for d in drawn)
    assert len({draw_delivery((assistant_voice("en"),), rng) for _ in range(5)}) == 1


def test_voices_of_an_unknown_language_are_an_error():
    with pytest.raises(UserError, match="language 'fr'"):
        training_voices("fr")


# ---- noises ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(-10, 40), st.integers(2000, 9000), st.integers(500, 20000), st.integers(0, 1000))
def test_the_mixture_has_the_ratio_asked_for(snr_db, samples, noise_samples, seed):
    rng = np.random.default_rng(seed)
    speech = (0.2 * rng.standard_normal(samples)).clip(-1, 1).astype(np.float32)
    noise = rng.uniform(-1, 1, noise_samples).astype(np.float32)
    mixed = mix(speech, noise, snr_db)
    assert mixed.shape == speech.shape and np.abs(mixed).max() <= 1
    # mixed = s * (speech + k * noise): least squares gives both factors back.
    columns = np.stack([speech, np.resize(noise, samples)], axis=1).astype(np.float64)
    (of_speech, of_noise), *_ = np.linalg.lstsq(columns, mixed.astype(np.float64), rcond=None)
    measured = 20 * np.log10(
        of_speech * root_mean_square(speech) / (of_noise * root_mean_square(np.resize(noise, samples)))
    )
    assert measured == pytest.approx(snr_db, abs=0.05)


@pytest.mark.parametrize("kind", [*SYNTHETIC_KINDS, UNSEEN_KIND])
def test_every_kind_of_noise_is_a_function_of_its_seed(kind):
    first, again, other = (synthetic_noise(kind, 0.7, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert len(first) == round(0.7 * SAMPLE_RATE) and first.dtype == np.float32
    assert np.abs(first).max() == pytest.approx(1, abs=1e-5)
    assert not np.array_equal(first, other)


def test_the_unseen_kind_is_no_training_kind():
    assert UNSEEN_KIND not in TRAINING_KINDS


@pytest.mark.parametrize(("colour", "slope"), [("white", 0), ("pink", -10), ("brown", -20)])
def test_colours_fall_by_decibels_a_decade(colour, slope):
    power = np.abs(np.fft.rfft(noises.coloured(8, np.random.default_rng(0), colour))) ** 2
    low, high = (10 * np.log10(power[8 * f : 8 * 2 * f].mean()) for f in (100, 1000))
    assert high - low == pytest.approx(slope, abs=1.5)


def test_rooms_and_microphones_keep_length_and_loudness():
    speech = with_loudness(synthetic_noise("pink", 0.5, np.random.default_rng(0)), 0.05)
    for change in (in_room, equalized):
        changed = change(speech, np.random.default_rng(3))
        assert changed.shape == speech.shape
        assert root_mean_square(changed) == pytest.approx(root_mean_square(speech), rel=1e-3)
        assert np.abs(changed - speech).max() > 1e-3


def test_babble_and_second_speakers_hold_all_voices():
    rng = np.random.default_rng(0)
    spectrum = np.abs(np.fft.rfft(noises.babble([tone(300), tone(1000), tone(2500)], 1.0, rng)))
    assert all(spectrum[frequency - 3 : frequency + 4].max() > 500 for frequency in (300, 1000, 2500))
    both = noises.second_speaker(tone(300), tone(1000, 0.4), rng)
    assert len(both) > len(tone(300))


def test_wrong_noises_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="unknown kind of noise 'thunder'"):
        synthetic_noise("thunder", 1, rng)
    with pytest.raises(UserError, match="0 seconds"):
        synthetic_noise("hum", 0, rng)
    with pytest.raises(UserError, match="at least 2 voices"):
        noises.babble([tone()], 1, rng)
    with pytest.raises(UserError, match="silent"):
        mix(tone(), np.zeros(10, np.float32), 10)
    with pytest.raises(UserError, match="both need some"):
        mix(tone(), np.zeros(0, np.float32), 10)
    with pytest.raises(UserError, match="silent"):
        with_loudness(np.zeros(10, np.float32), 0.1)


# ---- clips -----------------------------------------------------------------------------------------------------------

DELIVERY = Delivery("en-us", "m3", 175, 50, 50)


def clips(folder):
    parts = (("hello there", DELIVERY), ("good morning", Delivery("en-gb", "f2", 160, 60, 40)))
    return [
        Clip(str(folder / "plain.wav"), (1,), SPEECH, parts[:1], varied=False),
        Clip(str(folder / "room.wav"), (2,), SPEECH, parts[:1], augmented=True, background="pink"),
        Clip(str(folder / "behind.wav"), (3,), SPEECH, parts, augmented=True, background="second_speaker"),
        Clip(str(folder / "babble.wav"), (4,), "babble", parts, seconds=0.8),
        Clip(str(folder / "two.wav"), (5,), "second_speaker", parts),
        Clip(str(folder / "hum.wav"), (6,), "hum", seconds=0.8),
    ]


def test_files_do_not_depend_on_the_number_of_processes_or_the_order(tmp_path):
    lines, files = [], []
    for name, processes, order in (("a", 1, 1), ("b", 2, -1)):
        (tmp_path / name).mkdir()
        seconds = render_all(clips(tmp_path / name)[::order], lines.append, processes=processes)
        files.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
        for path, duration in seconds.items():
            with wave.open(path) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
                assert file.getnframes() == round(duration * SAMPLE_RATE) > 0.5 * SAMPLE_RATE
    assert files[0] == files[1] and len(files[0]) == 6
    assert lines[-1].startswith("speech: 6 of 6 clips")


def test_a_wav_file_comes_back(tmp_path):
    waveform = (np.arange(-300, 300) * 100 / 32768).astype(np.float32)
    write_wav(tmp_path / "a.wav", waveform)
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav"), waveform)
    write_wav(tmp_path / "loud.wav", np.array([-3.0, 3.0], np.float32))  # beyond the range: cut, never wrapped round
    np.testing.assert_allclose(read_wav(tmp_path / "loud.wav"), [-1, 1], atol=1e-4)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(8000)
    with pytest.raises(UserError, match="2 channels of 16 bit at 8000 Hz"):
        read_wav(tmp_path / "b.wav")


def test_another_synthesiser_can_be_plugged_in(tmp_path):
    waveform = waveform_of(clips(tmp_path)[0], Tone())
    assert root_mean_square(waveform) > 0.03
    with pytest.raises(UserError, match="speaks at 8000 Hz"):
        waveform_of(clips(tmp_path)[0], Tone(8000))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (Clip("x.wav", (1,), SPEECH), "needs 1 voices"),
        (Clip("x.wav", (1,), "babble", (("hello", DELIVERY),), 1.0), "needs 2 voices"),
        (Clip("x.wav", (1,), "thunder", seconds=1.0), "unknown kind of noise"),
    ],
)
def test_impossible_clips_are_refused(clip, message):
    with pytest.raises(UserError, match=message):
        waveform_of(clip, Synthesizer())


def test_a_path_is_used_once_and_processes_are_counted_from_one(tmp_path):
    with pytest.raises(UserError, match="same path"):
        render_all(clips(tmp_path) * 2, print)
    with pytest.raises(UserError, match="processes=0"):
        render_all(clips(tmp_path), print, processes=0)
