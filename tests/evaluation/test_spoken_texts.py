"""Texts of a folder said and read back by a model without data of a run; figures against those of its lines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.media import write_wav
from tests.evaluation.random_run import random_run
from tests.training.voice import CODEC, SPEECH, tones, training
from vita_jax import evaluate
from vita_jax.data.ctc_vocabulary import normalise_transcript
from vita_jax.evaluation import asking, spoken_texts
from vita_jax.evaluation.scoring import edit_distance

TEXTS = [{"id": "a", "text": "Green, red.", "audio": "a.wav"}, {"text": "blue"}]


def test_texts_are_said_and_read_back(tmp_path, capsys, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "texts"
    random_run(run, codec=CODEC, codec_training=training(), speech=SPEECH)
    folder.mkdir()
    write_wav(folder / "a.wav", tones(np.random.default_rng(0), 1, 800)[0], CODEC.sampling_rate)
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(one) + "\n" for one in TEXTS))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(spoken_texts, "real_time_factors", lambda config, params: {"codec": 0.5})
    line = ["--checkpoint", str(run), "--benchmark", "speech", "--data", str(folder)]
    assert evaluate.main(line) == 0
    told = capsys.readouterr().out
    assert "2 texts in" in told and "read back by the model" in told and "codec 0.500" in told
    stem = run / "evaluation" / "final.spoken_texts"
    result = json.loads(stem.with_name(stem.name + ".json").read_text())
    lines = [json.loads(one) for one in stem.with_name(stem.name + ".jsonl").read_text().splitlines()]
    assert [(one["question_id"], one["prompt"]) for one in lines] == [("a", "Green, red."), ("1", "blue")]
    pairs = [(normalise_transcript(one["text"]), normalise_transcript(one["prompt"])) for one in lines]
    wrong, units = sum(edit_distance(*pair) for pair in pairs), sum(len(truth) for _, truth in pairs)
    assert result["value"] == pytest.approx(wrong / units) and units == len("green red") + len("blue")
    assert (result["heard_by"], result["voice"]) == ("model", f"recordings of {folder}")
    assert result["low"] <= result["value"] <= result["high"] and result["real_time"] == {"codec": 0.5}
    sounds = sorted(stem.with_name(stem.name + ".sounds").iterdir())
    assert sorted(one["file"] for one in lines) == [file.name for file in sounds]
    assert all(file.read_bytes()[:4] == b"RIFF" for file in sounds)
    assert stem.with_name(stem.name + ".png").is_file()
    # The same command says and asks nothing again.
    with monkeypatch.context() as changed:
        changed.setattr(asking, "answers_to", None)
        changed.setattr(spoken_texts, "speak_texts", None)
        assert evaluate.main(line) == 0
    again = json.loads(stem.with_name(stem.name + ".json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    capsys.readouterr()
    for entries, message in (
        (TEXTS[1:], "the model's voice is unknown: give recordings (audio) in"),
        ([{"text": "?!"}], "manifest.jsonl:1: text='?!' must be a text with a letter or digit in it"),
        ([{"text": "rot", "language": "de"}], "language 'de' is not spoken"),
        ([*TEXTS, TEXTS[0]], "manifest.jsonl:3: id a is there twice"),
    ):
        manifest.write_text("".join(json.dumps(one) + "\n" for one in entries))
        assert evaluate.main(line) == 2 and message in capsys.readouterr().err
