"""A scene for a duplex conversation: sounds at given times, or some time after something has happened.

    {
      "show": [{"image": "digits.png", "at": 0.0}],
      "sounds": [
        {"name": "question", "wav": "question.wav", "at": 0.5},
        {"name": "television", "wav": "tv.wav", "at": {"after": "first sound", "nth": 1, "plus": 0.2}, "meant": false},
        {"name": "second question", "say": "Count the digits.", "voice": "en-gb", "at": {"after": "recognised"}}
      ]
    }

`meant` says whether the model is to answer; sounds may overlap. Instead of `wav` a sound may come from another source
that the caller knows, such as a synthesiser. Files are beside the scene's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vita_jax.data.audio import read_audio
from vita_jax.errors import UserError

# What a time may be counted from, and what that means.
ANCHORS = {
    "speech started": "somebody's speech was noticed",
    "speech stopped": "it was noticed that it is over",
    "recognised": "a query was recognised",
    "ignored": "an utterance was ignored",
    "first sound": "an answer was heard first",
    "sent": "all of an answer was made",
    "done": "an answer was over",
}
MAX_SECONDS = 600.0

COMMON_FIELDS = frozenset({"name", "at", "meant", "gain"})  # of every sound


@dataclass(frozen=True)
class Source:
    """Where sounds come from.

    Attributes:
      make: a sound's entry in the file -> its samples (n,) float32 at 16 kHz.
      options: fields that it may have besides the one that names the source and `COMMON_FIELDS`.
    """

    make: Callable[[Mapping[str, Any]], np.ndarray]
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Moment:
    """A time: seconds from the beginning, or from the nth time that something has happened.

    Attributes:
      seconds: from there.
      after: one of `ANCHORS`; None = the beginning.
      nth: from 1 on.
    """

    seconds: float
    after: str | None = None
    nth: int = 1


@dataclass(frozen=True)
class SceneSound:
    """Something that is heard. samples: (n,) float32 at 16 kHz; meant: whether it is for the model."""

    name: str
    moment: Moment
    samples: np.ndarray
    meant: bool = True


@dataclass(frozen=True)
class SceneImage:
    """A picture that is shown."""

    moment: Moment
    path: Path


@dataclass(frozen=True)
class Scene:
    """Everything that happens to the model. noise_floor: root mean square of what a silent microphone gives."""

    sounds: tuple[SceneSound, ...]
    images: tuple[SceneImage, ...] = ()
    noise_floor: float = 2e-4


def read_scene(path: str | Path, sources: Mapping[str, Source] = MappingProxyType({})) -> Scene:
    """A scene's file.

    Args:
      path: JSON, see the top of this file.
      sources: more of them than `wav`, by the field that names them.

    Raises:
      UserError: the file, or a file that it names, cannot be read, or does not say what it should; names the field.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"scene {path} cannot be read: {error}") from None
    files = Source(lambda entry: read_audio(path.parent / entry["wav"]))
    return _Reader(path, {"wav": files, **sources}).scene(content)


@dataclass(frozen=True)
class _Reader:
    path: Path
    sources: Mapping[str, Source]

    def scene(self, content: Any) -> Scene:
        self.check(content, "the scene", {"sounds", "show", "noise_floor"})
        sounds = content.get("sounds")
        if not isinstance(sounds, list) or not sounds:
            raise self.wrong("sounds", sounds, "a list of at least one sound")
        images = content.get("show", [])
        if not isinstance(images, list):
            raise self.wrong("show", images, "a list of pictures")
        floor = content.get("noise_floor", Scene.noise_floor)
        if not isinstance(floor, int | float) or not 0 <= floor < 1:
            raise self.wrong("noise_floor", floor, "a number from 0 to 1")
        read = tuple(self.sound(entry, f"sounds[{i}]") for i, entry in enumerate(sounds))
        names = [sound.name for sound in read]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise self.wrong(f"sounds[{i}].name", name, "a name that no other sound has")
        return Scene(
            read,
            tuple(self.image(entry, f"show[{i}]") for i, entry in enumerate(images)),
            float(floor),
        )

    def sound(self, entry: Any, where: str) -> SceneSound:
        named = [name for name in self.sources if isinstance(entry, dict) and name in entry]
        if len(named) != 1:
            raise self.wrong(where, entry, f"an object with exactly one source of sound ({', '.join(self.sources)})")
        source = self.sources[named[0]]
        self.check(entry, where, {named[0]} | COMMON_FIELDS | source.options)
        meant, gain = entry.get("meant", True), entry.get("gain", 1.0)
        if not isinstance(meant, bool):
            raise self.wrong(f"{where}.meant", meant, "true or false")
        if not isinstance(gain, int | float) or not 0 < gain <= 100:
            raise self.wrong(f"{where}.gain", gain, "a number above 0, at most 100")
        if not isinstance(entry[named[0]], str):
            raise self.wrong(f"{where}.{named[0]}", entry[named[0]], "text")
        samples = np.asarray(source.make(entry), np.float32) * gain
        if not len(samples):
            raise self.wrong(f"{where}.{named[0]}", entry[named[0]], "a sound that is not empty")
        name = entry.get("name", f"{named[0]} {entry[named[0]]}")
        return SceneSound(str(name), self.moment(entry.get("at"), f"{where}.at"), samples, meant)

    def image(self, entry: Any, where: str) -> SceneImage:
        self.check(entry, where, {"image", "at"})
        if not isinstance(entry.get("image"), str):
            raise self.wrong(f"{where}.image", entry.get("image"), "the name of a file")
        return SceneImage(self.moment(entry.get("at", 0.0), f"{where}.at"), self.path.parent / entry["image"])

    def moment(self, value: Any, where: str) -> Moment:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = {"plus": value}
        elif isinstance(value, dict) and value.get("after") not in ANCHORS:
            raise self.wrong(f"{where}.after", value.get("after"), f"one of {', '.join(ANCHORS)}")
        self.check(value, where, {"after", "nth", "plus"})
        seconds, nth = value.get("plus", 0.0), value.get("nth", 1)
        if not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_SECONDS:
            raise self.wrong(where, seconds, f"seconds from 0 to {MAX_SECONDS:g}")
        if type(nth) is not int or nth < 1:
            raise self.wrong(f"{where}.nth", nth, "a whole number, at least 1")
        return Moment(float(seconds), value.get("after"), nth)

    def check(self, entry: Any, where: str, known: Set[str]) -> None:
        if not isinstance(entry, dict):
            raise self.wrong(where, entry, "an object")
        unknown = sorted(set(entry) - known)
        if unknown:
            raise UserError(f"scene {self.path}: {where} has the unknown field {unknown[0]!r}; known: {sorted(known)}")

    def wrong(self, where: str, value: Any, wanted: str) -> UserError:
        return UserError(f"scene {self.path}: {where} is {value!r}; expected {wanted}")
