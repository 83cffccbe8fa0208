"""LLaVA-Bench: answers judged by a language model against reference answers (arXiv 2304.08485, section 5.1;
`llava/eval/eval_gpt_review_bench.py`, `summarize_gpt_review.py`).

A judge reads what is in the picture, the question, the reference as assistant 1 and the answer as assistant 2, and puts
two scores from 1 to 10 in its first line. The figure of a category is the mean score of the answers in per cent of that
of the references. Reviews that cannot be parsed count as -1 for both, as in the original.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

UNPARSED = (-1.0, -1.0)
OVERALL = "all"


@dataclass(frozen=True)
class CategoryScore:
    """Figures of one category.

    Attributes:
      relative: mean score of the answers in per cent of the references'; NaN where the latter is 0.
      reference_x10, candidate_x10: the two means, out of 100.
    """

    relative: float
    reference_x10: float
    candidate_x10: float


def judge_message(description: str, question: str, reference: str, candidate: str, instruction: str) -> str:
    """What the judge is asked. `description` stands for the picture; `instruction` says how to grade."""
    parts = (
        ("Context", description, ""),
        ("Question", question, ""),
        ("Assistant 1", reference, "[End of Assistant 1]\n\n"),
        ("Assistant 2", candidate, "[End of Assistant 2]\n\n"),
        ("System", instruction, ""),
    )
    return "".join(f"[{name}]\n{text}\n\n{end}" for name, text, end in parts)


def parse_scores(review: str) -> tuple[float, float]:
    """(reference, candidate) from the first line of a review; `UNPARSED` unless it is exactly two numbers.

    A comma counts as a space, so "9,6" is two numbers and "9, 6" is not.
    """
    fields = review.split("\n", 1)[0].replace(",", " ").split(" ")
    if len(fields) != 2:
        return UNPARSED
    try:
        return float(fields[0]), float(fields[1])
    except ValueError:
        return UNPARSED


def summarise(reviews: Iterable[tuple[str, tuple[float, float]]]) -> dict[str, CategoryScore]:
    """Figures of every category and of all questions together (`OVERALL`), rounded as published.

    Args:
      reviews: (category, (score of the reference, score of the candidate)).
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for category, scores in reviews:
        groups[OVERALL].append(scores)
        groups[category].append(scores)
    return {category: _score(scores) for category, scores in sorted(groups.items())}


def _score(scores: list[tuple[float, float]]) -> CategoryScore:
    reference, candidate = (round(mean, 3) for mean in np.mean(scores, axis=0).tolist())
    relative = round(candidate / reference * 100, 1) if reference else math.nan
    return CategoryScore(relative, round(reference * 10, 1), round(candidate * 10, 1))
