"""Questions and answers as JSON lines, in the fields that LLaVA's files have.

question   {"question_id": 7, "text": "What is this?", "image": "001.jpg", "category": "conv"}
           Beside or in place of `image` a `video` or an `audio`; each is a path or a list of paths. `text` may be
           missing where there is sound: the question is then asked aloud. It may place its files itself ("<image>").
           For scoring: `answer`, a text or a list of texts that are all right; `choices`, a list of texts.
answer     {"question_id": 7, "prompt": "What is this?", "text": "A boat.", "model_id": "runs/llava", ...}
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vita_jax.data.json_lines import read_json_lines
from vita_jax.errors import UserError

ID = "question_id"
MEDIA = ("image", "video", "audio")
# How answers may be compared, see `question_scores`.
Scoring = Literal["exact", "choice", "wer", "cer", "state"]
SCORINGS: tuple[Scoring, ...] = ("exact", "choice", "wer", "cer", "state")

Turns = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Question:
    """One thing to be asked.

    Attributes:
      id: as the file has it, a number or a text.
      question: a text, or the turns of a conversation that ends with the user's; with or without placeholders, see
        `prompt_example`.
      media: (kind, path) of its files, pictures and videos before sounds.
      truths: answers that are right, for scoring.
      choices: what an answer may settle on.
      category: of the figures.
    """

    id: int | str
    question: str | Turns
    media: tuple[tuple[str, str], ...] = ()
    truths: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = "question"

    @property
    def prompt(self) -> str:
        """What is asked, as text."""
        if isinstance(self.question, str):
            return self.question
        return "\n".join(turn["value"] for turn in self.question)


def read_lines(path: str | os.PathLike[str], *fields: str) -> dict[str, dict[str, Any]]:
    """The objects of a file by their `question_id` as text, in order.

    Args:
      path: UTF-8, a JSON object a line.
      fields: that every object must have, as texts that are not empty.

    Raises:
      UserError: naming the line: not JSON, a missing or wrong field, an id that was there before; or an empty file.
    """
    found: dict[str, dict[str, Any]] = {}
    for where, entry in objects(path):
        name = entry.get(ID)
        if isinstance(name, bool) or not isinstance(name, (int, str)) or name == "":
            raise UserError(f"{where}: {ID}={name!r} must be a number or a text")
        if str(name) in found:
            raise UserError(f"{where}: {ID} {name} is there twice")
        for field in fields:
            if not isinstance(entry.get(field), str) or not entry[field].strip():
                raise UserError(f"{where}: {field}={entry.get(field)!r} must be a text")
        found[str(name)] = entry
    return found


def objects(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line. Raises UserError as `read_json_lines`, and for a line that is no object."""
    for where, entry in read_json_lines(path):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(entry).__name__}")
        yield where, entry


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a file, in its order. Raises UserError naming the line or the question and the field."""
    return [_question(name, entry) for name, entry in read_lines(path).items()]


def _question(name: str, entry: Mapping[str, Any]) -> Question:
    media = tuple((kind, file) for kind in MEDIA for file in _texts(name, entry, kind))
    text, category = entry.get("text", ""), entry.get("category", "question")
    if not isinstance(text, str) or not text.strip() and not any(kind == "audio" for kind, _ in media):
        raise UserError(f"question {name}: text={text!r} must be a text; only with `audio` may it be empty")
    truths, choices = _texts(name, entry, "answer"), _texts(name, entry, "choices")
    return Question(entry[ID], text, media, truths, choices, str(category))


def _texts(name: str, entry: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A field that is a text or a list of texts; () where it is missing."""
    value = entry.get(field)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) and part.strip() for part in values):
        raise UserError(f"question {name}: {field}={value!r} must be a text or a list of texts")
    return tuple(values)


def answer_line(question: Question, answer: str, model: str, **more: Any) -> dict[str, Any]:
    """What a model said to one question."""
    return {ID: question.id, "prompt": question.prompt, "text": answer, "model_id": model, **more}


def missing_truths(questions: Sequence[Question], scoring: Scoring) -> str | None:
    """Why these questions cannot be scored; None if they can."""
    for question in questions:
        if not question.truths:
            return f"question {question.id} has no `answer`, which --scoring {scoring} compares with"
    return None
