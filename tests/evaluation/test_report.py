"""The report of a run: complete, self-contained, and safe with any text."""

from __future__ import annotations

import base64
import io
import json
import re
import wave

import pytest

from tests.data.media import tone, write_wav
from tests.evaluation.benchmark_run import make_run
from tests.training.hearing import write_benchmark
from tests.training.records import records_experiment
from vita_jax.config import save_json
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.report import write_report
from vita_jax.evaluation.results import save_result, save_stage_evaluation
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import tokenizer_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


def test_report_of_a_run_without_evaluation(run):
    page = write_report(run.run_dir).read_text(encoding="utf-8")
    assert "not evaluated yet" in page and "Loss by stage" in page and "Held-out" not in page


def test_report_of_an_evaluated_run(run):
    params = load_params(run.run_dir).params
    result = evaluate_params(run, params, load_tokenizer(tokenizer_folder(run)), batch_size=4, max_new_tokens=4)
    save_stage_evaluation(run, "joint", result)
    result["examples"][0].update(right=True, answer="<script>alert(1)</script>")
    save_stage_evaluation(run, "final", result)
    page = write_report(run.run_dir).read_text(encoding="utf-8")
    for heading in ("Result", "Loss by stage", "Accuracy after each stage", "In parts", "Held-out", "Parameters"):
        assert f"<h2>{heading}" in page, heading
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;2&lt;/b&gt;" in page
    assert "✓ right" in page and "✗ wrong" in page and "floor missed by" in page
    # Nothing is fetched: every source is inline.
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 6 and all(source.startswith("data:image/png;base64,") for source in sources)


def group(title: str, accuracy: float, **fields) -> dict:
    parts = {"by_kind": {"a": {"accuracy": accuracy, "n": 4}}, "by_language": {}, "by_num_digits": {}}
    bounds = dict.fromkeys(("prior", "floor", "goal", "floor_reached", "goal_reached"))
    return {"title": title, "n": 4, "accuracy": accuracy, **parts, **bounds, **fields}


def test_report_of_a_run_that_hears_and_speaks(tmp_path):
    config = records_experiment(tmp_path)
    save_json(config, tmp_path / "config.json")
    folder = tmp_path / "benchmarks" / "speech"
    write_benchmark(folder)
    sounds = tmp_path / "evaluation"
    write_wav(sounds / "sounds" / "a.wav", tone(0.3))
    write_wav(sounds / "sounds" / "none.wav", tone(0.0))
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    nothing = {"image": None, "video": None}
    examples = [{**nothing, **item, "truth": item["answer"], "answer": "", "right": False} for item in items]
    kept = {"title": "spoken answer", "text": "Red.", "heard": "red", "file": "sounds/a.wav", "item": "s0"}
    head = {"classes": ["speech", "<noise>"], "counts": [[7, 1], [0, 4]]}
    result = {
        "benchmark": "speech",
        "title": "spoken questions",
        "num_items": 6,
        "limit": None,
        "seconds": 1.0,
        "groups": {"spoken": group("spoken questions", 0.5), "input_head": group("head", 0.75, confusion=head)},
        "examples": examples,
        "sounds": [kept, {**kept, "heard": "bed", "item": None}, {**kept, "heard": "", "file": "sounds/none.wav"}],
        "real_time": {"encoder": 0.02},
        "changes": [{"group": "typed", "title": "typed", "before": 0.9, "after": 0.8, "n": 10}
                    | {"difference": -10.0, "low": -20.0, "high": 0.0}],
    }  # fmt: skip
    save_result(result, sounds / "final.speech.json")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    headings = ("Result", "Before and after", "Accuracy after each stage", "In parts", "Input head")
    for heading in (*headings, "Real-time factors", "Held-out sounds", "Its voice"):
        assert f"<h2>{heading}" in page, heading
    assert "answer prior" not in page and "&lt;noise&gt;" in page and "87.5 % of 8" in page
    assert "-20.0 .. +0.0" in page and "50.0x" in page and "(spoken)" in page
    assert page.count("✓ read back") == 1 and page.count("✗ misheard") == 2
    assert page.count("no sound: none.wav: holds no samples") == 1
    played = [base64.b64decode(data) for data in re.findall(r'src="data:audio/wav;base64,([^"]*)"', page)]
    # Six questions, two replies that can be heard, and two questions beside replies.
    assert len(played) == 10
    with wave.open(io.BytesIO(played[-3])) as file:
        assert (file.getnchannels(), file.getframerate()) == (1, 16_000) and file.getnframes() > 1000
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:") for source in sources)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
