"""What a task of lmms-eval asks, as a question of this package: texts, and pictures, clips and sounds as files.

Nothing is left out silently: a file that is not there, a part of a clip, frames without a file, or a kind of content
that is not known here is an error, and so is a generation option that would change the answer and is not offered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import wavfile

from vita_jax.data.records import PLACEHOLDERS
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.evaluation.answer_lines import Question
from vita_jax.inference.sampling import GREEDY, Sampler, Temperature, TopK, TopP

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"})
SOUNDS = frozenset({".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus"})
# Modes of pictures that PNG holds as they are.
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
MOST_CHANNELS = 8
ROLES = {"user": "human", "assistant": "gpt"}

MAX_NEW_TOKENS = 1024
# Options that say how other models prepare pictures or compute.
IGNORED_OPTIONS = frozenset({"image_aspect_ratio", "use_cache", "modalities"})

Part = tuple[str, Any]  # ("text", text) or (kind of file, (kind, path))


@dataclass(frozen=True)
class Generation:
    """Options of a request.

    Attributes:
      max_new_tokens, sampler: see `AskOptions`.
      until: texts that end an answer.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    sampler: Sampler = GREEDY
    until: tuple[str, ...] = ()

    def cut(self, answer: str) -> str:
        """The answer up to the first of the texts that end it."""
        ends = [place for text in self.until if (place := answer.find(text)) >= 0]
        return answer[: min(ends)] if ends else answer


def generation(options: Mapping[str, Any]) -> Generation:
    """From the keyword arguments of a task, which mean what they mean in `transformers`.

    Raises:
      UnsupportedOption: beams, both top-k and top-p, or an option that is not known here.
    """
    left = {name: value for name, value in options.items() if value is not None and name not in IGNORED_OPTIONS}
    most = left.pop("max_new_tokens", None) or left.pop("max_gen_toks", None) or MAX_NEW_TOKENS
    left.pop("max_gen_toks", None)
    until = left.pop("until", ())
    temperature, top_p, top_k = (
        left.pop(name, default) for name, default in (("temperature", 0), ("top_p", 1), ("top_k", 0))
    )
    draws = left.pop("do_sample", temperature > 0) and temperature > 0
    if (beams := left.pop("num_beams", 1)) != 1:
        raise UnsupportedOption(f"num_beams={beams} of the task: only one beam is offered; --gen_kwargs num_beams=1")
    if left:
        name, value = next(iter(left.items()))
        raise UnsupportedOption(f"{name}={value!r} of the task's generation_kwargs is not offered")
    if draws and 0 < top_p < 1 and top_k:
        raise UnsupportedOption(f"top_p={top_p} and top_k={top_k} of the task: one of them at a time is offered")
    sampler: Sampler = GREEDY
    if draws:
        sampler = TopP(top_p, temperature) if 0 < top_p < 1 else Temperature(temperature)
        sampler = TopK(top_k, temperature) if top_k else sampler
    ends = (until,) if isinstance(until, str) else tuple(until)
    return Generation(int(most), sampler, tuple(end for end in ends if end))


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """Turns what tasks show into files.

    Attributes:
      folder: gets what is no file yet.
    """

    folder: Path
    _known: dict[int, tuple[Any, str]] = field(default_factory=dict)

    def part(self, shown: Any, kind: str | None = None) -> Part:
        """One picture, clip or sound.

        Args:
          shown: a picture of PIL; a path; a decoded sound as `datasets` has it, {"array", "sampling_rate"} or a decoder
            of torchcodec; or {"url"}, {"path"} or {"bytes"} of one of them.
          kind: "image", "video" or "audio"; None finds out.

        Raises:
          UserError: it is missing or not known here.
        """
        if isinstance(shown, Image.Image):
            return self._file("image", shown, lambda file: _save_picture(shown, file), ".png")
        if isinstance(shown, Mapping):
            return self._mapping(shown, kind)
        if hasattr(shown, "get_all_samples"):  # torchcodec's AudioDecoder
            samples = shown.get_all_samples()
            return self._sound(np.asarray(samples.data), samples.sample_rate, shown)
        if isinstance(shown, str | Path):
            return self._path(Path(shown), kind)
        if shown is None:
            raise UserError(f"a task shows nothing where it should show {kind or 'a file'}; its data is incomplete")
        raise UnsupportedOption(f"a task shows {type(shown).__name__}, which is no picture, path or sound known here")

    def _mapping(self, shown: Mapping[str, Any], kind: str | None) -> Part:
        if {"video_start", "video_end"} & set(shown):
            raise UnsupportedOption("a task shows a part of a clip (video_start, video_end); only whole clips are seen")
        if "array" in shown:
            return self._sound(np.asarray(shown["array"]), shown["sampling_rate"], shown)
        if shown.get("bytes") is not None:
            suffix = Path(str(shown.get("path") or "")).suffix.lower()
            chosen = kind if kind in PLACEHOLDERS else _kind_of(suffix, "bytes")
            return self._file(chosen, shown, lambda file: file.write_bytes(shown["bytes"]), suffix or ".bin")
        inner = next((shown[name] for name in ("url", "path", "video", "image", "audio") if shown.get(name)), None)
        return self.part(inner, shown.get("type", kind))

    def _path(self, path: Path, kind: str | None) -> Part:
        if path.as_posix().startswith(("http:", "https:")):
            raise UserError(f"{path}: nothing is fetched; use the task's local files")
        if path.is_dir():
            raise UnsupportedOption(f"{path} is a folder of frames; only clips that are one file are seen")
        if not path.is_file():
            raise UserError(f"{path} does not exist; get the task's files first")
        # What lmms-eval calls a clip may be anything that it does not know.
        known = _kind_of(path.suffix.lower(), None)
        chosen = known if known != "video" or kind not in PLACEHOLDERS else kind
        return chosen, (chosen, str(path.absolute()))

    def _sound(self, samples: np.ndarray, rate: int, owner: Any) -> Part:
        """samples: (n,), (n c) or (c n) of integers or floats."""
        if samples.ndim == 2 and samples.shape[0] <= MOST_CHANNELS < samples.shape[1]:
            samples = samples.T
        if samples.ndim not in (1, 2) or samples.shape[0] == 0:
            raise UserError(f"a task plays a sound of shape {samples.shape}; expected samples, and channels if any")
        if samples.dtype.kind == "f":
            samples = samples.astype(np.float32)
        return self._file("audio", owner, lambda file: wavfile.write(file, int(rate), samples), ".wav")

    def _file(self, kind: str, owner: Any, write: Any, suffix: str) -> Part:
        """A new file, or the one that was written of the same object."""
        if id(owner) not in self._known:
            name = f"{len(self._known)}{suffix}"
            write(self.folder / name)
            self._known[id(owner)] = (owner, name)  # with its owner, so that the id is not given away
        return kind, (kind, str((self.folder / self._known[id(owner)][1]).absolute()))


def _save_picture(picture: Image.Image, file: Path) -> None:
    picture = picture if picture.mode in PNG_MODES else picture.convert("RGB")
    picture.save(file, compress_level=1)


def _kind_of(suffix: str, source: str | None) -> str:
    if suffix in IMAGES:
        return "image"
    if suffix in SOUNDS:
        return "audio"
    if source is not None and not suffix:
        raise UserError(f"a task gives {source} without saying of what kind; expected a path beside them")
    return "video"


# ---- questions ------------------------------------------------------------------------------------------------------


def question_of(name: str, text: str, shown: Iterable[Any] | None, files: Files) -> Question:
    """Of a text and what is shown before it. Raises UserError as `Files.part`."""
    parts = [files.part(one) for one in _listed(shown)]
    return _question(name, [("human", [*parts, ("text", text)])])


def question_of_messages(name: str, messages: Sequence[Mapping[str, Any]], files: Files) -> Question:
    """Of messages, whose files stand where they are shown.

    Raises:
      UserError: as `Files.part`; a system's message, or a conversation that does not end with the user's.
    """
    turns: list[tuple[str, list[Part]]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UnsupportedOption(f"{name} has a message of role {role!r}; this model has a system text of its own")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [
            ("text", part["text"]) if part["type"] == "text" else files.part(part.get("url"), part["type"])
            for part in content
        ]
        if turns and turns[-1][0] == ROLES[role]:
            turns[-1][1].extend([("text", "\n"), *parts])
        else:
            turns.append((ROLES[role], parts))
    if not turns or turns[-1][0] != "human":
        raise UserError(f"{name}: the last message is not of the user, so there is nothing to answer")
    return _question(name, turns)


def _listed(shown: Any) -> list[Any]:
    if shown is None:
        return []
    return list(shown) if isinstance(shown, list | tuple) else [shown]


def _question(name: str, turns: Sequence[tuple[str, Sequence[Part]]]) -> Question:
    files = [content for _, parts in turns for kind, content in parts if kind != "text"]
    media = [file for file in files if file[0] != "audio"] + [file for file in files if file[0] == "audio"]
    values = tuple({"from": role, "value": _value(name, parts)} for role, parts in turns)
    return Question(name, values, tuple(media))


def _value(name: str, parts: Sequence[Part]) -> str:
    """The text of a turn with a placeholder for every file, where it stands or where the text has put one."""
    text = "".join(content for kind, content in parts if kind == "text")
    written = {kind: text.count(mark) for kind, mark in PLACEHOLDERS.items()}
    there = {kind: sum(part == kind for part, _ in parts) for kind in PLACEHOLDERS}
    if any(written.values()):
        if written != there:
            raise UserError(f"{name}: its text holds placeholders of {written}, and the task shows {there}")
        return text
    return "".join(content if kind == "text" else f"{PLACEHOLDERS[kind]}\n" for kind, content in parts)


def mark_of(*asked: Any) -> str:
    """Stands for what an answer depends on."""
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
