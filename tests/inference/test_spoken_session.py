"""A spoken conversation with the kept weights: heard while it is spoken, answered aloud, interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.speech.synthesizer import Synthesizer
from tests.data.media import write_wav
from vita_jax.data.audio import read_audio
from vita_jax.errors import UserError
from vita_jax.inference.history import heard_text
from vita_jax.inference.listen import ListenOptions
from vita_jax.inference.session import Session
from vita_jax.inference.talk import spoken_pieces
from vita_jax.inference.timings import EVENTS, STAGES
from vita_jax.ops.filter_bank import num_frames

WEIGHTS = Path(__file__).parents[2] / "experiments/quickstart/weights"
WRITTEN = "red/white: 4271\nWhat are the digits?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def loaded() -> Session:
    return Session.load(WEIGHTS, num_rows=3)


@pytest.fixture
def session(loaded) -> Session:
    return loaded.beside()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    samples, rate = Synthesizer().speak("which number is the largest one?", "en-us")
    path = tmp_path_factory.mktemp("sound") / "question.wav"
    write_wav(path, samples, rate)
    return path


def speak_to(session: Session, path: Path) -> str:
    question, wave = session.ask_aloud(), read_audio(path, session.config.audio)
    for block in np.array_split(wave, 17):
        question.hear(block)
    return "".join(question.end())


def test_a_question_heard_whole_is_that_of_its_file(session, sound):
    other = dataclasses.replace(session, listening=ListenOptions("full"), turns=[], media=[])
    assert speak_to(other, sound) == "".join(session.ask("", audio=[sound]))
    assert other.last_state == session.last_state
    # The next turn sees the same history.
    assert "".join(other.ask(WRITTEN)) == "".join(session.ask(WRITTEN))


def test_only_the_end_of_the_sound_is_left_when_it_ends(session, sound):
    list(session.ask(WRITTEN))
    question, wave = session.ask_aloud(), read_audio(sound, session.config.audio)
    heard = [question.hear(block) for block in np.array_split(wave, 11)]
    assert heard[-1] >= 14 and sorted(heard) == heard
    list(question.end())
    total = session.config.model.audio.num_tokens(num_frames(len(wave)))
    assert session.work.reused + session.work.computed == len(session.work.prompt)
    # The tokens that came with the end of the sound, the last one before them, and the header of the answer.
    assert session.work.computed <= total - heard[-1] + 8 and session.work.reused > 3 * session.work.computed
    assert session.timeline.since("first LLM token") > session.timeline.since("last encoder chunk") > 0


def test_too_little_sound_is_refused_and_leaves_no_trace(session):
    question = session.ask_aloud()
    question.hear(np.zeros(500, np.float32))
    with pytest.raises(UserError, match="too short to be heard"):
        question.end()
    assert session.turns == []


def test_an_answer_aloud_streams_what_is_said_offline(session):
    sounds = list(session.aloud(session.ask(WRITTEN), "en"))
    text = session.turns[-1]["value"].lstrip("☜☞☟")
    whole, rate = session.say(text, "en")
    np.testing.assert_allclose(np.concatenate([sound.samples for sound in sounds]), whole, atol=1e-4)
    assert all(session.timeline.since(event, EVENTS[2]) >= 0 for event in EVENTS[2:])
    assert all(session.timeline.real_time_factor(stage) for stage in STAGES[1:]) and rate == 16_000


def test_a_broken_off_answer_goes_on_as_a_conversation_that_had_only_that(session):
    """Whether it was still being written or only still being spoken."""
    sounds = []
    for count in (1, None):
        session.reset()
        stream = session.aloud(session.ask(WRITTEN), "en")
        sounds = [sound for _, sound in zip(range(count or 1000), stream, strict=False)]
        pieces = spoken_pieces(sounds, 16_000)
        heard = heard_text(pieces, 0.7 * sum(seconds for _, seconds in pieces)) if count is None else "4"
        session.interrupt(heard)
        stream.close()
        assert len(session.turns) == (2 if heard.strip() else 0)
        fresh = dataclasses.replace(session, engine=None)  # with an engine of its own, which knows nothing
        assert "".join(session.ask("red/white: 35\nWhat is the smallest digit?")) == "".join(
            fresh.ask("red/white: 35\nWhat is the smallest digit?")
        )


def test_sessions_share_the_model_and_not_the_conversation(session, sound):
    others = [session, session.beside(), session.beside()]
    questions = [WRITTEN, "red/white: 35\nWhat is the smallest digit?", "3+4"]
    alone = []
    for question in questions:
        alone.append("".join(session.ask(question)))
        session.reset()
    answers = [other.ask(question) for other, question in zip(others, questions, strict=True)]
    texts = ["", "", ""]
    for _ in range(40):
        texts = [text + next(answer, "") for text, answer in zip(texts, answers, strict=True)]
    assert texts == alone
