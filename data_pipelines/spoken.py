"""Written questions of a records file -> spoken ones, and sounds that are not meant for the model.

Stage 2.2 is trained on questions about half of which are spoken, and on sounds that must not be answered (VITA-1.5,
arXiv 2501.01957, section 3.3, and the released `data_utils_video_audio_neg_patch.py`). OUTPUT gets

    records.json    all records; spoken questions are "<audio>", files have their folder keys in `set`
    roots.json      the folder table for them, with the places of the files they had before
    media/*.wav     16 kHz, mono, 16 bit
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from data_pipelines.parts import (
    LOCAL,
    Progress,
    Report,
    Runner,
    deal_out,
    forget_work,
    read_part,
    replace_folder,
    run_parts,
    shown_counts,
    work_folder,
)
from data_pipelines.rejects import check_output
from data_pipelines.sources import RecordsFile
from data_pipelines.speech.clips import SPEECH, Clip, render
from data_pipelines.speech.noises import BABBLE_VOICES, SYNTHETIC_KINDS
from data_pipelines.speech.synthesizer import SpeechSynthesizer, Synthesizer
from data_pipelines.speech.voices import draw_delivery, training_voices
from vita_jax.data.records import PLACEHOLDERS, CheckedRecord, RecordError
from vita_jax.data.spoken_words import language_of
from vita_jax.errors import UserError

RECORDS, ROOTS, MEDIA = "records.json", "roots.json", "media"
FILES, SPOKEN = "files", "spoken"  # folder keys of what records without a set had, and of what is spoken
PART_RECORDS = 200
MOST_CHARACTERS = 300  # of what is spoken; longer questions are read, not asked
MARKS = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
EDGES = re.compile(rf"^(?:\s|{MARKS.pattern})+|(?:\s|{MARKS.pattern})+$")
# Letters that the voices can say, and any letter.
SAYABLE, LETTER = re.compile(r"[A-Za-z0-9\u00c0-\u024f\u3400-\u9fff]"), re.compile(r"[^\W\d_]")
AUGMENTED_SHARE = 0.15
NEGATIVE_SECONDS = (0.6, 3.0)
# Of the negatives, where there are statements; the others are noises.
SPEECH_NEGATIVES = {SPEECH: 0.5, "second_speaker": 0.12, "babble": 0.13}


@dataclass(frozen=True)
class SpeakOptions:
    """What becomes of a records file.

    Attributes:
      fraction: of the questions that can be spoken, drawn question by question.
      negatives: records of sounds that are not for the model, for each record there is.
      refusal: the answer of these records.
      statements: what is said in three quarters of them that is not addressed to the model, by one voice, by two or by
        many at once; none = only noises.
      seed: of everything drawn; not negative.
    """

    fraction: float = 0.5
    negatives: float = 0.0
    refusal: str = ""
    statements: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise UserError(f"fraction is {self.fraction}; it must be between 0 and 1")
        if not 0 <= self.negatives <= 10:
            raise UserError(f"negatives is {self.negatives}; it must be between 0 and 10, for each record")
        if self.negatives and not self.refusal.strip():
            raise UserError("negatives need a refusal: the answer that sounds not meant for the model get")
        if MARKS.search(self.refusal):
            raise UserError(f"refusal {self.refusal!r} holds a placeholder; only questions may")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")
        for statement in self.statements:
            if not _can_be_said(statement) or len(statement) > MOST_CHARACTERS:
                raise UserError(
                    f"the statement {statement[:80]!r} cannot be said; give English or Chinese, at most "
                    f"{MOST_CHARACTERS} characters"
                )


def _can_be_said(text: str) -> bool:
    """Whether there are voices for all of its letters, and something to say."""
    return bool(SAYABLE.search(text)) and all(SAYABLE.match(letter) for letter in LETTER.findall(text))


@dataclass(frozen=True)
class SpeakBuilder:
    """The work of one part: its records are rewritten, and what is spoken in them is recorded below `media`."""

    source: RecordsFile
    options: SpeakOptions
    media: str
    synthesizer: Callable[[], SpeechSynthesizer]

    def __call__(self, part: Path, report: Report) -> dict[str, Any]:
        """The records, their counts, and what is wrong with the first of those that cannot be used."""
        plan, records, voice = _Plan(Path(self.media), self.options, self.source), [], None
        for place, entry in read_part(part):
            found = entry.get("found")
            records.append(plan.negative(entry["negative"]) if found is None else plan.speak(found, place))
            if plan.clips:
                voice = voice or self.synthesizer()
                with threadpool_limits(1):  # matrices are small, and other parts may be worked on beside
                    for clip in plan.clips:
                        render(clip, voice)
                plan.clips.clear()
            report.show(done=len(records), rejected=plan.counts["unusable"])
        error = str(plan.first_error) if plan.first_error else None
        return {"records": records, "counts": dict(plan.counts), "error": error}


def speak_records(
    source: RecordsFile,
    output: str | os.PathLike[str],
    options: SpeakOptions,
    *,
    synthesizer: Callable[[], SpeechSynthesizer] = Synthesizer,
    runner: Runner = LOCAL,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes the folder described at the top of this file.

    Args:
      source: of the records.
      output: folder to make; an earlier result in it is replaced, anything else is refused.
      options: what to speak.
      synthesizer: what makes the voice; called where a part is worked on.
      runner: who does the work; the result does not depend on it.
      progress: called with a short line now and then.

    Returns:
      Counts: "questions", those "spoken", those that stay written because they are "too long", "cannot be said" or have
      "placeholders within", records "already with audio", "negatives", and records that are "unusable" and left as
      they are, so that the build of the result names them.

    Raises:
      UserError: unreadable records, none that can be used, a root that is no folder, a refused output, folder keys that
        are used here, no synthesiser.
    """
    output = Path(output).absolute()
    check_output(output, (RECORDS, ROOTS))
    source.check()
    for key in (FILES, SPOKEN):
        if source.folders and key in source.folders:
            raise UserError(f"the folder table has a key {key!r}, which is used for the result; rename it")
    inputs = [source.sha256(), source.options(), str(source.root), dataclasses.astuple(options), _name_of(synthesizer)]
    output.parent.mkdir(parents=True, exist_ok=True)
    work = work_folder(output, hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest())
    new = work / "output"
    (new / MEDIA).mkdir(parents=True, exist_ok=True)
    total = deal_out(_entries(source, options), work, lambda place: place // PART_RECORDS)
    builder = SpeakBuilder(source, options, str(new / MEDIA), synthesizer)
    results = run_parts(work, builder, runner, shown_counts(f"records of {source.name}", total, progress))
    counts = Counter[str](questions=0, spoken=0)
    for result in results:
        counts.update(result["counts"])
    if counts["unusable"] + counts["negatives"] == total:
        forget_work(output)
        first = next((result["error"] for result in results if result["error"]), "there are none")
        raise UserError(f"{source.path}: no record can be used; the first: {first}")
    table = {key: str(Path(place).resolve()) for key, place in (source.folders or {}).items()} | {SPOKEN: MEDIA}
    if source.root is not None:
        table[FILES] = str(Path(source.root).resolve())
    records = [record for result in results for record in result["records"]]
    for name, content in ((RECORDS, records), (ROOTS, table)):
        (new / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    replace_folder(new, output)
    forget_work(output)
    return dict(counts)


def _name_of(synthesizer: Callable[[], SpeechSynthesizer]) -> str:
    """The same in every process, which the `repr` of a class or function need not be."""
    return f"{synthesizer.__module__}:{getattr(synthesizer, '__qualname__', repr(synthesizer))}"


def _entries(source: RecordsFile, options: SpeakOptions) -> Iterator[dict[str, Any]]:
    """The records, then a number for each sound that is not for the model."""
    number = 0
    for found in source.entries():
        number += 1
        yield {"found": found}
    for index in range(round(options.negatives * number)):
        yield {"negative": index}


class _Plan:
    """The recordings to make below the folder `media`, while the records are rewritten one by one."""

    def __init__(self, media: Path, options: SpeakOptions, source: RecordsFile) -> None:
        self._media, self._options, self._source = media, options, source
        self.clips: list[Clip] = []
        self.counts = Counter[str]()
        self.first_error: RecordError | None = None

    def speak(self, found: dict[str, Any], index: int) -> Any:
        """The record of an entry with some of its questions spoken; a function of it and its place in the file."""
        try:
            checked = self._source.checked(found, index)
        except RecordError as error:
            self.counts["unusable"] += 1
            self.first_error = self.first_error or error
            return found.get("record", found)
        entry = self._source.public(found, index)
        if entry.get("audio"):
            self.counts["already with audio"] += 1
            return entry | self._keys(checked, 0)
        turns, names = [], []
        for number, turn in enumerate(entry["conversations"]):
            drawn = (0, index, number)
            aloud = self._aloud(turn["value"], drawn) if turn["from"] == "human" else None
            if aloud is None:
                turns.append(turn)
                continue
            names.append(self._clip(f"{index}-{number}", SPEECH, [aloud], drawn))
            marks = "".join(f"{mark}\n" for mark in MARKS.findall(turn["value"]))
            turns.append({"from": "human", "value": marks + PLACEHOLDERS["audio"]})
        record = entry | self._keys(checked, len(names))
        return record | {"conversations": turns} | ({"audio": names} if names else {})

    def _aloud(self, question: str, drawn: tuple[int, ...]) -> str | None:
        """What is said in place of a question; None if it stays written."""
        self.counts["questions"] += 1
        words = EDGES.sub("", question)
        text = " ".join(words.split())
        reasons = (
            ("placeholders within", bool(MARKS.search(words))),
            ("cannot be said", not _can_be_said(text)),
            ("too long", len(text) > MOST_CHARACTERS),
        )
        reason = next((name for name, holds in reasons if holds), None)
        if reason is not None:
            self.counts[reason] += 1
            return None
        chosen = bool(np.random.default_rng((self._options.seed, *drawn)).random() < self._options.fraction)
        self.counts["spoken"] += chosen
        return text if chosen else None

    def _keys(self, checked: CheckedRecord, spoken: int) -> dict[str, Any]:
        """`set` with a key for every file: those before, then what is spoken."""
        keyed = self._source.folders is not None  # without a table, a record's own keys name nothing
        keys = [file.set if keyed and file.set is not None else FILES for file in checked.files]
        keys += [SPOKEN] * spoken
        return {"set": keys} if keys else {}

    def _clip(self, name: str, kind: str, texts: Sequence[str], drawn: tuple[int, ...]) -> str:
        """Plans a recording by voices of training; returns its name below the media folder."""
        rng = np.random.default_rng((self._options.seed, *drawn, 1))
        parts = tuple((text, draw_delivery(training_voices(language_of(text)), rng)) for text in texts)
        augmented = kind == SPEECH and bool(rng.random() < AUGMENTED_SHARE)
        background = str(rng.choice(SYNTHETIC_KINDS)) if augmented and rng.random() < 0.5 else None
        seconds = float(rng.uniform(*NEGATIVE_SECONDS))  # of babble and noises
        path, seed = str(self._media / f"{name}.wav"), (self._options.seed, *drawn, 2)
        self.clips.append(Clip(path, seed, kind, parts, seconds, augmented=augmented, background=background))
        return f"{name}.wav"

    def negative(self, index: int) -> dict[str, Any]:
        """A record of a sound that is not for the model."""
        drawn = (1, index)
        rng = np.random.default_rng((self._options.seed, *drawn))
        statements = self._options.statements
        shares = SPEECH_NEGATIVES if statements else {}
        noise = (1 - sum(shares.values())) / len(SYNTHETIC_KINDS)
        kinds = shares | dict.fromkeys(SYNTHETIC_KINDS, noise)
        kind = str(rng.choice(list(kinds), p=list(kinds.values())))
        voices = {SPEECH: 1, "second_speaker": 2, "babble": int(rng.integers(*BABBLE_VOICES))}.get(kind, 0)
        texts = [statements[i] for i in rng.integers(len(statements), size=voices)] if voices else []
        self.counts["negatives"] += 1
        name = self._clip(f"negative-{index}", kind, texts, drawn)
        turns = [{"from": "human", "value": PLACEHOLDERS["audio"]}, {"from": "gpt", "value": self._options.refusal}]
        return {"id": f"negative-{index}", "set": SPOKEN, "audio": name, "conversations": turns, "inserted_id": 1}
