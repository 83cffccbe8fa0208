"""Results as files of the run and as tables.

A result is JSON: {"benchmark", "title", "num_items", "limit", "seconds", "groups": {name: group, see `figures`},
"examples": [...], "left_out": {group: why}}, and where there is something to it "sounds", "real_time" (see `voice`) and
"changes" (see `comparison`). Beside it are its "lines": one for every item of every group, see `figures`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vita_jax import __version__
from vita_jax.config import to_dict
from vita_jax.data.json_lines import write_json_lines
from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks import BENCHMARKS
from vita_jax.storage import place, write_whole
from vita_jax.training.experiment import ExperimentConfig

# Name of the result at the end of a run, beside those of its stages.
FINAL = "final"
# The benchmark whose results carry no name of their own.
FIRST = "quickstart"


def evaluation_path(run_dir: str | Path, name: str, benchmark: str = FIRST) -> Path:
    """`<run_dir>/evaluation/<name>.json`, or `<name>.<benchmark>.json` for another benchmark than the first.

    Args:
      name: a stage, or "final".
    """
    suffix = "" if benchmark == FIRST else f".{benchmark}"
    return place(run_dir) / "evaluation" / f"{name}{suffix}.json"


def save_result(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON, whole or not at all."""
    try:
        write_whole(path, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def save_with_lines(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as FILE.json, and its "lines" as FILE.jsonl. Raises UserError for another name."""
    if path.suffix != ".json":
        raise UserError(f"{path}: the name of a result must end with .json; its lines go beside it as .jsonl")
    write_json_lines(path.with_suffix(".jsonl"), result["lines"])
    save_result({name: value for name, value in result.items() if name != "lines"}, path)


def provenance(config: Any) -> dict[str, Any]:
    """What a result came from: {"config": all of it, and `code_version`}."""
    return {**code_version(), "config": to_dict(config)}


def code_version() -> dict[str, Any]:
    """{"version", "commit": of this package's checkout, or None where it is none, "changed": whether files of the
    checkout differ from that commit}.
    """
    checkout = Path(__file__).parents[2]
    commit = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
    changed = bool(commit and _git(checkout, "status", "--porcelain", "--untracked-files=no"))
    return {"version": __version__, "commit": commit, "changed": changed}


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git says, without the last line break; None where there is no git, or it refuses."""
    try:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def save_stage_evaluation(config: ExperimentConfig, stage_name: str, result: Mapping[str, Any]) -> Path:
    """Keeps the result reached after a stage ("final": at the end of the run), and its lines. Returns its file."""
    path = evaluation_path(config.run_dir, stage_name, result["benchmark"])
    save_with_lines(result, path)
    return path


def read_evaluation(run_dir: str | Path, name: str, benchmark: str = FIRST) -> dict[str, Any] | None:
    """A saved result, or None if there is none of that name. Raises `UserError` for a damaged file."""
    path = evaluation_path(run_dir, name, benchmark)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from None


def stage_accuracies(
    run_dir: str | Path, config: ExperimentConfig, benchmark: str = FIRST
) -> list[tuple[str, dict[str, Any]]]:
    """(title, groups) of every stage of the run that has been evaluated, in order; "final" last if it is there.

    Stages are usually evaluated on a part of the benchmark, whose size is added to their title.
    """
    named = [(stage.title, stage.name) for stage in config.stages] + [(FINAL, FINAL)]
    found = [(title, read_evaluation(run_dir, name, benchmark)) for title, name in named]
    return [
        (title if not is_partial(result) else f"{title} ({result['num_items']:,} questions)", result["groups"])
        for title, result in found
        if result is not None
    ]


def is_partial(result: Mapping[str, Any]) -> bool:
    """Whether only some of the questions were asked."""
    return result.get("limit") is not None and result["num_items"] > 0


def percent(value: float | None) -> str:
    """`93.4 %`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def verdict(group: Mapping[str, Any]) -> str:
    """What was reached, in words; empty where there is no floor."""
    if group["goal_reached"]:
        return "goal reached"
    if group["floor_reached"]:
        return "floor reached"
    return "" if group["floor"] is None else f"floor missed by {100 * (group['floor'] - group['accuracy']):.1f} points"


def align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a text table: first column to the left, the others to the right; the first row is underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        yield "  ".join(cells).rstrip()
        if number == 0:
            yield "-" * (sum(widths) + 2 * (len(widths) - 1))


def format_result(result: Mapping[str, Any]) -> str:
    """The result as text: one table of groups, then each group in parts, then what else was measured."""
    groups = result["groups"]
    rows = [("group", "n", "accuracy", "prior", "floor", "goal", "")]
    for group in groups.values():
        figures = [percent(group[name]) for name in ("accuracy", "prior", "floor", "goal")]
        rows.append((group["title"], str(group["n"]), *figures, verdict(group)))
    asked = f"{result['num_items']} questions in " if result["num_items"] else ""
    lines = [f"benchmark {result['benchmark']}: {asked}{result['seconds']:.0f} s"]
    if result.get("limit") is not None:
        lines[0] += f" (at most {result['limit']} of each kind)"
    lines += ["", *align(rows)]
    for group in groups.values():
        lines += ["", *_group_parts(group)]
    for part in (_changes, _real_time, _left_out):
        if told := list(part(result)):
            lines += ["", *told]
    return "\n".join(lines)


def _group_parts(group: Mapping[str, Any]) -> Iterator[str]:
    """A group by kind, language and digits, and what its measure adds."""
    parts = [("kind", "by_kind"), ("language", "by_language"), ("digits", "by_num_digits")]
    rows = [
        (f"{label} {name}", percent(part["accuracy"]), str(part["n"]))
        for label, key in parts
        for name, part in group[key].items()
    ]
    if group.get("refused"):
        rows.append(("refused", percent(group["refused"]), str(group["n"])))
    yield from align([(group["title"], "accuracy", "n"), *rows])
    if "exact" in group:
        by_kind = ", ".join(f"{name} {part['exact']}" for name, part in group["by_kind"].items())
        yield f"without any error: {group['exact']} of {group['n']} ({by_kind})"
    if "character_error_rate" in group:
        yield f"characters misread: {percent(group['character_error_rate'])}"
    if "mel_distance" in group:
        yield f"mel distance: {group['mel_distance']:.3f}"
    if "confusion" in group:
        classes, counts = group["confusion"]["classes"], group["confusion"]["counts"]
        yield from align(
            [("is \\ taken for", *classes)]
            + [(name, *(str(count) for count in row)) for name, row in zip(classes, counts, strict=True)]
        )


def _changes(result: Mapping[str, Any]) -> Iterator[str]:
    """Table of the paired comparisons."""
    changes = result.get("changes", {})
    if not changes:
        return
    rows = [("change on the same questions", "n", "before", "after", "points", "95 % interval", "floor", "goal", "")]
    for change in changes.values():
        figures = [f"{change['difference']:+.1f}", f"{change['low']:+.1f} .. {change['high']:+.1f}"]
        bounds = [f"{change[name]:+.0f}" for name in ("floor", "goal")]
        reached = "goal reached" if change["goal_reached"] else "floor reached" if change["floor_reached"] else "lost"
        title = f"{change['title']}, since {change['since']}"
        shares = [percent(change[name]) for name in ("before", "after")]
        rows.append((title, str(change["n"]), *shares, *figures, *bounds, reached))
    yield from align(rows)


def _real_time(result: Mapping[str, Any]) -> Iterator[str]:
    factors = result.get("real_time")
    if factors:
        told = ", ".join(f"{name} {factor:.3f}" for name, factor in factors.items())
        yield f"seconds of computing per second of sound: {told}"


def _left_out(result: Mapping[str, Any]) -> Iterator[str]:
    for name, reason in result.get("left_out", {}).items():
        yield f"left out: {name}, because {reason}"


def format_stages(run_dir: str | Path, config: ExperimentConfig) -> str:
    """Tables of the accuracies after each evaluated stage, one per benchmark; empty if there are none."""
    tables = (_stage_table(stage_accuracies(run_dir, config, benchmark)) for benchmark in BENCHMARKS)
    return "\n\n".join("\n".join(align(rows)) for rows in tables if rows)


def _stage_table(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    if not stages:
        return []
    # The last one has been asked most, in the order of the benchmark.
    names = list(dict.fromkeys(name for _, groups in reversed(stages) for name in groups))
    rows = [("accuracy after stage", *names)]
    for title, groups in stages:
        rows.append((title, *(percent(groups[name]["accuracy"]) if name in groups else "-" for name in names)))
    return rows
