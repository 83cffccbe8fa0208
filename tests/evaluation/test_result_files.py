"""Lines of what a benchmark measures besides answers, and the files of few-shot tasks; models are stood in for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.media import write_wav
from tests.training.tiny import experiment
from vita_jax import evaluate
from vita_jax.data.audio import AudioConfig
from vita_jax.evaluation import few_shot, hearing, opening
from vita_jax.evaluation.benchmarks import Group
from vita_jax.evaluation.items import Item
from vita_jax.evaluation.voice import TEXTS, voice_figures


class Hears:
    """A recogniser that hears the same in every sound."""

    def in_chunks(self, chunk_size, left_chunks):
        return self

    def hear(self, waves, sampling_rate=16_000):
        return ["red gold"] * len(waves)


@pytest.fixture
def subject(tmp_path):
    """Two recordings of the assistant below its benchmark."""
    folder = tmp_path / TEXTS
    entries = [{"id": "a", "audio": "a.wav", "text": "red gold"}, {"id": "b", "audio": "b.wav", "text": "red"}]
    for entry in entries:
        write_wav(folder / entry["audio"], np.full(1600, 0.1))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = SimpleNamespace(model=SimpleNamespace(codec=None), audio=AudioConfig())
    return SimpleNamespace(root=tmp_path, config=config, limit=None, keep_sounds=False)


def test_every_sound_has_a_line(subject, monkeypatch):
    """Of "red" 5 characters too many are heard; of two inputs one is taken for what it is."""
    group = Group("voice_synthesizer", "recordings read back", measure="voice")
    figures, lines, sounds = voice_figures(subject, [group], Hears(), [])
    assert figures["voice_synthesizer"]["character_error_rate"] == 5 / 11 and sounds == []
    common = {"group": "voice_synthesizer", "kind": "sentence", "language": "en", "prompt": "", "text": "red gold"}
    assert lines == [
        {"question_id": "a", **common, "truth": "red gold", "score": 1, "errors": [0, 8]},
        {"question_id": "b", **common, "truth": "red", "score": 0, "errors": [5, 3]},
    ]
    item = Item("t", "transcribe", "new", "en", "Write it down.", "red gold", audio=f"{TEXTS}/a.wav")
    groups = [Group(f"recognition_{name}", name, measure="recogniser") for name in ("full", "chunked")]
    figures, lines = hearing.recogniser_figures(subject, groups, [item], Hears())
    assert [line["group"] for line in lines] == list(figures) == ["recognition_full", "recognition_chunked"]
    assert all((line["text"], line["truth"], line["score"]) == ("red gold", "red gold", 1) for line in lines)
    asked = [
        Item("s", "spoken", "count", "en", "", "1", audio="s"),
        Item("n", "noise", "hum", "en", "", "x", audio="n"),
    ]
    monkeypatch.setattr(hearing, "_written_questions", lambda *_: [])
    monkeypatch.setattr(hearing, "classify", lambda subject, items, benchmark: ["speech"] * len(items))
    subject.benchmark = "speech"
    figures, lines = hearing.input_head_figures(subject, Group("input_head", "input head"), asked)
    assert [(line["question_id"], line["truth"], line["text"], line["score"]) for line in lines] == [
        ("s", "speech", "speech", 1), ("n", "noise", "speech", 0)
    ]  # fmt: skip
    assert figures["accuracy"] == 0.5


def test_few_shot_tasks_are_kept_and_compared(tmp_path, monkeypatch, capsys):
    """50 % on OK-VQA with 4 shots is between Flamingo-80B and 9B; the own folder and --output have the same files."""
    config = experiment(tmp_path / "run")
    found = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    result = {"few_shot": {"okvqa": {"choice": "random", "shots": {"4": found}, "changes": []}}}
    lines = [{"question_id": "1", "prompt": "p", "answer": "a", "right": True}]

    def measured(subject, options, **how):
        assert options.shots == (4,) and how["identity"] == "weights"
        assert how["kept"].file == tmp_path / "run" / "evaluation" / "few_shot.answers.jsonl"
        return dict(result), lines

    monkeypatch.setattr(few_shot, "evaluate_few_shot", measured)
    monkeypatch.setattr(few_shot, "subject_of", lambda *_: None)
    monkeypatch.setattr(opening, "identity", lambda *_: "weights")
    monkeypatch.setattr("vita_jax.data.tokenizer.load_tokenizer", lambda _: None)
    output = tmp_path / "out.json"
    arguments = evaluate.make_parser().parse_args(["--checkpoint", "run", "--shots", "4", "--output", str(output)])
    assert evaluate.evaluate_by_shots(arguments, config, SimpleNamespace(params=None), True, output) == 0
    for file in (tmp_path / "run" / "evaluation" / "few_shot.json", output):
        written = json.loads(file.read_text())
        assert written["few_shot"] == result["few_shot"] and {"config", "commit", "changed"} <= set(written)
        assert [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()] == lines
        table = [line.split(" |")[0] for line in file.with_suffix(".md").read_text().splitlines()]
        place = table.index("| **tiny**")
        assert (table[place - 1], table[place + 1]) == ("| Flamingo-80B", "| Flamingo-9B")
        assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.count("written: ") == 2
