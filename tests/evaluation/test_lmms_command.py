"""How lmms-eval's command line is called, and what is read of what it writes; a script stands for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bucket import folder_as_bucket
from tests.evaluation.random_run import random_run
from vita_jax import evaluate
from vita_jax.errors import UserError
from vita_jax.evaluation.library import LMMS_SETS
from vita_jax.evaluation.lmms import command
from vita_jax.evaluation.lmms.command import TASKS, command_line, find_python, sample_interval

STAND_IN = """
import json, sys
from pathlib import Path

given = lambda name: sys.argv[sys.argv.index(name) + 1]
if given("--limit") == "1":
    sys.exit(0)
folder = Path(given("--output_path")) / "run"
folder.mkdir(parents=True)
scores = [1.0, 0.0, 1.0, 1.0]
results = {"results": {"ai2d": {"alias": "ai2d", "exact_match,none": 0.75, "exact_match_stderr,none": 0.25}}}
(folder / "20_results.json").write_text(json.dumps({**results, "lmms_eval_version": "0.7", "argv": sys.argv}))
samples = [
    {"doc_id": n, "input": f"question {n}", "filtered_resps": ["A"], "target": "A", "exact_match": score}
    for n, score in enumerate(scores)
]
(folder / "20_samples_ai2d.jsonl").write_text("".join(json.dumps(one) + "\\n" for one in samples))
"""


@pytest.fixture
def run(tmp_path):
    return Path(random_run(tmp_path / "run", hears=False).run_dir)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`python -m lmms_eval` is a script that answers three of four right, or nothing if it may ask but one."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "lmms_eval.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    monkeypatch.setattr(command, "find_python", lambda: sys.executable)


def test_evaluate_by_lmms_eval(run, stand_in, tmp_path, capsys):
    output = tmp_path / "out" / "ai2d.json"
    line = ["--checkpoint", str(run), "--benchmark", "ai2d", "--output", str(output), "--limit", "4"]
    assert evaluate.main(line) == 0
    told = capsys.readouterr().out
    assert "AI2D: 4 samples in" in told and "figure 75.0 (95 % interval 25.0 .. 100.0)" in told
    result = json.loads(output.read_text())
    assert (result["value"], result["num_items"], result["limit"]) == (75.0, 4, 4)
    assert result["lmms_eval_version"] == "0.7" and result["config"]["name"] == "tiny"
    said = [json.loads(one) for one in output.with_suffix(".jsonl").read_text().splitlines()]
    assert said[1] == {
        "question_id": 1, "task": "ai2d", "prompt": "question 1", "text": "A", "truth": "A", "exact_match": 0.0
    }  # fmt: skip
    table = output.with_suffix(".md").read_text()
    assert "| **run** |  | **75.0** | 25.0 .. 100.0 |" in table and "Only 4 questions were asked" in table
    assert output.with_suffix(".png").stat().st_size > 10_000
    given = json.loads((tmp_path / "out" / "ai2d.lmms_eval" / "run" / "20_results.json").read_text())["argv"][1:]
    assert given[:2] == ["--model", "vita_jax"] and given[given.index("--tasks") + 1] == "ai2d"
    assert given[3] == f"checkpoint={run},answers={tmp_path / 'out' / 'ai2d.answers.jsonl'}"
    line[-1] = "1"
    line[line.index(str(output))] = str(tmp_path / "none.json")
    assert evaluate.main(line) == 2
    assert "lmms-eval ended with status 0 and without results" in capsys.readouterr().err


def test_a_folder_that_would_not_be_read_is_refused(run, tmp_path, capsys):
    line = ["--checkpoint", str(run), "--data", str(tmp_path / "MME"), "--benchmark"]
    assert evaluate.main([*line, "mme"]) == 2
    told = capsys.readouterr().err
    assert "MME: mme is read from where lmms-eval looks for it (HF_HOME), not from a folder" in told
    assert "give lmms:TASK as the benchmark" in told
    assert evaluate.main([*line, "lmms:my_mme"]) == 2
    assert "MME is no folder; it has the task files of lmms:my_mme" in capsys.readouterr().err


def test_arguments_of_the_command_line(run, tmp_path):
    line = command_line(
        "py", LMMS_SETS["mmlu"], str(run), tmp_path / "a", "tasks", None, ["weights", "cache"], ["fsdp=4"]
    )
    assert line[:5] == ["py", "-m", "lmms_eval", "--model", "vita_jax"] and line[-1] == "--force_simple"
    assert ",int8=cache+weights,mesh=fsdp:4" in line[6] and "--limit" not in line
    assert line[line.index("--include_path") + 1] == str(Path("tasks").absolute())
    with folder_as_bucket(tmp_path):
        line = command_line("py", LMMS_SETS["mme"], "gs://bucket/run", tmp_path / "a", None, 3, [], [])
    assert line[6].startswith("checkpoint=gs://bucket/run,answers=") and line[-2:] == ["--limit", "3"]
    assert line[line.index("--include_path") + 1] == str(TASKS)
    with pytest.raises(UserError, match="--data tasks: ceval has its tasks in this package"):
        command_line("py", LMMS_SETS["ceval"], str(run), tmp_path / "a", "tasks", None, [], [])
    with pytest.raises(UserError, match="gs://b/tasks: a folder with tasks has to be on a disk"):
        command_line("py", LMMS_SETS["mme"], str(run), tmp_path / "a", "gs://b/tasks", None, [], [])
    with pytest.raises(UserError, match="checkpoint .*a,b: lmms-eval's arguments cannot hold this name"):
        command_line("py", LMMS_SETS["mme"], str(tmp_path / "a,b"), tmp_path / "a", None, None, [], [])


def test_without_the_library_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "LIBRARY", "no_such_library")
    monkeypatch.setattr(command, "ENVIRONMENT", tmp_path)
    with pytest.raises(UserError, match="launch/setup.sh --eval makes"):
        find_python()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    assert find_python() == str(tmp_path / "bin" / "python")


def test_only_means_of_samples_have_an_interval():
    lines = [{"average": {"score": score}} for score in (1, 1, 0, 0)]
    assert sample_interval(LMMS_SETS["mmstar"], lines, 50.0) == (0.0, 100.0)
    assert sample_interval(LMMS_SETS["mmstar"], lines, 40.0) is None  # a mean over categories, for instance
    assert sample_interval(LMMS_SETS["mme"], lines, 50.0) is None
    assert sample_interval(LMMS_SETS["mmstar"], [], None) is None
