"""The report of a run: complete, self-contained, and safe with any text."""

from __future__ import annotations

import re

import pytest

from tests.evaluation.benchmark_run import make_run
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.report import write_report
from vita_jax.evaluation.runner import evaluate_params, save_stage_evaluation
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


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
