"""Questions and answers as JSON lines, in the fields that LLaVA's files have.

question   {"question_id": 7, "text": "What is this?", "image": "001.jpg", "category": "conv"}    image may be missing
answer     {"question_id": 7, "prompt": "What is this?", "text": "A boat.", "model_id": "runs/llava"}
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vita_jax.data.json_lines import read_json_lines
from vita_jax.errors import UserError
from vita_jax.evaluation.items import Item

ID = "question_id"


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


def question_items(questions: Mapping[str, Mapping[str, Any]]) -> list[Item]:
    """Questions as items that a model can be asked."""
    items = []
    for name, question in questions.items():
        image, category = question.get("image"), question.get("category", "question")
        if image is not None and not isinstance(image, str):
            raise UserError(f"question {name}: image={image!r} must be a path")
        items.append(Item(name, "asked", str(category), "en", question["text"], "", image=image))
    return items


def answer_lines(
    questions: Mapping[str, Mapping[str, Any]], answers: Sequence[str], model: str
) -> list[dict[str, Any]]:
    """What a model said, in the order of the questions."""
    return [
        {ID: question[ID], "prompt": question["text"], "text": answer, "model_id": model}
        for question, answer in zip(questions.values(), answers, strict=True)
    ]
