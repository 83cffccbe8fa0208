"""An answer aloud while it is written: streamed is offline, the tail is spoken, and it can be stopped anywhere."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.inference.test_speak import CONFIG, OPTIONS, Codes
from tests.training.voice import CODEC
from vita_jax.errors import UserError
from vita_jax.inference.codec_stream import StreamOptions
from vita_jax.inference.speak import Speaker
from vita_jax.inference.talk import ExternalVoice, ModelVoice, Spoken, spoken_pieces, talk
from vita_jax.inference.timings import AR_DECODER, FIRST_CODE, FIRST_PIECE, FIRST_SAMPLE, Timeline
from vita_jax.inference.timings import CODEC as CODEC_STAGE
from vita_jax.models.vita import Vita, text_inputs
from vita_jax.parallel.rules import unbox

pytestmark = pytest.mark.slow

TEXT = "one two, three four. ...!!! five"


@pytest.fixture(scope="module")
def voice():
    inputs = text_inputs(np.zeros((1, 2), np.int32), image_size=8)
    params = unbox(jax.jit(Vita(CONFIG).init)(jax.random.key(0), inputs))["params"]
    # Larger codebooks than at the start of training, so that codes are heard.
    params["codec"]["quantizer"] = jax.tree.map(lambda x: 30 * x, params["codec"]["quantizer"])
    stream = StreamOptions(chunk=6, quiet_level=None, first_chunk=2)
    speaker = Speaker(CONFIG, params, np.asarray([1, 2]), dataclasses.replace(OPTIONS, stream=stream))
    return ModelVoice(speaker, Codes())


class Writer:
    """An answer, string by string, that knows how much of it has been asked for."""

    def __init__(self, strings) -> None:
        self.strings, self.written, self.closed = iter(strings), "", False

    def __iter__(self):
        return self

    def __next__(self) -> str:
        text = next(self.strings)
        self.written += text
        return text

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("strings", [[TEXT], list(TEXT), ["one tw", "o, three", " four. ...!", "!! fi", "ve"]])
def test_streamed_is_offline_however_the_text_comes(voice, strings):
    sounds = list(talk(strings, voice))
    whole = voice.speaker.speak(TEXT, Codes())
    np.testing.assert_allclose(np.concatenate([sound.samples for sound in sounds]), whole, atol=1e-4)
    pieces = spoken_pieces(sounds, CODEC.sampling_rate)
    assert "".join(text for text, _ in pieces) == TEXT and pieces[-1][0] == "!! five" and pieces[-1][1] > 0
    assert sum(seconds for _, seconds in pieces) == pytest.approx(len(whole) / CODEC.sampling_rate)


def test_a_piece_is_spoken_before_the_next_one_is_written(voice):
    writer, timeline = Writer(TEXT), Timeline()
    voice.speaker.timeline = timeline
    sounds = talk(writer, voice, timeline=timeline)
    first = next(sounds)
    assert writer.written == first.text == "one two," and not first.ends
    assert len(first.samples) == 2 * CODEC.hop  # the first chunk is short
    assert list(timeline.marks) == [FIRST_PIECE, FIRST_CODE, FIRST_SAMPLE]
    for _ in sounds:
        pass
    assert timeline.sound[AR_DECODER] == pytest.approx(timeline.sound[CODEC_STAGE])
    assert all(timeline.real_time_factor(stage) > 0 for stage in (AR_DECODER, CODEC_STAGE))


def test_it_can_be_stopped_anywhere(voice):
    for count in (1, 2, 4):
        writer = Writer(TEXT)
        sounds = talk(writer, voice)
        heard = [next(sounds) for _ in range(count)]
        sounds.close()
        assert writer.closed and len(writer.written) < len(TEXT) and len(heard) == count
    assert np.isfinite(voice.speaker.speak("one two,", Codes())).all()


def test_another_synthesiser_speaks_behind_the_same_interface():
    asked = []

    def synthesiser(text: str) -> tuple[np.ndarray, int]:
        asked.append(text)
        return np.full(80 * len(text), 0.5, np.float32), 8_000

    writer = Writer("☞one two, .... red")
    sounds = talk(writer, ExternalVoice(synthesiser))
    assert next(sounds).text == "☞one two," == writer.written
    rest = list(sounds)
    assert asked == ["one two,", "red"]
    assert [(sound.text, len(sound.samples), sound.ends) for sound in rest] == [
        ("☞one two,", 0, True), (" ....", 0, True), (" red", 480, False), (" red", 0, True),
    ]  # fmt: skip


def test_pieces_and_their_seconds():
    def sound(text: str, samples: int, ends: bool = False) -> Spoken:
        return Spoken(np.zeros(samples, np.float32), text, ends)

    sounds = [sound("a,", 10), sound("a,", 0, True), sound("a,", 30), sound("a,", 30), sound("a,", 0, True)]
    assert spoken_pieces(sounds, 10) == [("a,", 1.0), ("a,", 6.0)]
    assert spoken_pieces(sounds[:3], 10) == [("a,", 1.0), ("a,", 3.0)]
    with pytest.raises(UserError, match="min_piece 0"):
        next(talk(["a"], ExternalVoice(lambda text: None), min_piece=0))


def test_a_timeline_measures_work_and_order():
    ticks = iter(range(100))
    timeline = Timeline(clock=lambda: float(next(ticks)))
    timeline.mark("a")
    assert list(timeline.watch("codec", [1, 2], 0.5, first="b")) == [1, 2]
    timeline.mark("a")
    assert timeline.since("b", "a") == 3.0 and timeline.since("c", "a") is None
    assert timeline.worked["codec"] == 3.0 and timeline.real_time_factor("codec") == 3.0
    assert timeline.real_time_factor("encoder") is None
