"""The synthesiser: the same clip for the same text and voice whatever came before; wrong requests are refused."""

import ctypes
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipelines.speech import synthesizer as synthesizer_lib
from data_pipelines.speech.synthesizer import (
    KEPT_SILENCE,
    SAMPLE_RATE,
    Synthesizer,
    list_variants,
    list_voices,
    trim_silence,
)
from vita_jax.errors import UserError

TEXTS = {"en-us": "Hello there", "cmn": "你好吗"}
PROGRAM = """
import hashlib
from data_pipelines.speech.synthesizer import Synthesizer
waveform, _ = Synthesizer().speak("Hello there", "en-us", variant="whisper", rate_wpm=160)
print(hashlib.sha256(waveform.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def synthesizer():
    return Synthesizer()


def test_a_clip_is_16_khz_speech_without_silence_around(synthesizer):
    waveform, rate = synthesizer.speak("Hello there", "en-us")
    assert (rate, waveform.dtype, waveform.ndim) == (SAMPLE_RATE, np.float32, 1)
    assert 0.4 < len(waveform) / rate < 1.2
    assert 0.2 < np.abs(waveform).max() <= 1
    kept = round(KEPT_SILENCE * rate)
    assert np.abs(waveform[kept : 2 * kept]).max() > synthesizer_lib.SILENCE_LEVEL


@pytest.mark.parametrize("variant", [None, "m3", "f5", "klatt", "klatt4", "croak", "whisper", "Annie"])
@pytest.mark.parametrize("voice", TEXTS)
def test_a_clip_does_not_depend_on_what_was_spoken_before(synthesizer, voice, variant):
    first, _ = synthesizer.speak(TEXTS[voice], voice, variant=variant)
    synthesizer.speak("something else", "en-gb", variant="klatt2", rate_wpm=250, pitch=80)
    again, _ = synthesizer.speak(TEXTS[voice], voice, variant=variant)
    np.testing.assert_array_equal(first, again)


def test_another_process_speaks_the_same_samples_at_another_time():
    runs = []
    for _ in range(2):
        runs.append(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True))
        time.sleep(1.1)  # espeak-ng takes its seed from the clock, in seconds, unless it is told one
    assert runs[0].stdout and runs[0].stdout == runs[1].stdout, runs[0].stderr


def test_every_voice_speaks_and_sounds_different(synthesizer):
    clips = {v: synthesizer.speak(TEXTS["cmn" if v == "cmn" else "en-us"], v)[0].tobytes() for v in list_voices()}
    assert len(set(clips.values())) == len(list_voices())
    assert {*(f"m{i}" for i in range(1, 9)), *(f"f{i}" for i in range(1, 6)), "klatt", "croak", "whisper"} <= set(
        list_variants()
    )


def test_rate_pitch_and_range_change_the_clip(synthesizer):
    plain, _ = synthesizer.speak("Hello there", "en-us")
    fast, _ = synthesizer.speak("Hello there", "en-us", rate_wpm=260)
    assert len(fast) < 0.8 * len(plain)
    for change in ({"pitch": 80}, {"pitch_range": 90}):
        assert synthesizer.speak("Hello there", "en-us", **change)[0].tobytes() != plain.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": " "}, "text to speak"),
        ({"text": "..."}, "nothing can be said"),
        ({"voice": "en-mars"}, "unknown voice 'en-mars'"),
        ({"variant": "m99"}, "unknown variant 'm99'"),
        ({"rate_wpm": 20}, "rate_wpm=20"),
        ({"pitch": 100}, "pitch=100"),
        ({"pitch_range": -1}, "pitch_range=-1"),
    ],
)
def test_wrong_requests_are_refused(synthesizer, arguments, message):
    with pytest.raises(UserError, match=message):
        synthesizer.speak(**{"text": "hello", "voice": "en-us"} | arguments)


def test_a_missing_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install 'espeakng-loader"):
        Synthesizer()


def test_a_library_in_use_elsewhere_is_an_error_not_a_different_clip(synthesizer):
    import _ctypes

    held = ctypes.CDLL(synthesizer._library_path)
    try:
        with pytest.raises(UserError, match="in use by other code"):
            synthesizer.speak("hello", "en-us")
    finally:
        for _ in range(2):  # ours, and the one the check took
            _ctypes.dlclose(held._handle)
    assert len(synthesizer.speak("hello", "en-us")[0])


def test_silence_alone_is_cut_to_nothing():
    assert trim_silence(np.zeros(100, np.float32), SAMPLE_RATE).shape == (0,)
