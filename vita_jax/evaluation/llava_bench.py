"""LLaVA-Bench: answers judged by a language model against reference answers (arXiv 2304.08485, section 5.1;
`llava/eval/eval_gpt_review_bench.py`, `summarize_gpt_review.py`).

A judge reads what is in the picture, the question, the reference as assistant 1 and the answer as assistant 2, and puts
two scores from 1 to 10 in its first line. The figure of a category is the mean score of the answers in per cent of that
of the references. Reviews that cannot be parsed count as -1 for both, as in the original.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vita_jax.data.teacher import Message
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import objects

UNPARSED = (-1.0, -1.0)
OVERALL = "all"
SYSTEM = "You compare the answers of two assistants, fairly and precisely."
INSTRUCTION = """\
Two assistants have answered a question about a picture. You cannot see it; the context above tells in words what is in
it. Grade both answers: are they helpful, to the point, right, and as detailed as the question asks? Give each assistant
a score from 1 to 10, higher is better.
Your first line must hold two numbers and nothing else, the scores of assistant 1 and assistant 2, with a space between
them. Then explain your grading. The order in which the answers stand must not count."""


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


def read_descriptions(path: str | os.PathLike[str]) -> dict[str, str]:
    """What is in every picture, by its file: the `caption` of the set in the wild, or `captions` and `instances`
    ({"category", "bbox"}) of the COCO set, the former above the latter. Raises UserError naming the line.
    """
    found = {}
    for where, entry in objects(path):
        image, caption = entry.get("image"), entry.get("caption")
        if not isinstance(image, str):
            raise UserError(f"{where}: image={image!r} must be a path")
        if caption is None:
            captions, boxes = entry.get("captions"), entry.get("instances", [])
            if not isinstance(captions, list) or not isinstance(boxes, list):
                raise UserError(f"{where}: needs `caption`, or lists of `captions` and `instances`")
            try:
                lines = [f"{box['category']}: {box['bbox']}" for box in boxes]
            except (KeyError, TypeError):
                raise UserError(f"{where}: instances must have `category` and `bbox`") from None
            caption = "\n".join(map(str, captions)) + "\n\n" + "\n".join(lines)
        found[image] = caption
    return found


def judge_messages(
    questions: Mapping[str, Mapping[str, Any]],
    descriptions: Mapping[str, str],
    references: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[Message]]:
    """What the judge is asked about every question, by its id.

    Raises:
      UserError: a question has no picture that is described, no reference or no answer.
    """
    asked = {}
    for name, question in questions.items():
        for what, found, key in (
            ("description of its picture", descriptions, question.get("image")),
            ("reference", references, name),
            ("answer", answers, name),
        ):
            if key not in found:
                raise UserError(f"question {name} has no {what}" + (f" {key!r}" if key != name else ""))
        texts = (question["text"], references[name]["text"], answers[name]["text"])
        message = judge_message(descriptions[question["image"]], *texts, INSTRUCTION)
        asked[name] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
    return asked


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
