"""A whole run with sound: recognition, spoken questions, a voice, evaluation, chat, all on one tiny trained model."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.hearing import hearing_experiment, prepare_hearing
from vita_jax import chat, evaluate
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import answer_items
from vita_jax.evaluation.items import read_items
from vita_jax.evaluation.recognition import load_recogniser
from vita_jax.evaluation.results import format_result, format_stages, read_evaluation
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.inference.engine import Seat
from vita_jax.inference.session import Session
from vita_jax.inference.speak import Speaker, SpeakOptions, save_voices, voices
from vita_jax.models.audio.cmvn import RELEASED_MEAN
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import data_folder, tokenizer_folder
from vita_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = hearing_experiment(tmp_path_factory.mktemp("hearing") / "run", speaks=True)
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


ANSWERED = {"spoken": 2, "noise": 2, "transcribe": 2, "accepted": 2}
MEASURED = {
    "input_head": 6,
    "recognition_full": 2,
    "recognition_chunked": 2,
    "voice_synthesizer": 4,
    "voice_copy": 4,
    "voice_decoders": 4,
}


def test_evaluate_the_speech_benchmark(config, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--checkpoint", config.run_dir, "--benchmark", "speech", "--output", str(output)]
    assert evaluate.main(arguments) == 0
    result = json.loads(output.read_text())
    groups = result["groups"]
    sizes = {name: group["n"] for name, group in groups.items()}
    spoken = {name: sizes.pop(name) for name in ("voice_answers",) if name in sizes}
    assert sizes == ANSWERED | MEASURED
    assert spoken or "voice_answers" in result["left_out"]
    assert groups["accepted"]["accuracy"] == pytest.approx(1 - groups["spoken"]["refused"])
    counts = np.asarray(groups["input_head"]["confusion"]["counts"])
    np.testing.assert_array_equal(counts.sum(axis=1), [2, 2, 2])
    assert groups["input_head"]["accuracy"] == pytest.approx(np.mean(np.diag(counts) / counts.sum(axis=1)))
    assert groups["voice_copy"]["mel_distance"] > 0 and groups["voice_copy"]["by_kind"].keys() == {"answer", "sentence"}
    assert set(result["real_time"]) == {"encoder", "ar_decoder", "codec"} and min(result["real_time"].values()) > 0
    assert result["sounds"] and {sound["title"] for sound in result["sounds"]} >= {"recording", "codec copy"}
    for sound in result["sounds"]:
        assert (Path(config.run_dir) / "evaluation" / sound["file"]).read_bytes().startswith(b"RIFF"), sound
    printed = capsys.readouterr().out
    assert "sound that is not for the model" in printed and "seconds of computing per second of sound" in printed
    assert "is \\ taken for" in printed and "without any error: " in printed
    lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert {name: sum(line["group"] == name for line in lines) for name in sizes} == sizes
    for line in lines:
        assert line["score"] == groups[line["group"]]["outcomes"][line["kind"]][line["question_id"]], line
    assert all(line["truth"] and line["errors"][1] for line in lines if line["group"] in ("voice_copy", "transcribe"))
    assert len((Path(config.run_dir) / "evaluation" / "final.speech.answers.jsonl").read_text().splitlines()) == 6
    assert read_evaluation(config.run_dir, "final") is None
    assert read_evaluation(config.run_dir, "final", "speech") == result
    assert "recognition_chunked" in format_stages(config.run_dir, config)


def test_the_recogniser_is_that_of_its_own_stage(config, recogniser):
    random = load_params(checkpoint_folder(config.run_dir, "codec"))
    encoder = [model.params["audio"]["encoder"] for model in (random, recogniser)]
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, encoder), strict=True))
    loaded = load_recogniser(config, random.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params["audio"]["encoder"], encoder[1])
    tokenizer = load_tokenizer(tokenizer_folder(config))
    names = ["voice_synthesizer", "voice_copy"]
    result = evaluate_params(config, random.params, tokenizer, benchmark="speech", groups=names, limit=1)
    assert list(result["groups"]) == names and result["num_items"] == 0 and "sounds" not in result
    assert all(group["n"] == 2 for group in result["groups"].values())


def test_groups_that_a_model_cannot_have(config):
    params = load_params(config.run_dir).params
    silent = dataclasses.replace(config, model=dataclasses.replace(config.model, codec=None, speech=None))
    tokenizer = load_tokenizer(tokenizer_folder(config))
    with pytest.raises(UserError, match="'voice_copy' .* cannot be measured: the model has no codec"):
        evaluate_params(silent, params, tokenizer, benchmark="speech", groups=["voice_copy"])
    deaf = dataclasses.replace(silent.model, audio=None, state_head=None, ctc_vocab_size=0)
    deaf = dataclasses.replace(silent, model=deaf)
    result = evaluate_params(deaf, params, tokenizer, benchmark="speech")
    assert result["groups"] == {} and set(result["left_out"]) == {*ANSWERED, *MEASURED, "voice_answers"}
    assert "left out: spoken, because the model does not hear" in format_result(result)


def test_voices_outlive_the_data(config, tmp_path):
    params = load_params(config.run_dir).params
    made = voices(config, params)
    assert set(made) == {"en", "zh"} and made["en"].shape == (config.model.codec.num_global_codes,)
    data = dataclasses.replace(config.data, folder=str(data_folder(config)))
    moved = dataclasses.replace(config, run_dir=str(tmp_path), data=data)
    (tmp_path / "voices.json").write_text('{"en": [11, 11]}')
    assert save_voices(moved, params) == tmp_path / "voices.json"
    away = dataclasses.replace(moved, data=dataclasses.replace(data, folder=str(tmp_path / "none")))
    for language, codes in voices(away, params).items():
        np.testing.assert_array_equal(codes, made[language])
    whole = (tmp_path / "voices.json").read_bytes()
    with pytest.raises(UserError, match="the model's voice is unknown: there is no .*none/"):
        save_voices(away, params)
    assert (tmp_path / "voices.json").read_bytes() == whole


def test_several_replies_are_those_of_one_at_a_time(config):
    params, tokenizer = load_params(config.run_dir).params, load_tokenizer(tokenizer_folder(config))
    speaker = Speaker(config.model, params, np.asarray([1, 2]), SpeakOptions(max_tokens=30, bucket=4, min_piece=4))
    texts = ["red gold, blue.", "", "number"]
    together = speaker.speak_many(texts, tokenizer)
    assert len(together[0]) and not len(together[1])
    for text, wave in zip(texts, together, strict=True):
        np.testing.assert_allclose(wave, speaker.speak(text, tokenizer), atol=1e-5)


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
    monkeypatch.setattr(Seat, "answer", lambda *_: iter(session.tokenizer.encode(session.says)))
    assert list(session.ask("", audio=[sound])) == [] and session.last_state == "noise"
    assert session.turns == [] and session.media == []
    chat.answer(session, "", chat.Attached(), [sound])
    assert capsys.readouterr().out == "(not meant for me)\n"
    session.says = "☞red"
    assert "".join(session.ask("", audio=[sound])) == "red" and session.last_state == "audio"
    assert session.turns[0]["value"] == "<audio>\n" and len(session.media) == 1
    with pytest.raises(UserError, match="is empty"):
        session.ask(" ")
