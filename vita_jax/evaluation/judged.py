"""What a judge's figures become: JSON with intervals, a line for every question, and the published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.json_lines import write_json_lines
from vita_jax.data.scienceqa import LETTERS, Problem
from vita_jax.evaluation.answer_lines import ID
from vita_jax.evaluation.bootstrap import interval, rate_interval
from vita_jax.evaluation.llava_bench import OVERALL, UNPARSED, parse_scores, summarise
from vita_jax.evaluation.measured import write_pictures
from vita_jax.evaluation.plots import Bar, bars
from vita_jax.evaluation.published import Own, save_figure
from vita_jax.evaluation.results import code_version, save_result
from vita_jax.evaluation.scienceqa import accuracies

SEED = 0
# How the categories of LLaVA-Bench are called in the published tables.
COLUMNS = {OVERALL: "all", "conv": "conversation", "detail": "detail", "complex": "reasoning"}

Lines = Mapping[str, Mapping[str, Any]]


def write_llava_bench(
    output: Path,
    published: str | None,
    questions: Lines,
    references: Lines,
    answers: Lines,
    reviews: Mapping[str, str],
    how: Mapping[str, Any],
) -> list[Path]:
    """Writes the figures of LLaVA-Bench.

    Args:
      output: FILE.json; FILE.jsonl, FILE.md and FILE.png go beside it.
      published: which set's figures they are compared with, "wild" or "coco"; None = they are drawn alone.
      questions, references, answers, reviews: by the question's id.
      how: who graded; becomes part of the result.

    Returns:
      The files. The result is {"benchmark", "title", "model", "num_items", "figures": {category: {"value" (per cent of
      the reference's score), "low", "high" (95 % bootstrap interval, None where a review has no scores), "n",
      "reference_x10", "answers_x10"}}, `how` and `code_version`}.
    """
    scores = {name: parse_scores(review) for name, review in reviews.items()}
    found = summarise((str(questions[name]["category"]), pair) for name, pair in scores.items())
    figures: dict[str, dict[str, Any]] = {}
    for category, score in found.items():
        own = [pair for name, pair in scores.items() if category in (OVERALL, str(questions[name]["category"]))]
        low, high = _relative_interval(own)
        means = {"reference_x10": score.reference_x10, "answers_x10": score.candidate_x10}
        figures[category] = {"value": score.relative, "low": low, "high": high, "n": len(own), **means}
    model = _model_of(answers)
    result = {"benchmark": "llava-bench", "title": "LLaVA-Bench", "model": model, "num_items": len(scores)}
    result |= {"published": published, "figures": figures, **how, **code_version()}
    lines = [
        {
            ID: questions[name][ID],
            "category": questions[name]["category"],
            "prompt": questions[name]["text"],
            "text": answers[name]["text"],
            "reference": references[name]["text"],
            "review": review,
            "scores": list(scores[name]),
        }
        for name, review in reviews.items()
    ]
    note = f"Graded by {how.get('judge')}; the published figures are those of GPT-4, early in 2023."
    own = {} if published is None else {
        f"llava_bench_{published}_{COLUMNS[name]}": Own(model, one["value"], one["low"], one["high"], note)
        for name, one in figures.items()
        if name in COLUMNS
    }  # fmt: skip
    written = _write(output, result, lines)
    if own:
        return [*written, *write_pictures(output.with_suffix(""), result, own)]
    drawn = [Bar(name, one["value"], one["low"], one["high"]) for name, one in figures.items()]
    plot = bars("LLaVA-Bench", {"per cent of the reference": drawn})
    return [*written, save_figure(plot, output.with_suffix(""))]


def write_scienceqa(
    output: Path,
    problems: Sequence[Problem],
    texts: Mapping[str, str],
    chosen: Mapping[str, Mapping[str, str | None]],
    judge: str | None,
) -> list[Path]:
    """Writes the accuracies of ScienceQA, in per cent.

    Args:
      output: FILE.json; FILE.jsonl, FILE.md and FILE.png go beside it.
      problems: that were asked.
      texts: the answers, by the problem's id.
      chosen: letters by the problem's id, of "answers" and of whoever else decided.
      judge: the text-only model; None = there was none.

    Returns:
      The files. The result is {"benchmark", "title", "model", "num_items", "value", "low", "high" (of the answers
      alone, all problems), "figures": {who: {class: {"value", "n"}}}, "judge", and `code_version`}.
    """
    rights = [float(chosen["answers"][problem.id] == LETTERS[problem.answer]) for problem in problems]
    low, high = interval([np.array(rights)], SEED)
    figures = {
        who: {name: {"value": 100 * share, "n": count} for name, (share, count) in accuracies(problems, own).items()}
        for who, own in chosen.items()
    }
    result = {"benchmark": "scienceqa", "title": "ScienceQA", "model": output.stem, "num_items": len(problems)}
    result |= {"value": 100 * float(np.mean(rights)), "low": 100 * low, "high": 100 * high, "figures": figures}
    lines = [
        {
            ID: problem.id,
            "prompt": problem.instruction,
            "text": texts[problem.id],
            "truth": LETTERS[problem.answer],
            "score": int(right),
            "chosen": {who: own[problem.id] for who, own in chosen.items()},
        }
        for problem, right in zip(problems, rights, strict=True)
    ]
    written = _write(output, {**result, "judge": judge, **code_version()}, lines)
    own = Own(result["model"], result["value"], result["low"], result["high"])
    return [*written, *write_pictures(output.with_suffix(""), result, {"scienceqa": own})]


def _relative_interval(scores: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Of the answers' scores by the references', in per cent; (None, None) where one is missing or no number from 1."""
    if UNPARSED in scores or min(reference for reference, _ in scores) < 1:
        return None, None
    references, candidates = np.array(scores).T
    low, high = rate_interval(candidates, references, SEED)
    return 100 * low, 100 * high


def _model_of(answers: Lines) -> str:
    """Whose answers they are, by the name of the checkpoint."""
    return Path(str(next(iter(answers.values())).get("model_id", "answers"))).name


def _write(output: Path, result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[Path]:
    save_result(result, output)
    write_json_lines(output.with_suffix(".jsonl"), lines)
    return [output, output.with_suffix(".jsonl")]
