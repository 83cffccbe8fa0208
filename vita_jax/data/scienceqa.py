"""ScienceQA: school questions with several options, some about a picture (arXiv 2209.09513), as LLaVA learns and is
asked them (arXiv 2304.08485, section 5.2): question and context in, reasoning and then the answer out.

A folder of it has `problems.json` (id -> question, choices, answer, hint, image, lecture, solution, subject, grade),
`pid_splits.json` (split -> ids), and pictures at `<split>/<id>/<image>`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vita_jax.data.records import RecordError, read_json
from vita_jax.errors import UserError

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
LETTERS = "ABCDEFGHIJ"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
VERDICT = re.compile(r"(?i:answer is|answer:)\s*\(?([A-J])\)?(?=[\s.,;:]|$)")
LETTER_FIRST = re.compile(r"\s*\(?([A-J])(?:[).:]|\s*$)")


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
      id, split: where it belongs.
      choices: the options, in order of their letters.
      answer: place of the right one.
      hint: what is told beside the question; may be empty.
      reasoning: lecture and solution; may be empty.
      image: path of the picture below the folder; None for a question without.
      subject: "natural science", "social science" or "language science".
      grade: 1 to 12.
    """

    id: str
    split: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    reasoning: str
    image: str | None
    subject: str
    grade: int

    @property
    def instruction(self) -> str:
        """What is asked, without the picture's placeholder."""
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        context = f"Context: {self.hint}\n" if self.hint else ""
        return f"Question: {self.question}\n{context}Options: {options}"

    @property
    def target(self) -> str:
        """What is to be said: the reasoning, then the letter."""
        verdict = f"The answer is {LETTERS[self.answer]}."
        return f"{self.reasoning}\n{verdict}" if self.reasoning else verdict

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns of the published tables that it counts in, as `figures_by_class` there names them."""
        context = {"TXT": bool(self.hint), "IMG": self.image is not None}
        found = [name for name, holds in context.items() if holds] or ["NO"]
        return SUBJECTS[self.subject], *found, "G1-6" if self.grade <= 6 else "G7-12"


def chosen_letter(answer: str, num_choices: int) -> str | None:
    """The letter that an answer settles on: that of the last "The answer is X", else the one that it begins with.

    None if there is neither, or no such option.
    """
    verdicts, first = VERDICT.findall(answer), LETTER_FIRST.match(answer)
    letter = verdicts[-1] if verdicts else first[1] if first else None
    return letter if letter is not None and LETTERS.index(letter) < num_choices else None


def read_problems(folder: str | os.PathLike[str], split: str) -> list[Problem]:
    """The problems of a split, in its order.

    Raises:
      UserError: a file is missing or none of ScienceQA's, or there is no such split.
      RecordError: a problem is malformed; names its field.
    """
    root = Path(folder)
    problems, splits = (read_json(root / name, "ScienceQA") for name in (PROBLEMS, SPLITS))
    if not isinstance(splits, dict) or split not in splits:
        known = ", ".join(splits) if isinstance(splits, dict) else "none"
        raise UserError(f"{root / SPLITS} has no split {split!r}; it has {known}")
    if not isinstance(problems, dict):
        raise UserError(f"{root / PROBLEMS} must be an object of problems by their ids")
    found = []
    for name in splits[split]:
        if name not in problems:
            raise UserError(
                f"{root / SPLITS}: the split {split} names problem {name!r}, which {PROBLEMS} does not have"
            )
        found.append(_problem(problems[name], str(name), f"{root / PROBLEMS}: problem {name}"))
    return found


def _problem(entry: Any, name: str, where: str) -> Problem:
    if not isinstance(entry, Mapping):
        raise RecordError(where, "", f"expected an object, got {type(entry).__name__}")
    texts = {}
    for field in ("question", "hint", "lecture", "solution", "subject", "grade", "split"):
        texts[field] = entry.get(field, "")
        if not isinstance(texts[field], str):
            raise RecordError(where, field, f"{texts[field]!r} must be a text")
    choices, answer, image = entry.get("choices"), entry.get("answer"), entry.get("image")
    if not (
        isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS) and all(isinstance(c, str) for c in choices)
    ):
        raise RecordError(where, "choices", f"must be 2 to {len(LETTERS)} texts")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise RecordError(where, "answer", f"{answer!r} is not the place of one of the {len(choices)} choices")
    grade = texts["grade"].removeprefix("grade")
    if not grade.isdecimal() or not 1 <= int(grade) <= 12:
        raise RecordError(where, "grade", f"{texts['grade']!r} must be grade1 to grade12")
    if texts["subject"] not in SUBJECTS:
        raise RecordError(where, "subject", f"{texts['subject']!r} is none of ScienceQA's")
    if not texts["question"].strip():
        raise RecordError(where, "question", "is empty")
    if image is not None and not isinstance(image, str):
        raise RecordError(where, "image", f"{image!r} must be a file name, or null")
    return Problem(
        name,
        texts["split"],
        texts["question"].strip(),
        tuple(choice.strip() for choice in choices),
        answer,
        texts["hint"].strip(),
        "\n".join(part.strip() for part in (texts["lecture"], texts["solution"]) if part.strip()),
        f"{texts['split']}/{name}/{image}" if image else None,
        texts["subject"],
        int(grade),
    )
