"""Questions of a user, or of a published set, from asking to the files of the result.

STEM.json    {"benchmark", "title", "model", "num_items", "limit", "seconds", the figures of `question_scores.figures`
             or of lmms-eval, "version", "commit", "changed", "config"}
STEM.jsonl   a line for every question: what was asked, said and scored
STEM.answers.jsonl   every answer that was made, of this call and of earlier ones; see `asking`
STEM.md, STEM.png    the figure among the published ones; where there are none, the picture shows it with its interval
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
from vita_jax.evaluation.plots import plot_of
from vita_jax.evaluation.published import Own, columns_of, save_figure, write_comparison
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
    known = column is not None and result.get("value") is not None
    return [*written, *write_pictures(stem, result, {column: own_figure(result)} if known else {})]


def write_pictures(stem: Path, result: Mapping[str, Any], figures: Mapping[str, Own]) -> list[Path]:
    """Writes STEM.md and STEM.png with the published figures of some columns, or STEM.png with the result's own alone.

    Args:
      figures: own ones by column; {} where nothing is published.

    Returns:
      What was written; nothing where there is nothing to be drawn.
    """
    if figures:
        return write_comparison(figures, stem)
    plot = plot_of(result)
    return [] if plot is None else [save_figure(plot, stem)]


def few_shot_figures(result: Mapping[str, Any], model: str) -> dict[str, Own]:
    """The figures of few-shot tasks that have the name of a published one, such as `okvqa`, by column.

    Args:
      result: see `few_shot`; with "limit".
      model: whose.
    """
    note = "The own figure counts exact matches of a greedy answer; those of VQA compare with ten answers."
    if result["limit"] is not None:
        note += f" At most {result['limit']} of each kind were asked (--limit): it is no result of the task."
    return {
        column: Own(model, *(100 * found[name] for name in ("accuracy", "low", "high")), note)
        for task, of_task in result["few_shot"].items()
        for count, found in of_task["shots"].items()
        if (column := f"{task}_{count}_shots") in columns_of("few_shot")
    }


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
