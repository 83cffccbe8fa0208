"""Runs lmms-eval's command line on a checkpoint, and reads what it found.

lmms-eval has over a hundred dependencies, so it lives in an environment of its own, `.venv-eval` (`launch/setup.sh
--eval`); it is used from whatever Python has it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.json_lines import read_json_lines
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import ID
from vita_jax.evaluation.asking import answers_file
from vita_jax.evaluation.bootstrap import interval
from vita_jax.evaluation.library import LmmsSet, figure_of
from vita_jax.evaluation.opening import BATCH_SIZE
from vita_jax.evaluation.question_scores import SEED
from vita_jax.evaluation.results import align, provenance
from vita_jax.storage import absolute, on_disk, place
from vita_jax.training.checkpoint import load_config

LIBRARY, MODEL = "lmms_eval", "vita_jax"
ENVIRONMENT = Path(__file__).parents[3] / ".venv-eval"
# Of sets that lmms-eval does not have, or cannot ask.
TASKS = Path(__file__).parent / "tasks"
# Of what lmms-eval writes: `<time>_results.json` and `<time>_samples_<task>.jsonl`.
RESULTS, SAMPLES = "_results.json", "_samples_"
# Digits to which a mean of samples must be lmms-eval's own figure for its interval to be the figure's.
SAME = 1e-6

Result = dict[str, Any]


def find_python() -> str:
    """A Python that has lmms-eval. Raises UserError, saying how to get one."""
    if importlib.util.find_spec(LIBRARY) is not None:
        return sys.executable
    python = ENVIRONMENT / "bin" / "python"
    if python.is_file():
        return str(python)
    raise UserError(
        f"this benchmark is lmms-eval's, which is not installed: launch/setup.sh --eval makes {ENVIRONMENT}"
    )


def command_line(
    python: str,
    chosen: LmmsSet,
    checkpoint: str,
    stem: Path,
    include_path: str | None,
    limit: int | None,
    int8: Sequence[str],
    mesh: Sequence[str],
) -> list[str]:
    """What is run.

    Raises:
      UserError: a path that lmms-eval's arguments cannot hold, tasks in a bucket, or tasks beside a set that is shipped
        (lmms-eval reads one folder).
    """
    if chosen.shipped and include_path is not None:
        raise UserError(f"--data {include_path}: {chosen.task} has its tasks in this package; leave --data out")
    model = {"checkpoint": str(absolute(place(checkpoint))), "answers": str(answers_file(stem).absolute())}
    model["int8"] = "+".join(sorted(int8))
    model["mesh"] = "+".join(size.replace("=", ":") for size in mesh)
    for name, value in model.items():
        if any(mark in value for mark in ",=\"'{}[]"):
            raise UserError(
                f"{name} {value}: lmms-eval's arguments cannot hold this name; use one without , = and quotes"
            )
    arguments = ",".join(f"{name}={value}" for name, value in model.items() if value)
    line = [python, "-m", LIBRARY, "--model", MODEL, "--model_args", arguments, "--tasks", chosen.task]
    line += ["--batch_size", str(BATCH_SIZE), "--log_samples", "--output_path", str(output_folder(stem))]
    tasks = TASKS if include_path is None else on_disk(include_path, "a folder with tasks").absolute()
    line += ["--include_path", str(tasks)]
    line += ["--limit", str(limit)] if limit is not None else []
    return [*line, *(("--force_simple",) if chosen.likelihoods else ())]


def output_folder(stem: Path) -> Path:
    """Where lmms-eval writes."""
    return stem.with_name(stem.name + ".lmms_eval").absolute()


def run_lmms_eval(
    chosen: LmmsSet,
    checkpoint: str,
    stem: Path,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    int8: Sequence[str] = (),
    mesh: Sequence[str] = (),
) -> tuple[Result, list[dict[str, Any]]]:
    """Has lmms-eval ask and score; it shows its own progress.

    Args:
      chosen: what is measured.
      checkpoint: see `load_params`.
      stem: of the files of the result, see `measured`; answers are kept in STEM.answers.jsonl.
      include_path: a folder with tasks of the user's own; None = that of this package.
      limit: asks only the first so many of each task.
      int8, mesh: as on the command line of `evaluate`.

    Returns:
      The result, without "benchmark": {"title", "model", "num_items", "limit", "value", "low", "high" (in the units of
      the published column; None where there is no such figure), "tasks" (what lmms-eval found), "note", "seconds",
      "lmms_eval_version", and `provenance`}; and a line for every sample.

    Raises:
      UserError: lmms-eval is not there, or ended without a result.
    """
    started, begun = time.monotonic(), time.time()
    config, _ = load_config(checkpoint)
    line = command_line(find_python(), chosen, checkpoint, stem, include_path, limit, int8, mesh)
    status = subprocess.run(line, check=False).returncode
    found = [path for path in output_folder(stem).rglob(f"*{RESULTS}") if path.stat().st_mtime >= begun - 1]
    if not found:  # it ends with status 0 even where a task failed
        raise UserError(f"lmms-eval ended with status {status} and without results; what it printed says why")
    latest = max(found, key=lambda path: path.stat().st_mtime)
    results = json.loads(latest.read_text(encoding="utf-8"))
    lines = read_samples(latest)
    value = figure_of(chosen, results["results"])
    low, high = sample_interval(chosen, lines, value) or (None, None)
    result = {
        "title": chosen.title,
        "model": checkpoint,
        "num_items": len(lines),
        "limit": limit,
        "value": value,
        "low": low,
        "high": high,
        "tasks": results["results"],
        "note": chosen.note,
        "seconds": time.monotonic() - started,
        "lmms_eval_version": results.get("lmms_eval_version"),
        **provenance(config),
    }
    return result, lines


def read_samples(results: Path) -> list[dict[str, Any]]:
    """A line for every sample of every task beside a file of results.

    Returns:
      {"question_id", "task", "prompt", "text", "truth", and what the task's metrics are made of}.
    """
    lines = []
    start = results.name.removesuffix(RESULTS) + SAMPLES
    for path in sorted(results.parent.glob(f"{start}*.jsonl")):
        task = path.name.removeprefix(start).removesuffix(".jsonl")
        for _, sample in read_json_lines(path):
            said = sample.pop("resps", None) or sample.get("filtered_resps")
            more = {name: value for name, value in sample.items() if name not in _DROPPED}
            lines.append({
                ID: sample["doc_id"],
                "task": task,
                "prompt": sample.get("input"),
                "text": said[0] if isinstance(said, list) and len(said) == 1 else said,
                "truth": sample.get("target"),
                **more,
            })  # fmt: skip
    return lines


_DROPPED = ("doc_id", "input", "target", "filtered_resps", "doc_hash", "token_counts", "input_media")


def sample_interval(
    chosen: LmmsSet, lines: Sequence[Mapping[str, Any]], value: float | None
) -> tuple[float, float] | None:
    """The bootstrap interval of a figure that is the mean of its samples' scores; None for any other."""
    if value is None or len(chosen.metrics) != 1 or not lines:
        return None
    scores = [_score(line.get(chosen.metrics[0])) for line in lines]
    if None in scores or abs(chosen.scale * float(np.mean(scores)) - value) > SAME * max(1.0, abs(value)):
        return None
    low, high = interval([np.asarray(scores, np.float64)], SEED)
    return chosen.scale * low, chosen.scale * high


def _score(found: Any) -> float | None:
    """What a metric is made of: a number, or an entry with a "score"."""
    if isinstance(found, Mapping):
        found = found.get("score")
    return float(found) if isinstance(found, int | float) else None


def format_lmms(result: Mapping[str, Any]) -> str:
    """The result as text: every number that lmms-eval found, then the figure."""
    lines = [f"{result['title']}: {result['num_items']} samples in {result['seconds']:.0f} s", ""]
    rows = [("task", "metric", "value")]
    for task, found in result["tasks"].items():
        for key, value in found.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and "stderr" not in name:
                rows.append((task, key, f"{value:.4f}"))
    lines += align(rows)
    if result["value"] is not None:
        reach = "" if result["low"] is None else f" (95 % interval {result['low']:.1f} .. {result['high']:.1f})"
        lines += ["", f"figure {result['value']:.1f}{reach}"]
    return "\n".join([*lines, *([result["note"]] if result["note"] else [])])
