"""A whole run with sound: recognition, spoken questions, evaluation, chat, all on one tiny trained model."""

from __future__ import annotations

import io
import json
import sys

import jax
import numpy as np
import pytest

from tests.training.hearing import hearing_experiment, prepare_hearing
from vita_jax import chat, evaluate
from vita_jax.errors import UserError
from vita_jax.evaluation.items import read_items
from vita_jax.evaluation.runner import answer_items, benchmark_folder
from vita_jax.inference import session as session_module
from vita_jax.inference.session import Session
from vita_jax.models.audio.cmvn import RELEASED_MEAN
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = hearing_experiment(tmp_path_factory.mktemp("hearing") / "run")
    prepare_hearing(config)
    loop.run(config, stream=io.StringIO())
    return config


@pytest.fixture(scope="module")
def recogniser(config):
    return load_params(checkpoint_folder(config.run_dir, "recognition"))


@pytest.fixture
def session(config):
    session = Session.load(config.run_dir)
    session.max_new_tokens = 4
    return session


def test_the_encoder_is_frozen_after_its_own_stage(config, recogniser):
    final = load_params(config.run_dir)
    assert recogniser.params["ctc_head"]["ctc_lo"]["kernel"].shape == (24, 24)
    for path in (("audio", "encoder"), ("ctc_head",), ("vision",)):
        left, right = recogniser.params, final.params
        for name in path:
            left, right = left[name], right[name]
        jax.tree.map(np.testing.assert_array_equal, left, right)
    np.testing.assert_array_equal(final.params["audio"]["encoder"]["cmvn"]["mean"], np.float32(RELEASED_MEAN))
    steps = [record for record in read_metrics(config.run_dir) if record.get("stage") == "hearing"]
    assert any("state_accuracy" in record for record in steps)


def test_batched_answers_are_those_of_the_session(config, session):
    root = benchmark_folder(config, "speech")
    items = read_items(root / "items.jsonl")
    answers = answer_items(session.model, session.params, session.context, items, root, batch_size=4, max_new_tokens=4)
    for item, answer in zip(items[:3], answers, strict=False):
        session.reset()
        list(session.ask(item.question, [root / item.image] if item.image else [], audio=[root / item.audio]))
        assert session.last_state == "noise" or session.turns[-1]["value"] == answer.lstrip(), item.id


def test_evaluate_the_speech_benchmark(config, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--checkpoint", config.run_dir, "--benchmark", "speech", "--output", str(output)]
    assert evaluate.main(arguments) == 0
    groups = json.loads(output.read_text())["groups"]
    assert {name: group["n"] for name, group in groups.items()} == {"spoken": 2, "noise": 2, "transcribe": 2}
    assert all(0 <= group["refused"] <= 1 for group in groups.values())
    assert "sound that is not for the model" in capsys.readouterr().out


def test_chat_hears(config, tmp_path, capsys, monkeypatch):
    sound = str(benchmark_folder(config, "speech") / "media" / "0.wav")
    picture = sound.replace(".wav", ".png")
    assert chat.main(["--checkpoint", config.run_dir, "--audio", sound, "--image", picture]) == 0
    assert chat.main(["--checkpoint", config.run_dir, "--audio", sound, "--text", "write"]) == 0
    capsys.readouterr()
    (tmp_path / "note.wav").write_text("no sound at all, only some text")
    assert chat.main(["--checkpoint", config.run_dir, "--audio", str(tmp_path / "note.wav")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and "note.wav" in str(tmp_path / "note.wav")
    lines = [f"/audio {tmp_path / 'none.wav'}", "/audio", f"/image {picture}", f"/audio {sound}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert chat.main(["--checkpoint", config.run_dir]) == 0
    printed = capsys.readouterr().out
    assert "none.wav: no such file" in printed and "/audio needs a file" in printed and "ask about it" in printed


def test_what_is_not_meant_for_the_model_has_no_answer(config, session, capsys, monkeypatch):
    sound = benchmark_folder(config, "speech") / "media" / "0.wav"
    session.says = "☟not for me"
    monkeypatch.setattr(session_module, "stream", lambda *_, **__: iter(session.tokenizer.encode(session.says)))
    assert list(session.ask("", audio=[sound])) == [] and session.last_state == "noise"
    assert session.turns == [] and session.media == []
    chat.answer(session, "", chat.Attached(), [sound])
    assert capsys.readouterr().out == "(not meant for me)\n"
    session.says = "☞red"
    assert "".join(session.ask("", audio=[sound])) == "red" and session.last_state == "audio"
    assert session.turns[0]["value"] == "<audio>\n" and len(session.media) == 1
    with pytest.raises(UserError, match="is empty"):
        session.ask(" ")
