"""What a stream says of a question: by the symbols of VITA-1.0 and 1.5, or by a state head."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.inference.engine import Answer, AnswerOptions
from vita_jax.inference.prefix import LIVE, Prompt, text_prompt
from vita_jax.inference.streams import HEAD, TOKEN, Reply, Streams, how_to_decide
from vita_jax.models.state_head import StateHeadConfig, two_class_head

SYMBOLS = {
    "vita_1_0": {1: "<1>", 2: "<2>", 3: "<3>"},
    "vita_1_5": {1: "☞", 2: "☟", 3: "☜"},
}
STATES = {1: "audio", 2: "noise", 3: "text"}
WORDS = {10: " seven", 11: " ", 12: " and", 13: "."}


class Words:
    """A tokenizer of a few words."""

    vocab_size = 20

    def __init__(self, symbols):
        self.pieces = {**symbols, **WORDS}

    def decode(self, ids, *, skip_special=False):
        return "".join(self.pieces[i] for i in ids)


@dataclass
class OneSeat:
    """Gives the tokens that a test puts into its answer."""

    work: Answer | None = None
    prompts: list = field(default_factory=list)

    def answer(self, prompt, options):
        self.prompts.append(prompt)
        self.work = Answer(None, prompt, options)
        return self.work

    def prepare(self, prompt, *, needs_last=False):
        assert needs_last
        self.prompts.append(prompt)
        self.work = Answer(None, prompt, None)
        return self.work

    def interrupt(self):
        self.work = None


def streams_with(symbols, decides=TOKEN, **more):
    return SimpleNamespace(seats=[OneSeat()], tokenizer=Words(symbols), symbols=STATES, decides=decides, **more)


@pytest.mark.parametrize("release", SYMBOLS)
@pytest.mark.parametrize("first", [1, 3])
def test_a_query_is_decided_by_its_first_token(release, first):
    streams = streams_with(SYMBOLS[release])
    reply = Reply(streams, 0, text_prompt([5]), AnswerOptions())
    assert reply.poll() == "" and not reply.decided
    reply._work.tokens += [first]
    assert reply.poll() == "" and reply.decided and reply.state == STATES[first]
    reply._work.tokens += [11, 10]  # the space after the symbol is not part of the answer
    assert reply.poll() == "seven" and reply.symbol == SYMBOLS[release][first]
    reply._work.tokens += [13, 19]  # the last one is beyond the tokenizer's words, and spells nothing
    streams.tokenizer.vocab_size = 19
    reply._work.reason = "stop"
    assert reply.poll() == "." and reply.done and reply.poll() == ""


@pytest.mark.parametrize("release", SYMBOLS)
def test_noise_says_nothing_whatever_follows(release):
    reply = Reply(streams_with(SYMBOLS[release]), 0, text_prompt([5]), AnswerOptions())
    reply._work.tokens += [2, 10, 12]
    assert reply.poll() == "" and reply.state == "noise" and reply.decided
    reply.stop()
    assert reply.done


def test_an_answer_without_a_symbol_is_one():
    reply = Reply(streams_with(SYMBOLS["vita_1_5"]), 0, text_prompt([5]), AnswerOptions())
    reply._work.tokens += [11]
    assert reply.poll() == "" and not reply.decided
    reply._work.tokens += [12]
    assert reply.poll() == "and" and reply.decided and reply.state is None and reply.symbol == ""


def test_an_answer_that_takes_the_place_of_another_is_not_decided_again():
    reply = Reply(streams_with(SYMBOLS["vita_1_5"]), 0, text_prompt([5]), AnswerOptions(), decided=True, state="audio")
    reply._work.tokens += [2, 10]
    assert reply.poll() == "seven" and reply.state == "audio" and reply.symbol == "☟"


@pytest.mark.parametrize("state", ["audio", "noise"])
def test_a_head_decides_before_the_answer_is_begun(state):
    streams = streams_with(
        SYMBOLS["vita_1_5"], HEAD, head_prompt=lambda prompt: prompt.cut(1), read_head=lambda hidden: state
    )
    reply, seat = Reply(streams, 0, text_prompt([5, 6]), AnswerOptions()), streams.seats[0]
    assert reply.poll() == "" and not reply.decided and [len(p) for p in seat.prompts] == [1]
    seat.work.reason = "stop"
    assert reply.poll() == "" and reply.decided and reply.state == state
    assert reply.done == (state == "noise") and [len(p) for p in seat.prompts] == [1, 2][: 1 + (state == "audio")]


def test_each_head_is_read_where_it_was_trained():
    sound = (LIVE, "1")
    prompt = Prompt((4, ("tile", "x"), (sound, 0), (sound, 1), 5, 6), np.arange(6), {})
    for head, length in ((StateHeadConfig(8), 6), (two_class_head(8), 4)):
        streams = Streams.__new__(Streams)
        streams._head_config = head
        assert len(streams.head_prompt(prompt)) == length


def test_head_classes():
    """The third class of the two-class layout is never a target and never an answer."""
    for head, logits, want in (
        (StateHeadConfig(2), [0.0, 1.0, 5.0], "text"),
        (StateHeadConfig(2), [3.0, 1.0, 0.0], "audio"),
        (two_class_head(2), [0.0, 1.0, 5.0], "noise"),
    ):
        streams = Streams.__new__(Streams)
        streams._head_config = head
        layer = {"kernel": np.zeros((2, 3), np.float32), "bias": np.asarray(logits, np.float32)}
        streams._session = SimpleNamespace(
            model=SimpleNamespace(dtype=np.float32), params={"state_head": {"predictor_head": layer}}
        )
        assert streams.read_head(np.ones((1, 2), np.float32)) == want


def test_what_decides():
    head = StateHeadConfig(8)
    assert how_to_decide("auto", STATES, None, False) == how_to_decide("token", STATES, head, True) == TOKEN
    assert how_to_decide("auto", {}, head, True) == how_to_decide("head", STATES, head, True) == HEAD
    for arguments, message in (
        (("token", {}, head, True), "no state symbols; use decide='head'"),
        (("auto", {}, None, False), "cannot tell what is meant"),
        (("head", STATES, head, False), "no trained state head"),
        (("head", STATES, StateHeadConfig(8, 5), True), "5 classes"),
    ):
        with pytest.raises(UserError, match=message):
            how_to_decide(*arguments)
