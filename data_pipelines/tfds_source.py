"""Data sets of TensorFlow Datasets as records, read through `tfds.data_source`: random access, without TensorFlow.

An element becomes a record of one round: a fixed question, with a picture or a sound before it, and an answer. The data
set must have been prepared as ArrayRecord files (`tfds build --file_format=array_record`). Features of sound need
TensorFlow to be installed beside; it is used here only, never in training.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.parts import file_state
from vita_jax.data.records import PLACEHOLDERS, CheckedRecord, Media, Record, RecordError, check_record
from vita_jax.errors import UserError

TENSORFLOW = "the data set has features that need TensorFlow: pip install tensorflow"
# Where well-known data sets have what is needed: (image, audio, question, answer).
KNOWN = {
    "coco_captions": ("image", None, "Describe the picture.", "captions/text"),
    "librispeech": (None, "speech", "Write down what you hear.", "text"),
}


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split of a data set.

    Attributes:
      dataset: a name, with configuration and version as tfds writes them ("coco_captions/2014:1.1.0"), or the folder of
        a prepared data set, which holds dataset_info.json.
      split: as tfds writes it: "train", "train[:10%]".
      data_dir: where data sets named by name lie; None for the place tfds takes.
      image, audio: the feature of the picture or the sound, "outer/inner" where it is nested; None = no such medium.
      question: what is asked; "" for a sound that is the question itself.
      answer: the feature that answers: text, a class label, or a list of texts, of which the first is taken.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    image: str | None = None
    audio: str | None = None
    question: str = ""
    answer: str = ""

    def __post_init__(self) -> None:
        known = KNOWN.get(self.dataset.partition("/")[0].partition(":")[0])
        if known is not None and not self.answer:
            for name, value in zip(("image", "audio", "question", "answer"), known, strict=True):
                object.__setattr__(self, name, getattr(self, name) or value)
        if not self.answer:
            raise UserError(f"data set {self.dataset}: say which feature is the answer (--answer FEATURE)")
        if not self.question and self.audio is None:
            raise UserError(f"data set {self.dataset}: say what is asked (--question TEXT)")

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.dataset}[{self.split}]"

    @property
    def path(self) -> str:
        """What a manifest gives as the source."""
        return f"tfds:{self.name}"

    def check(self) -> None:
        """Raises UserError if the data set, its split or a feature cannot be found."""
        features = _open(self.dataset, self.split, self.data_dir)[1]
        for feature in filter(None, (self.image, self.audio, self.answer)):
            _feature(features, feature, self.name)

    def options(self) -> dict[str, Any]:
        """What decides the records, beside the data."""
        return {name: value for name, value in vars(self).items() if name != "data_dir"}

    def sha256(self) -> str:
        """Of the data set's own description, and of name, size and time of change of its files."""
        return _open(self.dataset, self.split, self.data_dir)[2]

    def entries(self) -> Iterator[int]:
        """The places in the split."""
        yield from range(len(_open(self.dataset, self.split, self.data_dir)[0]))

    def checked(self, entry: int, place: int) -> CheckedElement:
        """The record of an element, its media not encoded yet. Raises RecordError."""
        source, features, _ = _open(self.dataset, self.split, self.data_dir)
        element = source[entry]
        answer = _text(_value(element, self.answer), _feature(features, self.answer, self.name))
        if answer is None:
            raise RecordError(
                f"{self.name}: record {place}", self.answer, "is no text in UTF-8, no class and no list of them"
            )
        marks = "".join(PLACEHOLDERS[kind] + "\n" for kind in ("image", "audio") if getattr(self, kind) is not None)
        turns = [{"from": "human", "value": (marks + self.question).strip()}, {"from": "gpt", "value": answer}]
        media = {kind: kind for kind in ("image", "audio") if getattr(self, kind) is not None}
        # The names of the media stand for features; nothing is opened under them.
        checked = check_record({"id": place, "conversations": turns, **media}, "/", where=self.name, index=place)
        values = {kind: _value(element, getattr(self, kind)) for kind in media}
        rate = None if self.audio is None else getattr(_feature(features, self.audio, self.name), "sample_rate", None)
        return CheckedElement(checked, values, rate)

    def state(self, entry: int, place: int) -> str:
        """Nothing: there are no files beside the data set."""
        return ""

    def identity(self, entry: int) -> int:
        """The place in the split."""
        return entry


@dataclasses.dataclass(frozen=True)
class CheckedElement:
    """A record whose text is checked, and what its media are made of: values by kind, and the rate of sound in Hz."""

    checked: CheckedRecord
    values: dict[str, Any]
    sample_rate: int | None

    @property
    def where(self) -> str:
        """Names the record in messages."""
        return self.checked.where

    def with_media(self) -> Record:
        """Encodes what is not the bytes of a file yet. Raises RecordError."""
        media = tuple(Media(kind, kind, self._encoded(kind, value)) for kind, value in self.values.items())
        return dataclasses.replace(self.checked.record, media=media)

    def _encoded(self, kind: str, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        value = np.asarray(value)
        if kind == "image":
            return _png(value, self.where)
        if self.sample_rate is None:
            raise RecordError(self.where, kind, "has no sample rate in the description of the data set")
        return _wav(value, self.sample_rate, self.where)


@functools.lru_cache(maxsize=4)
def _open(dataset: str, split: str, data_dir: str | None) -> tuple[Any, Any, str]:
    """(random access to the elements, their features, hash of the description) of a split."""
    import tensorflow_datasets as tfds  # here, since it takes a second

    try:
        if Path(dataset, "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(dataset)
        else:
            builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        features = builder.info.features
        # Pictures stay the bytes they are; they are decoded once, where all media are checked.
        pictures = (name for name, feature in features.items() if isinstance(feature, tfds.features.Image))
        skip = {name: tfds.decode.SkipDecoding() for name in pictures}
        source = builder.as_data_source(split=split, decoders=skip or None)
        files = "".join(map(file_state, sorted(Path(builder.data_dir).glob("*"))))
        described = json.dumps([builder.info.as_json, files], sort_keys=True).encode("utf-8", "surrogateescape")
    except ModuleNotFoundError as error:
        raise UserError(f"data set {dataset}: {TENSORFLOW}") from error
    except Exception as error:  # tfds raises many kinds of its own
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(f"data set {dataset}, split {split}: {reason or type(error).__name__}") from error
    return source, features, hashlib.sha256(described).hexdigest()


def _value(element: Any, path: str) -> Any:
    for name in path.split("/"):
        element = element[name]
    return element


def _feature(features: Any, path: str, where: str) -> Any:
    """A feature by its path. Raises UserError that names those there are."""
    found = features
    for name in path.split("/"):
        found = getattr(found, "feature", found)  # of a sequence
        if not hasattr(found, "keys") or name not in found:
            raise UserError(f"data set {where} has no feature {path!r}; it has {', '.join(sorted(features.keys()))}")
        found = found[name]
    return found


def _text(value: Any, feature: Any) -> str | None:
    """A text, the name of a class, or the first of several texts."""
    if isinstance(value, (list, tuple, np.ndarray)) and not np.isscalar(value) and np.ndim(value) > 0:
        return _text(value[0], getattr(feature, "feature", feature)) if len(value) else ""
    value = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, int) and hasattr(feature, "int2str"):
        # tfds keeps -1 for what has no label.
        return str(feature.int2str(value)) if 0 <= value < (feature.num_classes or 0) else None
    return value if isinstance(value, str) else None


def _png(pixels: np.ndarray, where: str) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        wanted = "expected uint8, height x width x 1 or 3"
        raise RecordError(where, "image", f"is {pixels.dtype} of shape {pixels.shape}; {wanted}")
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _wav(samples: np.ndarray, sample_rate: int, where: str) -> bytes:
    """16-bit mono. Integers are 16-bit samples, whatever they are stored in; floats lie in [-1, 1]."""
    scale = 1 if np.issubdtype(samples.dtype, np.integer) else 32767
    if samples.ndim == 2:
        samples = samples.mean(-1)
    if not np.all(np.isfinite(samples)):
        raise RecordError(where, "audio", "holds samples that are no numbers", "damaged media")
    if samples.ndim != 1:
        raise RecordError(where, "audio", f"has shape {samples.shape}; expected samples, or samples x channels")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(np.clip(np.rint(samples * scale), -32768, 32767).astype("<i2").tobytes())
    return buffer.getvalue()
