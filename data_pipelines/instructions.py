"""Visual instructions by a teacher: what is asked for, what of a reply can be used, and the folder they are put in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.instruction_prompts import (
    CONVERSATION,
    DESCRIBE_IN_DETAIL,
    DESCRIPTION,
    KINDS,
    messages,
)
from data_pipelines.parts import (
    LOCAL,
    Progress,
    Report,
    Runner,
    deal_out,
    forget,
    forget_work,
    read_part,
    replace_folder,
    run_parts,
    shown_counts,
    work_folder,
)
from data_pipelines.pictures import DescribedPicture, described_picture
from data_pipelines.rejects import REJECTS_NAME, beside, check_budget, check_budget_bounds, check_output
from data_pipelines.sources import file_sha256
from vita_jax.data.records import PLACEHOLDERS, RecordError
from vita_jax.data.teacher import ReplyError, Teacher, ask
from vita_jax.errors import UserError

RECORDS, RECIPE = "records.json", "recipe.json"
PART_PICTURES = 32  # at most so many are asked about again after a stop
ROUND = re.compile(r"Question:\s*(.*?)\s*\n===\s*\nAnswer:\s*(.*?)\s*(?:\n===\s*|\Z)", re.DOTALL)
# A teacher that forgot its part, and speaks of what it was given.
SOURCES = re.compile(
    r"\b(?:captions?|bounding box(?:es)?|coordinates|(?:the|these|those) (?:sentences|descriptions?) (?:you|I))\b",
    re.IGNORECASE,
)
MARKS = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))


@dataclass(frozen=True)
class InstructOptions:
    """What is asked for.

    Attributes:
      shares: kind -> share of the pictures that get one, drawn picture by picture.
      requests: at a time, of each part that is worked on.
      seed: of what is drawn.
    """

    shares: Mapping[str, float]
    requests: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shares:
            raise UserError(f"no kind of instruction is asked for; give some of {', '.join(KINDS)}")
        if self.requests < 1:
            raise UserError(f"requests {self.requests} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")


# ---- one reply ------------------------------------------------------------------------------------------------------


def rounds_of(kind: str, reply: str, question: str) -> list[tuple[str, str]]:
    """Questions and answers that a reply holds.

    Args:
      kind: what was asked for.
      reply: the teacher's.
      question: what a description answers.

    Raises:
      ReplyError: another form than was asked for, an empty part, a placeholder, or words about what the teacher was
        given in place of the picture.
    """
    if kind == DESCRIPTION:
        rounds = [(question, reply)]
    else:
        rounds = [(found[1], found[2]) for found in ROUND.finditer(reply)]
        if not rounds or ROUND.sub("", reply).strip():
            raise ReplyError("the reply is not in the form Question / === / Answer / ===")
        if kind != CONVERSATION and len(rounds) > 1:
            raise ReplyError(f"the reply has {len(rounds)} questions; one was asked for")
    for text in (text for pair in rounds for text in pair):
        if not text:
            raise ReplyError("a question or an answer is empty")
        if found := MARKS.search(text):
            raise ReplyError(f"the reply holds the placeholder {found[0]}")
        if found := SOURCES.search(text):
            raise ReplyError(f"the reply speaks of what stands for the picture: {found[0]!r}")
    return rounds


def record_of(picture: DescribedPicture, name: str, rounds: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The record of a picture; its placeholder stands before the first question."""
    turns = []
    for place, (question, answer) in enumerate(rounds):
        mark = f"{PLACEHOLDERS['image']}\n" if place == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": picture.image, "conversations": turns}


# ---- a part ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstructBuilder:
    """The work of one part: the teacher is asked about its pictures."""

    root: str
    teacher: Teacher
    options: InstructOptions

    def __call__(self, part: Path, report: Report) -> dict[str, list[dict[str, Any]]]:
        """Records, and replies or pictures that cannot be used."""
        good, bad = [], []
        with ThreadPoolExecutor(self.options.requests) as pool:
            wanted = [(place, kind, entry) for place, entry in read_part(part) for kind in self._kinds(place)]
            for found in pool.map(lambda one: self._written(*one), wanted):
                (bad if "reason" in found else good).append(found)
                report.show(done=len(good) + len(bad), rejected=len(bad))
        return {"good": good, "bad": bad}

    def _kinds(self, place: int) -> list[str]:
        """What this picture gets; it depends on nothing but its place."""
        draws = np.random.default_rng((self.options.seed, 0, place)).random(len(KINDS))
        return [kind for kind, draw in zip(KINDS, draws, strict=True) if draw < self.options.shares.get(kind, 0.0)]

    def _written(self, place: int, kind: str, entry: dict[str, Any]) -> dict[str, Any]:
        where = f"picture {place}"
        try:
            if "error" in entry:
                raise RecordError(where, "", entry["error"])
            picture = described_picture(entry["picture"], where)
            if not (Path(self.root) / picture.image).is_file():
                raise RecordError(where, "image", f"{Path(self.root) / picture.image} does not exist", "missing media")
            drawn = np.random.default_rng((self.options.seed, 1, place)).integers(len(DESCRIBE_IN_DETAIL))
            rounds = rounds_of(kind, ask(self.teacher, messages(kind, picture)), DESCRIBE_IN_DETAIL[drawn])
        except RecordError as error:
            return {"place": place, "kind": kind, "category": error.category, "reason": str(error)}
        except ReplyError as error:
            return {"place": place, "kind": kind, "category": "reply", "reason": f"{where}, {kind}: {error}"}
        return {"kind": kind, "record": record_of(picture, f"{place}-{kind}", rounds)}


# ---- all of them ----------------------------------------------------------------------------------------------------


def write_instructions(
    pictures: Iterable[dict[str, Any]],
    files: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    teacher: Teacher,
    options: InstructOptions,
    *,
    max_bad_fraction: float = 0.01,
    runner: Runner = LOCAL,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes the folder described at the top of `data_pipelines.instruct`.

    Args:
      pictures: {"picture": see `pictures.described_picture`} or {"error": reason}.
      files: where they come from; other bytes in them make another work.
      root: folder of the pictures, which have to be there.
      output: folder to make; an earlier result in it is replaced, anything else is refused.
      teacher: who is asked.
      options: for what.
      max_bad_fraction: of the requests; more whose reply cannot be used are an error.
      runner: who does the work.
      progress: called with a short line now and then.

    Returns:
      Counts of "pictures", of records of each kind, and "rejected".

    Raises:
      UserError: no folder of pictures, a refused output, a teacher that cannot be asked (what it has written is kept
        for the same command), too many rejects (all of them are then in OUTPUT.rejects.jsonl).
    """
    check_budget_bounds(max_bad_fraction)
    output = Path(output).absolute()
    check_output(output, (RECORDS, RECIPE))
    if not Path(root).is_dir():
        raise UserError(f"root {os.fspath(root)} is not a folder; it is where the paths of the pictures start")
    asked = {"teacher": dataclasses.asdict(teacher), "kinds": dict(options.shares), "seed": options.seed}
    try:
        digests = [file_sha256(Path(file)) for file in files]
    except OSError as error:
        raise UserError(f"pictures file {error.filename} cannot be read: {error.strerror}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    inputs = json.dumps([digests, str(Path(root).resolve()), asked])
    work = work_folder(output, hashlib.sha256(inputs.encode()).hexdigest())
    total = deal_out(pictures, work, lambda place: place // PART_PICTURES)
    builder = InstructBuilder(str(root), teacher, options)
    expected = round(total * sum(options.shares.values()))
    results = run_parts(work, builder, runner, shown_counts("instructions, about,", expected, progress))
    good, bad = ([entry for result in results for entry in result[kind]] for kind in ("good", "bad"))
    new = work / "output"
    new.mkdir(exist_ok=True)
    lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in bad)
    (new / REJECTS_NAME).write_text(lines, encoding="utf-8")
    try:
        first = bad[0]["reason"] if bad else ""
        source, number = ", ".join(map(os.fspath, files)), len(good) + len(bad)
        check_budget(source, "instructions", len(bad), number, max_bad_fraction, beside(output), first)
    except UserError:
        shutil.copyfile(new / REJECTS_NAME, beside(output))
        forget(work, lambda result: bool(result["bad"]))  # another reply may be better
        raise
    records = [entry["record"] for entry in good]
    counts = Counter(entry["kind"] for entry in good)
    numbers = {"pictures": total} | {kind: counts[kind] for kind in options.shares} | {"rejected": len(bad)}
    for name, content in ((RECORDS, records), (RECIPE, asked | {"sources": digests, "counts": numbers})):
        (new / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    replace_folder(new, output)
    forget_work(output)
    beside(output).unlink(missing_ok=True)
    return numbers
