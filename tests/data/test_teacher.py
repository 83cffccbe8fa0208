"""A language model elsewhere: what it is sent, and what is made of its failures."""

from __future__ import annotations

import pytest

from tests.data.stub_teacher import stub_teacher
from vita_jax.data.teacher import KEY_VARIABLE, ReplyError, Teacher, ask
from vita_jax.errors import UserError

QUESTION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?"}]


def test_what_is_sent_and_what_comes_back(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-1")
    with stub_teacher(lambda messages: f"  {messages[-1]['content']} is 2.\n") as stub:
        teacher = Teacher(stub.url, "large", temperature=0.0, max_tokens=7)
        assert ask(teacher, QUESTION) == "1+1? is 2."
    (asked,) = stub.asked
    assert asked == {
        "path": "/v1/chat/completions",
        "model": "large",
        "messages": QUESTION,
        "temperature": 0.0,
        "max_tokens": 7,
    }
    assert stub.headers[0]["authorization"] == "Bearer secret-1"


@pytest.mark.parametrize(
    ("said", "reason"),
    [(400, "refused: 400"), (422, "refused: 422"), (None, "cut off at 1024"), (" \n", "is empty")],
)
def test_a_request_without_a_usable_reply(said, reason):
    with stub_teacher(lambda _: said) as stub, pytest.raises(ReplyError, match=reason):
        ask(Teacher(stub.url, "large"), QUESTION)


@pytest.mark.parametrize(("status", "reason"), [(401, KEY_VARIABLE), (404, "model large: 404"), (500, "500")])
def test_a_teacher_that_cannot_be_asked(status, reason):
    with stub_teacher(lambda _: status) as stub, pytest.raises(UserError, match=reason):
        ask(Teacher(stub.url, "large", retries=0), QUESTION)


def test_a_busy_teacher_is_asked_again():
    said = [429, 503, "2"]
    with stub_teacher(lambda _: said.pop(0)) as stub:
        assert ask(Teacher(stub.url, "large", retries=2), QUESTION) == "2"
    assert len(stub.asked) == 3


def test_nobody_there():
    with stub_teacher(lambda _: "") as stub:
        pass
    with pytest.raises(UserError, match=f"teacher {stub.url} cannot be reached"):
        ask(Teacher(stub.url, "large", retries=0), QUESTION)


def test_settings_are_checked():
    for settings, message in (
        ({"url": "localhost:8000"}, "must be a URL"),
        ({"model": ""}, "name of a model"),
        ({"temperature": 3.0}, "temperature 3.0"),
        ({"max_tokens": 0}, "max_tokens 0"),
    ):
        with pytest.raises(UserError, match=message):
            Teacher(**{"url": "http://localhost:1/v1", "model": "large", **settings})
