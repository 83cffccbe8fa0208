"""Documents and captions as they are published -> the public document format of `vita_jax.data.documents`.

    documents  the format itself
    tagged     {"text": text with <image> and <video> in it, "image": [paths], "video": [paths]}, one for each in order
    pairs      {"image" | "video": path, "caption": text}, as in LAION and video-text sets
    mmc4       {"text_list": [sentences], "image_info": [{"image_name": path}], "similarity_matrix": [[number]]}, what
               open_flamingo was trained on: pictures come without places, and each is given to the sentence it fits
               best (rows of the matrix are pictures, columns sentences), by a one-to-one assignment

What such an entry says beside that, its `id` and `set` is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.documents import MEDIA_KINDS
from vita_jax.data.interleaved import DocumentOptions, assign_images, usable_images
from vita_jax.data.records import PLACEHOLDERS, RecordError

_TAG = re.compile(f"({'|'.join(re.escape(PLACEHOLDERS[kind]) for kind in MEDIA_KINDS)})")
KIND_OF_TAG = {PLACEHOLDERS[kind]: kind for kind in MEDIA_KINDS}
Pieces = list[Any]
FileSize = Callable[[str], int | None]


def _paths(entry: Mapping[str, Any], kind: str) -> list[Any]:
    value = entry.get(kind)
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _tagged(entry: Mapping[str, Any], where: str, size: FileSize) -> Pieces:
    del size
    text = entry.get("text")
    if not isinstance(text, str):
        raise RecordError(where, "text", "must be text with a tag for every picture")
    files = {kind: _paths(entry, kind) for kind in MEDIA_KINDS}
    for kind, names in files.items():
        found = text.count(PLACEHOLDERS[kind])
        if found != len(names):
            reason = f"{len(names)} file(s) but {found} {PLACEHOLDERS[kind]} in the text; write one per file"
            raise RecordError(where, kind, reason, "placeholders")
    pieces: Pieces = []
    for part in _TAG.split(text):
        if part in KIND_OF_TAG:
            pieces.append({KIND_OF_TAG[part]: files[KIND_OF_TAG[part]].pop(0)})
        elif part.strip():
            pieces.append(part)
    return pieces


def _pair(entry: Mapping[str, Any], where: str, size: FileSize) -> Pieces:
    del size
    kinds = [kind for kind in MEDIA_KINDS if entry.get(kind) is not None]
    if len(kinds) != 1 or not isinstance(entry.get("caption"), str):
        raise RecordError(where, "", "must have 'image' or 'video', and 'caption', a text")
    return [{kinds[0]: entry[kinds[0]]}, entry["caption"]]


def _mmc4(entry: Mapping[str, Any], where: str, size: FileSize) -> Pieces:
    """Places by `interleaved.assign_images`; of what is left, all pictures are kept: how many are used is for training
    to say.
    """
    sentences, infos = entry.get("text_list"), entry.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise RecordError(where, "text_list", "must be a list of texts")
    if not isinstance(infos, list) or not all(isinstance(i, dict) and "image_name" in i for i in infos):
        raise RecordError(where, "image_info", "must be a list of objects with 'image_name'")
    similarity = _matrix(entry.get("similarity_matrix"), len(infos), len(sentences), where)
    usable = usable_images([size(info["image_name"]) for info in infos])
    least = DocumentOptions.similarity_threshold
    pictures = {s: infos[i]["image_name"] for i, s, score in assign_images(similarity, usable) if score >= least}
    if not pictures:
        reason = f"no picture is there, larger than an icon and at least {least:g} similar to a sentence"
        raise RecordError(where, "image_info", reason, "no picture")
    pieces: Pieces = []
    for number, sentence in enumerate(sentences):
        pieces += [{"image": pictures[number]}] if number in pictures else []
        # Tags that a page happened to have in its text would be pictures that are not there.
        plain = _TAG.sub("", sentence).strip()
        pieces += [plain] if plain else []
    return pieces


def _matrix(value: Any, pictures: int, sentences: int, where: str) -> np.ndarray:
    try:
        matrix = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(())
    if matrix.shape != (pictures, sentences):
        reason = f"must be {pictures} x {sentences} numbers, a row for every picture, not of shape {matrix.shape}"
        raise RecordError(where, "similarity_matrix", reason)
    return matrix


def _documents(entry: Mapping[str, Any], where: str, size: FileSize) -> Pieces:
    del where, size
    return entry.get("document")


DOCUMENT_LAYOUTS: dict[str, Callable[[Mapping[str, Any], str, FileSize], Pieces]] = {
    "documents": _documents,
    "tagged": _tagged,
    "pairs": _pair,
    "mmc4": _mmc4,
}


def public_document(
    entry: Any, layout: str, where: str, root: str | None, folders: Mapping[str, str] | None
) -> dict[str, Any]:
    """An entry in the public document format; pieces are not checked beyond their shape.

    Args:
      entry: the decoded JSON.
      layout: one of `DOCUMENT_LAYOUTS`.
      where: names the entry in messages.
      root, folders: where its files are, for layouts that look at their sizes.

    Raises:
      RecordError: another shape, or as many tags as there are not files.
    """
    if layout == "documents" or not isinstance(entry, dict):
        return entry
    key = entry.get("set")
    base = root if folders is None or not isinstance(key, str) else folders.get(key, root)

    def size(name: Any) -> int | None:
        if base is None or not isinstance(name, str):
            return None
        try:
            return (Path(base) / name).stat().st_size
        except (OSError, ValueError):
            return None

    kept = {name: entry[name] for name in ("id", "set") if name in entry}
    return {**kept, "document": DOCUMENT_LAYOUTS[layout](entry, where, size)}
