"""Answers aloud: `chat --speak`, the voices of a run, and every reason for a file not to be written."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import wave
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data.media import tone, write_wav
from tests.training.hearing import hearing_experiment, hearing_model, prepare_hearing
from tests.training.voice import CODEC, SPEECH
from vita_jax import chat
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.engine import Seat
from vita_jax.inference.session import Session
from vita_jax.inference.speak import sentences, voices
from vita_jax.models.vita import text_inputs
from vita_jax.parallel.rules import unbox
from vita_jax.training.experiment import build_model, data_folder, tokenizer_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A model with ears and a voice, as drawn; its run has the assistant's recordings."""
    folder = tmp_path_factory.mktemp("aloud") / "run"
    config = hearing_experiment(folder, model=hearing_model(codec=CODEC, speech=SPEECH))
    prepare_hearing(config)
    recordings = data_folder(config) / "raw" / "speech_out"
    lines = []
    for name, text in (("a", "red"), ("b", "红"), ("c", "green")):
        write_wav(recordings / f"{name}.wav", tone(0.2, CODEC.sampling_rate, 100.0 * len(lines) + 100), 1600)
        lines.append(json.dumps({"audio": f"{name}.wav", "text": text}))
    (recordings / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = build_model(config)
    inputs = text_inputs(np.zeros((1, 2), np.int32), image_size=config.image.image_size)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))["params"]
    rng = np.random.default_rng(0)
    # Drawn without compiling anything: what it says means nothing anyway.
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    return Session(model, params, config, load_tokenizer(tokenizer_folder(config)))


@pytest.fixture
def session(drawn, monkeypatch):
    """The model, whose answer is `session.says`; `session.spoken`: what its voice was asked to say."""
    drawn.reset()
    drawn.says, drawn.spoken = "☞7, it is red", []
    say = Session.say

    def noted(self, text, language):
        drawn.spoken.append((text, language))
        return say(self, text, language)

    monkeypatch.setattr(Seat, "answer", lambda *_: iter(drawn.tokenizer.encode(drawn.says)))
    monkeypatch.setattr(Session, "say", noted)
    monkeypatch.setattr(chat, "open_session", lambda arguments: drawn)
    return drawn


@pytest.fixture
def sound(session) -> str:
    return str(data_folder(session.config) / "source" / "0.wav")


def samples_in(path: Path) -> int:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, CODEC.sampling_rate)
        return file.getnframes()


def test_a_reply_is_written_out_piece_by_piece(drawn):
    spoken = [drawn.tokenizer.decode(ids) for ids in sentences(["42 is it, 7+0=7+7=14"], drawn.tokenizer, 5, "en")]
    assert [text.strip() for text in spoken] == ["four two is it", "fourteen"]
    assert list(sentences(["...!!!"], drawn.tokenizer, 2, "zh")) == []
    with pytest.raises(UserError, match="'fr' is not spoken"):
        list(sentences(["a"], drawn.tokenizer, 5, "fr"))


def test_speak_writes_the_answer(session, sound, tmp_path, capsys):
    path = tmp_path / "reply.wav"
    for question, language in (("colour?", "en"), ("颜色？", "zh")):
        assert chat.main(["--text", question, "--speak", str(path)]) == 0
        samples = samples_in(path)
        assert samples > 0 and samples % CODEC.hop == 0
        printed = capsys.readouterr().out
        assert printed == f"7, it is red\nspoken: {path} ({samples / CODEC.sampling_rate:.1f} s)\n"
        assert session.spoken[-1] == ("7, it is red", language)
        path.unlink()


@pytest.mark.parametrize(("heard", "language"), [("什么", "zh"), ("what", "en"), ("", "zh")])
def test_a_spoken_question_is_answered_in_its_language(heard, language, session, sound, tmp_path, monkeypatch):
    session.says = "☞红"
    heard_waves = []

    def transcribe(model, params, vocabulary, waves):
        heard_waves.extend(waves)
        return [heard]

    monkeypatch.setattr("vita_jax.inference.transcription.transcribe", transcribe)
    assert chat.main(["--audio", sound, "--speak", str(tmp_path / "a.wav")]) == 0
    assert session.spoken == [("红", language)] and len(heard_waves) == 1


def test_without_a_recogniser_the_answer_decides(session, sound, tmp_path, monkeypatch):
    assert session.ctc_vocabulary_file == data_folder(session.config) / "ctc_vocabulary.json"
    monkeypatch.setattr(session, "trained", frozenset({"language", "codec", "speech"}))
    assert session.ctc_vocabulary_file is None
    session.says = "☞红"
    assert chat.main(["--audio", sound, "--speak", str(tmp_path / "a.wav")]) == 0
    assert session.spoken == [("红", "zh")]


def test_what_is_not_meant_for_the_model_and_empty_answers_are_not_spoken(session, sound, tmp_path, capsys):
    path = tmp_path / "a.wav"
    session.says = "☟not for me"
    assert chat.main(["--audio", sound, "--speak", str(path)]) == 0
    assert capsys.readouterr().out == f"(not meant for me)\nnothing is said: {path} is not written\n"
    session.says = "☞"
    assert chat.main(["--text", "colour?", "--speak", str(path)]) == 0
    assert capsys.readouterr().out == f"\nthe answer is empty: {path} is not written\n"
    assert not path.exists()


def test_interactive_speak_is_for_the_next_answer(session, sound, tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.wav"
    lines = ["/speak", "/speak a.mp3", f"/speak {path}", f"/audio {sound}", "again?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert chat.main([]) == 0
    printed = capsys.readouterr().out
    assert "/speak needs a file" in printed and "ends with .wav" in printed
    assert printed.count("spoken: ") == 1 and samples_in(path) > 0


def test_files_that_cannot_be_written_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat, "open_session", lambda arguments: pytest.fail("loaded"))
    (tmp_path / "folder.wav").mkdir()
    for name, message in (("a.mp3", "ends with .wav"), ("folder.wav", "is a folder"), ("none/a.wav", "no folder")):
        assert chat.main(["--text", "a", "--speak", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: --speak ") and err.count("\n") == 1 and message in err, err


def test_a_model_without_a_voice_is_refused(session, tmp_path, capsys, monkeypatch):
    silent = dataclasses.replace(session, trained=frozenset({"language", "codec"}))
    monkeypatch.setattr(chat, "open_session", lambda arguments: silent)
    assert chat.main(["--text", "a", "--speak", str(tmp_path / "a.wav")]) == 2
    assert "does not speak: it has no trained speech" in capsys.readouterr().err


def test_espeak_speaks_for_it(session, tmp_path, capsys, monkeypatch):
    silent = dataclasses.replace(session, trained=frozenset({"language"}))
    monkeypatch.setattr(chat, "open_session", lambda arguments: silent)
    path = tmp_path / "a.wav"
    assert chat.main(["--text", "colour?", "--speak", str(path), "--voice", "espeak"]) == 0
    assert "spoken: " in capsys.readouterr().out
    with wave.open(str(path)) as file:
        assert file.getframerate() == 16_000 and 8_000 < file.getnframes() < 48_000


def test_voices_are_those_of_the_recordings_or_of_the_file(drawn, tmp_path):
    found = voices(drawn.config, drawn.params)
    assert list(found) == ["en", "zh"]
    assert all(codes.shape == (CODEC.num_global_codes,) and codes.dtype == np.int32 for codes in found.values())
    moved = dataclasses.replace(
        drawn.config, run_dir=str(tmp_path), data=dataclasses.replace(drawn.config.data, folder=None)
    )
    with pytest.raises(UserError, match="voice is unknown: there is no .*manifest.jsonl; .*voices.json"):
        voices(moved, drawn.params)
    for content in ("{", "[1]", "{}", '{"en": []}', '{"en": [1.5]}'):
        (tmp_path / "voices.json").write_text(content)
        with pytest.raises(UserError, match="voices .*voices.json"):
            voices(moved, drawn.params)
    (tmp_path / "voices.json").write_text('{"zh": [3, 4]}')
    read = voices(moved, drawn.params)
    np.testing.assert_array_equal(read["zh"], [3, 4])
    only = dataclasses.replace(drawn, config=moved)
    assert only.speaker("en") is only.speaker("zh")
