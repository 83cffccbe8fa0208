"""The questions of a benchmark: one JSON object per line of `items.jsonl`, media files beside it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vita_jax.data.json_lines import read_json_lines
from vita_jax.errors import UserError

ITEMS = "items.jsonl"


@dataclasses.dataclass(frozen=True)
class Item:
    """One question with its true answer.

    Attributes:
      group: part of the benchmark with a figure of its own.
      kind: of question; the figure of a group is the mean over its kinds.
      question: without placeholders; the files are put in front. Empty for one that is only spoken.
      num_digits: digits shown, 0 where that means nothing.
      image, video, audio: paths below the benchmark's folder; at most one of image and video.
    """

    id: str
    group: str
    kind: str
    language: str
    question: str
    answer: str
    num_digits: int = 0
    image: str | None = None
    video: str | None = None
    audio: str | None = None

    @property
    def media(self) -> tuple[tuple[str, str], ...]:
        """(kind, path) of the files that come with the question, pictures and videos before sounds; () for text."""
        paths = (("image", self.image), ("video", self.video), ("audio", self.audio))
        return tuple((kind, path) for kind, path in paths if path is not None)


_FIELDS = {field.name: field for field in dataclasses.fields(Item)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]


def parse_item(entry: Any, where: str) -> Item:
    """One item from its JSON value. Raises `UserError` naming `where` and the field that is wrong."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(entry).__name__}")
    for name in _REQUIRED:
        if name not in entry:
            raise UserError(f"{where}: the field {name!r} is missing")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: unknown field {name!r}; known: {', '.join(_FIELDS)}")
        optional = name in ("image", "video", "audio")
        expected = int if name == "num_digits" else str
        if not (isinstance(value, expected) or optional and value is None):
            raise UserError(f"{where}: {name}={value!r} must be of type {expected.__name__}")
    item = Item(**entry)
    if item.image is not None and item.video is not None:
        raise UserError(f"{where}: has an image and a video; one of them at most")
    if not item.question.strip() and item.audio is None:
        raise UserError(f"{where}: the question is empty, and there is no sound that asks it")
    return item


def read_items(path: str | Path) -> list[Item]:
    """All items of a file.

    Raises:
      UserError: no such file, or a line that is not an item.
    """
    advice = "training builds it: check the run's data.folder, or delete it to have it built again"
    return [parse_item(entry, where) for where, entry in read_json_lines(path, advice)]


def stratified(items: Sequence[Item], per_kind: int) -> list[Item]:
    """At most `per_kind` items of every kind of every group, spread evenly over languages and digit counts.

    Within a kind the first item of each (language, digit count) comes first, then the second of each, and so on. The
    result keeps the order of `items`.
    """
    if per_kind < 1:
        raise UserError(f"limit {per_kind} must be at least 1")
    seen: Counter[tuple] = Counter()
    ranked = []
    for index, item in enumerate(items):
        stratum = (item.group, item.kind, item.language, item.num_digits)
        ranked.append((seen[stratum], index))
        seen[stratum] += 1
    taken: Counter[tuple] = Counter()
    chosen = []
    for _, index in sorted(ranked):
        kind = (items[index].group, items[index].kind)
        if taken[kind] < per_kind:
            taken[kind] += 1
            chosen.append(index)
    return [items[index] for index in sorted(chosen)]
