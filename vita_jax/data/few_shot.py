"""Few-shot tasks of Flamingo: queries, what may be shown before them, which of it is, and the prompt that comes of it.

A folder holds `queries.jsonl`, `support.jsonl` and their media. A query is shown some of the support of its pool; pools
are tasks, or episodes with a few pictures of their own. Which ones is drawn by a seed, or chosen by how alike the
pictures are (arXiv 2204.14198, section 3.2.3; "RICES", retrieval of in-context examples by similarity): the most
similar comes last, next to the query. Axes: s positions, t pictures, f frames, S side, e width of embeddings.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vita_jax.data.document_examples import DocumentContext, encode_tagged, media_frames, picture_times
from vita_jax.data.flamingo_prompts import caption_prompt, few_shot_prompt, question_prompt
from vita_jax.data.json_lines import read_json_lines
from vita_jax.data.records import Media
from vita_jax.errors import UserError

QUERIES, SUPPORT = "queries.jsonl", "support.jsonl"
SHOTS = (0, 4, 8, 16, 32)
# The most of a pool that open_flamingo draws demonstrations from.
LARGEST_POOL = 2048
Choice = Literal["random", "similar"]


@dataclasses.dataclass(frozen=True)
class Shot:
    """A query, or a demonstration.

    Attributes:
      task: its figure's name. kind: part of the task; its figure is the mean over them.
      pool: whose support it is shown, or belongs to.
      question: empty for a caption or the name of a class.
      answer: the true one.
      image, video: path below the folder; one of them.
      choices: all answers that are possible, if they are ranked; () = the answer is open.
    """

    id: str
    task: str
    pool: str
    question: str
    answer: str
    kind: str = ""
    image: str | None = None
    video: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def file(self) -> tuple[str, str]:
        """(kind of media, path)."""
        return ("image", self.image) if self.image is not None else ("video", self.video)

    def prompt(self, answer: str | None = None) -> str:
        """The text of it, answered or open."""
        return question_prompt(self.question, answer) if self.question else caption_prompt(answer)


@dataclasses.dataclass(frozen=True)
class FewShotOptions:
    """How prompts are made.

    Attributes:
      shots: demonstrations of a prompt; several are several measurements.
      choice: of demonstrations: drawn at "random" by the seed, or "similar" pictures.
      seed: of the draws.
      zero_shot_texts: demonstrations of a prompt without shots, shown as text alone; two in the paper.
      separator: behind each demonstration; a line end in open_flamingo's captions and questions, nothing in its
        classification.
    """

    shots: tuple[int, ...] = SHOTS
    choice: Choice = "random"
    seed: int = 42
    zero_shot_texts: int = 2
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) != len(self.shots):
            raise UserError(f"shots {self.shots} must be different numbers from 0 on, at least one")
        if self.choice not in get_args(Choice):
            raise UserError(f"choice {self.choice!r} is unknown; use one of {', '.join(get_args(Choice))}")
        if self.zero_shot_texts < 0:
            raise UserError(f"zero_shot_texts {self.zero_shot_texts} must not be negative")


# ---- files ----------------------------------------------------------------------------------------------------------

_FIELDS = {field.name: field for field in dataclasses.fields(Shot)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]


def parse_shot(entry: Any, where: str) -> Shot:
    """One line's JSON value. Raises `UserError` naming `where` and the field that is wrong."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(entry).__name__}")
    for name in _REQUIRED:
        if name not in entry:
            raise UserError(f"{where}: the field {name!r} is missing")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: unknown field {name!r}; known: {', '.join(_FIELDS)}")
        if name == "choices":
            if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
                raise UserError(f"{where}: choices={value!r} must be a list of texts")
        elif not isinstance(value, str):
            raise UserError(f"{where}: {name}={value!r} must be text")
    shot = Shot(**{**entry, "choices": tuple(entry.get("choices", ()))})
    if (shot.image is None) == (shot.video is None):
        raise UserError(f"{where}: must have an image or a video, one of them")
    if not shot.answer.strip():
        raise UserError(f"{where}: the answer is empty")
    if shot.choices and shot.answer not in shot.choices:
        raise UserError(f"{where}: the answer {shot.answer!r} is not among its choices")
    return shot


def read_shots(path: str | Path) -> list[Shot]:
    """All lines of a file. Raises `UserError` for a missing or empty file, or a line that is no query."""
    advice = "training builds it: check the run's data.folder, or delete it to have it built again"
    return [parse_shot(entry, where) for where, entry in read_json_lines(path, advice)]


# ---- demonstrations -------------------------------------------------------------------------------------------------


def draw(query: Shot, pool: Sequence[Shot], count: int, seed: int) -> list[int]:
    """Places of `count` different demonstrations, the first `count` of an order that is the query's own: more shots
    begin with other ones and end with the same. Raises UserError if the pool is smaller.
    """
    _check_pool(query, pool, count)
    rng = np.random.default_rng([seed, zlib.crc32(query.id.encode())])
    size = min(len(pool), LARGEST_POOL)
    kept = np.arange(len(pool)) if size == len(pool) else np.random.default_rng(seed).permutation(len(pool))[:size]
    return [int(place) for place in kept[rng.permutation(size)[:count]][::-1]]


def most_similar(query: Shot, pool: Sequence[Shot], count: int, embeddings: Mapping[tuple[str, str], Any]) -> list[int]:
    """Places of the `count` demonstrations whose pictures are most like the query's, the most similar last; of equal
    ones the earlier counts as more similar.

    Args:
      embeddings: file -> (e,) of length 1.

    Raises:
      UserError: the pool is smaller.
    """
    _check_pool(query, pool, count)
    own = np.asarray(embeddings[query.file], np.float64)
    likeness = np.array([np.asarray(embeddings[shot.file], np.float64) @ own for shot in pool])
    return [int(place) for place in np.argsort(-likeness, kind="stable")[:count][::-1]]


def _check_pool(query: Shot, pool: Sequence[Shot], count: int) -> None:
    if count > len(pool):
        raise UserError(
            f"query {query.id!r}: {count} demonstrations are asked for, its pool {query.pool!r} has {len(pool)}; "
            "ask for fewer shots"
        )


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A query with its demonstrations.

    Attributes:
      text: with a tag for each picture.
      files: of its pictures, in order.
      ids: (s,) int32; times: (s,) int32, which picture each position sees.
    """

    text: str
    files: tuple[tuple[str, str], ...]
    ids: np.ndarray
    times: np.ndarray


def make_prompt(
    query: Shot, demonstrations: Sequence[Shot], shots: int, context: DocumentContext, separator: str
) -> Prompt:
    """The prompt of a query.

    Args:
      demonstrations: in the order shown; without shots they are shown as text alone.
      separator: behind each.
    """
    shown = [one.prompt(one.answer) for one in demonstrations]
    text = few_shot_prompt(shown, query.prompt(), pictures=shots > 0, separator=separator)
    files = tuple(one.file for one in (*(demonstrations if shots else ()), query))
    ids = np.asarray(encode_tagged(text, context), np.int32)
    times = picture_times(ids == context.tag, next_picture=False)
    if times[-1] != len(files):
        raise UserError(
            f"query {query.id!r}: {times[-1]} tags but {len(files)} pictures; questions and answers must not hold tags"
        )
    return Prompt(text, files, ids, times)


def read_pictures(files: Sequence[tuple[str, str]], root: str | Path, context: DocumentContext, frames: int) -> Any:
    """Pictures, or clips of `frames`, of several files: (t f S S 3) uint8. Raises UserError for a file that is missing
    or damaged.
    """
    pictures = []
    for kind, name in files:
        path = Path(root) / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        pictures.append(media_frames(Media(kind, str(path), data), context.image, frames))
    return np.stack(pictures)
