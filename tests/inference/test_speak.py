"""A reply aloud: streamed sound is the offline sound, files hold it, and what does not fit is said."""

from __future__ import annotations

import dataclasses
import wave

import jax
import numpy as np
import pytest

from tests.training.tiny import VOCAB, model_config
from tests.training.voice import CODEC, voice_config
from vita_jax.errors import UserError
from vita_jax.inference.codec_stream import StreamOptions
from vita_jax.inference.speak import Speaker, SpeakOptions, sentences, voice_of, write_wav
from vita_jax.inference.speech_tokens import SpeechSampling
from vita_jax.models.vita import Vita, text_inputs
from vita_jax.parallel.rules import unbox

pytestmark = pytest.mark.slow

CONFIG = voice_config()
STREAM = StreamOptions(chunk=6, quiet_window=25, quiet_level=0.02)
OPTIONS = SpeakOptions(SpeechSampling(top_k=3), 30, 4, 5, 5, STREAM)


class Codes:
    """One id per character."""

    def encode(self, text: str, *, allow_special: bool = True, add_bos: bool = True) -> list[int]:
        return [ord(c) % VOCAB for c in text]


@pytest.fixture(scope="module")
def params():
    inputs = text_inputs(np.zeros((1, 2), np.int32), image_size=8)
    drawn = unbox(jax.jit(Vita(CONFIG).init)(jax.random.key(0), inputs))["params"]
    # Larger codebooks than at the start of training, so that codes are heard.
    drawn["codec"]["quantizer"] = jax.tree.map(lambda x: 30 * x, drawn["codec"]["quantizer"])
    return drawn


@pytest.fixture(scope="module")
def speaker(params):
    return Speaker(CONFIG, params, np.asarray([1, 2]), OPTIONS)


def test_a_reply_is_spoken_piece_by_piece(speaker):
    text = "one two, three four. five"
    whole = speaker.speak(text, Codes())
    assert len(whole) and len(whole) % CODEC.hop == 0
    pieces = [speaker.speak_ids(ids, n) for n, ids in enumerate(sentences([text], Codes()))]
    assert len(pieces) == 3
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_draws_are_those_of_seed_and_sentence(speaker):
    ids = [3, 4, 5]
    first = list(speaker.tokens(ids))
    assert first == list(speaker.tokens(ids))
    assert len(first) <= 30 and all(0 <= token < 12 for token in first)
    assert first != list(speaker.tokens(ids, sentence=1))


def test_nothing_to_say_is_silence(speaker):
    assert speaker.speak(" ☞ ", Codes()).shape == (0,)
    assert list(speaker.stream_ids([])) == []


def test_a_recording_gives_a_voice_and_a_file_holds_the_sound(params, tmp_path):
    recording = np.sin(np.arange(20 * CODEC.hop + 3)).astype(np.float32)
    voice = voice_of(CONFIG, params, recording)
    assert voice.shape == (2,) and voice.dtype == np.int32
    write_wav(tmp_path / "a.wav", recording, 1600)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 1600)
        read = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    np.testing.assert_allclose(read, recording, atol=1e-4)


def test_errors(speaker, params, tmp_path):
    with pytest.raises(UserError, match="does not speak"):
        Speaker(model_config(), params, np.zeros(2, np.int32))
    with pytest.raises(UserError, match="3 codes for the voice"):
        Speaker(CONFIG, params, np.zeros(3, np.int32))
    with pytest.raises(UserError, match="text ids go from 1 to 99"):
        list(speaker.tokens([1, 99]))
    with pytest.raises(UserError, match="too short for a voice"):
        voice_of(CONFIG, params, np.zeros(20, np.float32))
    with pytest.raises(UserError, match="a voice needs a codec"):
        voice_of(model_config(), params, np.zeros(200, np.float32))
    with pytest.raises(UserError, match="cannot be written"):
        write_wav(tmp_path / "no" / "a.wav", np.zeros(3), 1600)
    with pytest.raises(UserError, match="bucket 0"):
        dataclasses.replace(OPTIONS, bucket=0)
