"""Pictures that are described in words and boxes: what a model that cannot see is shown in their place.

A JSON object a line,

    {"image": "harbour.jpg", "captions": ["A pier in the rain.", ...],
     "boxes": [{"name": "dog", "box": [left, top, right, bottom]}, ...], "size": [width, height]}

with boxes in pixels where `size` is given and as shares of the sides where it is not; or the annotation files of COCO.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vita_jax.data.records import RecordError, read_json
from vita_jax.errors import UserError

FIELDS = ("image", "captions", "boxes", "size")
# Annotated boxes reach beyond the picture by rounding.
OUTSIDE = 0.01


@dataclass(frozen=True)
class Box:
    """Something in a picture: its name, and left, top, right, bottom as shares of the sides."""

    name: str
    place: tuple[float, float, float, float]


@dataclass(frozen=True)
class DescribedPicture:
    """A picture as text.

    Attributes:
      image: path below the folder of the pictures.
      captions: at least one, each by another person.
      boxes: may be none.
    """

    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    def in_words(self, *, with_boxes: bool) -> str:
        """Captions, a line each; then, after an empty one, boxes as `name: [left, top, right, bottom]`."""
        lines = list(self.captions)
        if with_boxes and self.boxes:
            lines.append("")
            lines += [f"{box.name}: [{', '.join(f'{side:.3f}' for side in box.place)}]" for box in self.boxes]
        return "\n".join(lines)


def described_picture(entry: Any, where: str) -> DescribedPicture:
    """One picture of the format above. Raises RecordError naming the field."""
    if not isinstance(entry, dict):
        raise RecordError(where, "", f"expected a JSON object, got {type(entry).__name__}")
    for name in entry:
        if name not in FIELDS:
            raise RecordError(where, name, f"unknown field; known: {', '.join(FIELDS)}")
    image, captions = entry.get("image"), entry.get("captions")
    if not isinstance(image, str) or not image:
        raise RecordError(where, "image", f"{image!r} must be the path of a picture")
    if not isinstance(captions, list) or not captions:
        raise RecordError(where, "captions", "must be a list with at least one text")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise RecordError(where, f"captions[{number}]", f"{caption!r} must be a text")
    boxes = entry.get("boxes", [])
    if not isinstance(boxes, list):
        raise RecordError(where, "boxes", "must be a list")
    scale = _scale(entry.get("size"), where)
    found = tuple(_box(box, scale, where, f"boxes[{number}]") for number, box in enumerate(boxes))
    return DescribedPicture(image, tuple(" ".join(caption.split()) for caption in captions), found)


def _scale(size: Any, where: str) -> tuple[float, float]:
    if size is None:
        return 1.0, 1.0
    if not (isinstance(size, list) and len(size) == 2 and all(_is_number(side) and side > 0 for side in size)):
        raise RecordError(where, "size", f"{size!r} must be [width, height] in pixels")
    return float(size[0]), float(size[1])


def _box(entry: Any, scale: tuple[float, float], where: str, field: str) -> Box:
    name, place = (entry.get("name"), entry.get("box")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not name.strip():
        raise RecordError(where, field, 'must be {"name": text, "box": [left, top, right, bottom]}')
    if not (isinstance(place, list) and len(place) == 4 and all(map(_is_number, place))):
        raise RecordError(where, f"{field}.box", f"{place!r} must be four numbers: left, top, right, bottom")
    left, top, right, bottom = (side / scale[number % 2] for number, side in enumerate(place))
    if not (-OUTSIDE <= left <= right <= 1 + OUTSIDE and -OUTSIDE <= top <= bottom <= 1 + OUTSIDE):
        raise RecordError(where, f"{field}.box", f"{place} is not inside the picture; pixels need `size`")
    return Box(name.strip(), tuple(min(max(side, 0.0), 1.0) for side in (left, top, right, bottom)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """{"picture": JSON value} for every line of a file, or {"error": reason}. Raises UserError if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield {"picture": json.loads(line)}
                except json.JSONDecodeError as error:
                    yield {"error": f"line {number} is not valid JSON: column {error.colno}: {error.msg}"}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"pictures file {os.fspath(path)} cannot be read: {error}") from error


def read_coco(captions: str | os.PathLike[str], instances: str | os.PathLike[str] | None) -> Iterator[dict[str, Any]]:
    """The same for COCO's `captions_*.json` and `instances_*.json`, in order of the pictures; those without a caption
    are left out. Raises UserError for files that are none of COCO's.
    """
    described = _annotations(captions, "captions", "caption")
    boxed = _annotations(instances, "instances", "bbox") if instances is not None else {"annotations": []}
    names = {category["id"]: category["name"] for category in boxed.get("categories", [])}
    texts: dict[int, list[str]] = {}
    for annotation in described["annotations"]:
        texts.setdefault(annotation["image_id"], []).append(annotation["caption"])
    boxes: dict[int, list[dict[str, Any]]] = {}
    for annotation in boxed["annotations"]:
        found = {"name": names.get(annotation["category_id"]), "box": _corners(annotation["bbox"])}
        boxes.setdefault(annotation["image_id"], []).append(found)
    for picture in described["images"]:
        if picture["id"] in texts:
            found = {"boxes": boxes[picture["id"]]} if picture["id"] in boxes else {}
            size = [picture["width"], picture["height"]]
            yield {"picture": {"image": picture["file_name"], "captions": texts[picture["id"]], "size": size, **found}}


def _corners(bbox: Any) -> Any:
    """COCO's left, top, width, height as left, top, right, bottom; anything else as it is, for the check to refuse."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))):
        return bbox
    left, top, width, height = bbox
    return [left, top, left + width, top + height]


def _annotations(path: str | os.PathLike[str], what: str, field: str) -> Mapping[str, Any]:
    content = read_json(Path(path), f"COCO {what}")
    parts = content if isinstance(content, dict) else {}
    for name in ("images", "annotations"):
        if not isinstance(parts.get(name), list):
            raise UserError(
                f"COCO {what} file {os.fspath(path)} has no list {name!r}; give {what}_train2017.json or so"
            )
    wanted = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", field)}
    if field == "bbox":
        wanted |= {"annotations": ("image_id", "category_id", field), "categories": ("id", "name")}
    for name, fields in wanted.items():
        for number, entry in enumerate(parts.get(name, [])):
            missing = [key for key in fields if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise UserError(f"COCO {what} file {os.fspath(path)}: {name}[{number}] has no {missing[0]!r}")
    return parts
