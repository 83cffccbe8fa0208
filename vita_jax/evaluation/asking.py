"""Asks a model a list of questions; every answer is kept as a line at once, so that a stopped run goes on where it was.

A line is an answer line (`answer_lines`) with "state", where the answer began with a symbol, and "asked", a number that
stands for everything that the answer depends on. A line of an earlier run is taken where that is the same. These lines
have a file of their own beside that of the result, which has the questions of one call only.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vita_jax.data.json_lines import drop_cut_line
from vita_jax.data.prompts import split_state_symbol
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import ID, Question, answer_line, objects
from vita_jax.evaluation.answering import Progress, answer_items, on_mesh
from vita_jax.evaluation.subject import Subject
from vita_jax.inference.sampling import GREEDY, Sampler

Line = dict[str, Any]

# Questions between two writes of lines; batches are made within.
AT_ONCE = 256


@dataclass(frozen=True)
class AskOptions:
    """How questions are asked.

    Attributes:
      max_new_tokens: the longest answer.
      sampler, seed: how tokens are chosen.
      cache_dtype: of keys and values, see `generate`.
      identity: what else an answer depends on: the model, see `opening.identity`.
    """

    max_new_tokens: int = 256
    sampler: Sampler = GREEDY
    seed: int = 0
    cache_dtype: jnp.dtype | None = None
    identity: str = ""


def answers_file(stem: Path) -> Path:
    """Where answers are kept as they are made, for the result STEM.json or STEM.jsonl."""
    return stem.with_name(stem.name + ".answers.jsonl")


def check_answers(file: Path, model_name: str) -> None:
    """Raises UserError if a file that answers would be written over has something else, or those of another model."""
    if file.is_file() and file.stat().st_size:
        for where, line in objects(file):
            _check_line(where, line, model_name)


def _check_line(where: str, line: Line, model_name: str) -> None:
    if "model_id" not in line or ID not in line:
        raise UserError(f"{where}: is no answer to a question; choose another file")
    if line["model_id"] != model_name:
        raise UserError(
            f"{where}: is an answer of {line['model_id']}, not of {model_name}; choose another file or delete this one"
        )


class KeptAnswers:
    """A file of answer lines that grows while questions are asked."""

    def __init__(self, file: str | os.PathLike[str], model_name: str) -> None:
        """
        Args:
          file: that of an earlier run, or none yet; a line that was being written when that ended is dropped.
          model_name: whose answers they are, "model_id" of the lines.

        Raises:
          UserError: the file holds something else, or the answers of another model.
        """
        self.file, self.model_name = Path(file), model_name
        self._lines: dict[int | str, Line] = {}
        for where, line in objects(file) if drop_cut_line(file) else ():
            _check_line(where, line, model_name)
            self._lines[line[ID]] = line

    def find(self, name: int | str, mark: str) -> Line | None:
        """The line of a question that was asked the same; None if there is none."""
        line = self._lines.get(name)
        return line if line is not None and line.get("asked") == mark else None

    def add(self, lines: Sequence[Line]) -> None:
        """Writes lines behind the others, and leaves them on the disk. Raises UserError if that cannot be done."""
        self._lines |= {line[ID]: line for line in lines}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {error.strerror}; choose another file") from error


def ask_questions(
    subject: Subject,
    questions: Sequence[Question],
    root: str | os.PathLike[str],
    kept: KeptAnswers,
    options: AskOptions = AskOptions(),  # noqa: B008 (frozen)
    progress: Progress | None = None,
) -> list[Line]:
    """The lines of all questions, in their order; those that are kept already are not asked again.

    Args:
      subject: who is asked.
      root: the folder that the files of questions start from.
      kept: gets the lines as they are made.
      progress: called with (answered, total), first with those of an earlier run.

    Raises:
      UserError: a file of a question is missing, damaged, or of a kind that the model does not take; or the lines
        cannot be written.
    """
    check_files(questions, Path(root))
    marks = {question.id: _mark(question, Path(root), options) for question in questions}
    known = {question.id: kept.find(question.id, marks[question.id]) for question in questions}
    left = [question for question in questions if known[question.id] is None]
    if progress is not None:
        progress(len(questions) - len(left), len(questions))
    for start in range(0, len(left), AT_ONCE):
        part, before = left[start : start + AT_ONCE], len(questions) - len(left) + start
        shown = None if progress is None else _from(progress, before, len(questions))
        answers = answers_to(subject, part, root, options, shown)
        new = [
            answer_line(
                question, text, kept.model_name, **({"state": state} if state else {}), asked=marks[question.id]
            )
            for question, (state, text) in zip(part, answers, strict=True)
        ]
        kept.add(new)
        known |= {line[ID]: line for line in new}
    return [known[question.id] for question in questions]


def answers_to(
    subject: Subject,
    questions: Sequence[Question],
    root: str | os.PathLike[str],
    options: AskOptions,
    progress: Progress | None = None,
) -> list[tuple[str | None, str]]:
    """(state, text) of the answer to each question; state is None where no symbol was in front."""
    with on_mesh(subject.mesh):
        said = answer_items(
            subject.model,
            subject.params,
            subject.context,
            questions,
            Path(root),
            batch_size=subject.batch_size,
            max_new_tokens=options.max_new_tokens,
            progress=progress,
            cache_dtype=options.cache_dtype,
            sampler=options.sampler,
            # Not the same draws in every part: those of its first question.
            key=None if options.sampler == GREEDY else _key(options.seed, questions),
            mesh=subject.mesh,
        )
    return [split_state_symbol(answer.strip(), subject.context.template) for answer in said]


def _key(seed: int, questions: Sequence[Question]) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(str(questions[0].id).encode()))


def _from(progress: Progress, answered: int, total: int) -> Progress:
    """The progress of a part as one of all."""
    return lambda done, _: progress(answered + done, total)


def check_files(questions: Sequence[Question], root: Path) -> None:
    """Raises UserError for a file of a question that is not there."""
    for question in questions:
        for _, name in question.media:
            if not (root / name).is_file():
                raise UserError(f"question {question.id}: there is no file {root / name}; see --root")


def _mark(question: Question, root: Path, options: AskOptions) -> str:
    """Stands for what an answer depends on."""
    files = [(kind, name, (root / name).stat().st_size) for kind, name in question.media]
    asked = [question.question, files, options.max_new_tokens, str(options.sampler), options.seed]
    asked += [str(options.cache_dtype), options.identity]
    return mark(asked)


def mark(depends_on: Any) -> str:
    """A short text that is another for other JSON values: "asked" of a kept line."""
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
