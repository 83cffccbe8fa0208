"""Questions of a user, or of a published set, from asking to the files of the result.

STEM.json    {"benchmark", "title", "model", "num_items", "limit", "seconds", the figures of `question_scores.figures`
             or of lmms-eval, "version", "commit", "changed", "config"}
STEM.jsonl   a line for every question: what was asked, said and scored
STEM.answers.jsonl   every answer that was made, of this call and of earlier ones; see `asking`
STEM.md, STEM.png    the figure among the published ones, where there are some
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vita_jax.data.json_lines import write_json_lines
from vita_jax.evaluation.answer_lines import Question, Scoring
from vita_jax.evaluation.answering import Progress
from vita_jax.evaluation.asking import AskOptions, KeptAnswers, Line, ask_questions
from vita_jax.evaluation.published import Own, write_comparison
from vita_jax.evaluation.question_scores import ERROR_RATES, check_questions, figures, score_answer
from vita_jax.evaluation.results import align, percent, provenance, save_result
from vita_jax.evaluation.subject import Subject

Result = dict[str, Any]


def measure(
    subject: Subject,
    title: str,
    questions: Sequence[Question],
    root: Path,
    scoring: Scoring,
    kept: KeptAnswers,
    options: AskOptions,
    progress: Progress | None = None,
) -> tuple[Result, list[Line]]:
    """Asks and scores.

    Args:
      title: of the result.
      root: the folder that the files of questions start from.
      kept: see `ask_questions`.

    Returns:
      The result, without "benchmark" and "limit", and the lines with their scores.

    Raises:
      UserError: as `check_questions` and `ask_questions`.
    """
    started = time.monotonic()
    check_questions(questions, scoring)
    lines = ask_questions(subject, questions, root, kept, options, progress)
    scores = [
        score_answer(question, line["text"], line.get("state"), scoring)
        for question, line in zip(questions, lines, strict=True)
    ]
    result = {
        "title": title,
        "model": kept.model_name,
        "num_items": len(questions),
        **figures(scoring, questions, scores),
        "seconds": time.monotonic() - started,
        **provenance(subject.config),
    }
    return result, [{**line, **score} for line, score in zip(lines, scores, strict=True)]


def write_measured(stem: Path, result: Mapping[str, Any], lines: Sequence[Line], column: str | None) -> list[Path]:
    """Writes the files described above, but for the kept answers. Returns them.

    Args:
      stem: their path without a suffix.
      column: of the published figures; None = there are none.

    Raises:
      UserError: one cannot be written.
    """
    written = [stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".jsonl")]
    save_result(result, written[0])
    write_json_lines(written[1], lines)
    if column is None or result.get("value") is None:
        return written
    return [*written, *write_comparison(column, own_figure(result), stem)]


def own_figure(result: Mapping[str, Any]) -> Own:
    """The figure of a result for the published table: fractions in per cent, others as they are."""
    scale = 100 if "scoring" in result else 1
    low, high = (None if result.get(name) is None else scale * result[name] for name in ("low", "high"))
    notes = [result["note"]] if result.get("note") else []
    if result.get("limit") is not None:
        notes.append(f"Only {result['num_items']} questions were asked (--limit): this figure is no result of the set.")
    return Own(Path(result["model"]).name, scale * result["value"], low, high, " ".join(notes))


def format_measured(result: Mapping[str, Any]) -> str:
    """The result of `measure` as text."""
    unit = {"wer": "word error rate", "cer": "character error rate"}.get(result["scoring"], "accuracy")
    lines = [
        f"{result['title']}: {result['n']} questions in {result['seconds']:.0f} s",
        "",
        f"{unit} {percent(result['value'])} (95 % interval {percent(result['low'])} .. {percent(result['high'])})",
        f"compared: {result['normalisation']}",
    ]
    return "\n".join([*lines, *_parts(result)])


def _parts(result: Mapping[str, Any]) -> Iterator[str]:
    if result["scoring"] in ERROR_RATES:
        errors = result["errors"]
        told = ", ".join(f"{errors[name]} {name}" for name in ("substitutions", "deletions", "insertions"))
        yield f"errors: {told}, of {errors['units']}"
    if len(result["by_category"]) > 1:
        rows = [(name, percent(part["value"]), str(part["n"])) for name, part in result["by_category"].items()]
        yield ""
        yield from align([("category", "figure", "n"), *rows])
    if "confusion" in result:
        classes, columns, counts = (result["confusion"][name] for name in ("classes", "taken_for", "counts"))
        rows = [
            (name, *map(str, row), percent(result["recall"][name]), percent(result["precision"][name]))
            for name, row in zip(classes, counts, strict=True)
        ]
        yield ""
        yield from align([("is \\ taken for", *columns, "recall", "precision"), *rows])
