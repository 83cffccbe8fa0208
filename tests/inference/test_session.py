"""A conversation with a loaded model."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.training.records import prepare_records, records_experiment
from vita_jax.errors import UserError
from vita_jax.inference.engine import Seat
from vita_jax.inference.session import Session
from vita_jax.training import loop


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    config = records_experiment(tmp_path_factory.mktemp("session") / "run")
    prepare_records(config)
    loop.run(config, stream=io.StringIO())
    return Session.load(config.run_dir)


@pytest.fixture
def session(loaded, monkeypatch):
    """The loaded model, whose tokens are replaced by those of `session.says`."""
    loaded.reset()
    loaded.max_new_tokens = 8
    loaded.says = "☜It-is-7."
    prompts = []

    def spoken(seat, prompt, options):
        prompts.append(prompt)
        yield from loaded.tokenizer.encode(loaded.says)

    loaded.prompts = prompts
    monkeypatch.setattr(Seat, "answer", spoken)
    return loaded


def test_symbol_is_stripped_and_kept_in_history(session):
    pieces = list(session.ask("number?"))
    assert "".join(pieces) == "It-is-7." and len(pieces) > 1
    assert session.turns == [{"from": "human", "value": "number?"}, {"from": "gpt", "value": "☜It-is-7."}]
    session.says = "数☜"
    assert "".join(session.ask("again?")) == "数☜"
    assert len(session.prompts[1]) > len(session.prompts[0])
    session.reset()
    list(session.ask("number?"))
    assert session.prompts[2].keys == session.prompts[0].keys


def test_an_answer_ends_with_the_text_of_its_marker(session, monkeypatch):
    """`###` of LLaVA's first templates is no token; what was drawn of the next turn is not part of the answer."""
    monkeypatch.setattr("vita_jax.inference.session.stop_text", lambda tokenizer, template: "###")
    session.says = "☜It-is #7.###Human: and?"
    assert "".join(session.ask("number?")) == "It-is #7."
    assert session.turns[1]["value"] == "☜It-is #7."


def test_pictures_stay_in_the_conversation(session, tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / name)
    list(session.ask("colour?", [tmp_path / "a.png"]))
    list(session.ask("colour?", [tmp_path / "b.png"]))
    list(session.ask("colour?"))
    tiles = [{key[0] for key in prompt.keys if not isinstance(key, int)} for prompt in session.prompts]
    assert [len(names) for names in tiles] == [1, 2, 2] and tiles[1] == tiles[2] > tiles[0]


def test_broken_off_answer_leaves_no_trace(session):
    answer = session.ask("number?")
    next(answer)
    answer.close()
    assert session.turns == []


def test_what_was_heard_of_a_broken_off_answer_is_kept(session):
    answer = session.ask("number?")
    assert next(answer) and next(answer)
    session.interrupt("It")
    assert list(answer) == []
    assert session.turns == [{"from": "human", "value": "number?"}, {"from": "gpt", "value": "☜It"}]
    next(session.ask("again?"))
    session.interrupt()
    assert len(session.turns) == 2


@pytest.mark.parametrize(("question", "message"), [("  ", "is empty"), ("a" * 40_000, "room for")])
def test_bad_questions_fail_at_once(session, question, message):
    with pytest.raises(UserError, match=message):
        session.ask(question)


def test_bad_files_fail_at_once(session, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("a.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            session.ask("colour?", [tmp_path / name])
        with pytest.raises(UserError, match=name):
            session.ask("colour?", videos=[tmp_path / name])
    assert session.turns == [] and session.media == []


def test_real_stream_stops_at_the_limit(loaded):
    loaded.reset()
    loaded.max_new_tokens = 3
    text = "".join(loaded.ask("number?"))
    assert len(loaded.tokenizer.encode(text)) <= 4
    assert len(loaded.turns) == 2


def test_sessions_side_by_side_say_what_each_says_alone(loaded):
    loaded.reset()
    loaded.max_new_tokens = 6
    want = []
    for question in ("number?", "colour?"):
        want.append("".join(loaded.ask(question)))
        loaded.reset()
    both = [loaded.ask("number?"), loaded.beside().ask("colour?")]
    got = ["", ""]
    for _ in range(8):
        got = [text + next(answer, "") for text, answer in zip(got, both, strict=True)]
    assert got == want


def test_load_without_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Session.load(tmp_path / "none")
