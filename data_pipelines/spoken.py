"""Written questions of a records file -> spoken ones, and sounds that are not meant for the model.

Stage 2.2 is trained on questions about half of which are spoken, and on sounds that must not be answered (VITA-1.5,
arXiv 2501.01957, section 3.3, and the released `data_utils_video_audio_neg_patch.py`). OUTPUT gets

    records.json    all records; spoken questions are "<audio>", files have their folder keys in `set`
    roots.json      the folder table for them, with the places of the files they had before
    media/*.wav     16 kHz, mono, 16 bit
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.records import Progress
from data_pipelines.speech.clips import SPEECH, Clip, render_all
from data_pipelines.speech.noises import BABBLE_VOICES, SYNTHETIC_KINDS
from data_pipelines.speech.voices import draw_delivery, training_voices
from vita_jax.data.records import PLACEHOLDERS, RecordError, check_record, read_json_records
from vita_jax.data.spoken_words import language_of
from vita_jax.errors import UserError

RECORDS, ROOTS, MEDIA = "records.json", "roots.json", "media"
FILES, SPOKEN = "files", "spoken"  # folder keys of what records without a set had, and of what is spoken
LONGEST = 300  # characters of a question that is spoken; longer ones are read, not asked
MARKS = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
# Letters that the voices can say, and any letter.
SAYABLE, LETTER = re.compile(r"[A-Za-z0-9\u00c0-\u024f\u3400-\u9fff]"), re.compile(r"[^\W\d_]")
AUGMENTED_SHARE = 0.15
NEGATIVE_SECONDS = (0.6, 3.0)
STATEMENT_SHARE = 0.5  # of the negatives, where there are statements; others are babble, second speakers, noises
SPEECH_NEGATIVES = (SPEECH, SPEECH, "babble", "second_speaker")


@dataclass(frozen=True)
class SpeakOptions:
    """What becomes of a records file.

    Attributes:
      fraction: of the questions that can be spoken, drawn question by question.
      negatives: records of sounds that are not for the model, for each record there is.
      refusal: the answer of these records.
      statements: what is said in some of them that is not addressed to the model; none = only sounds without words.
      seed: of everything drawn.
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


def speak_records(
    json_path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    options: SpeakOptions,
    *,
    folders: Mapping[str, str] | None = None,
    processes: int = 2,
    progress: Progress = lambda line: None,
) -> dict[str, int]:
    """Writes the folder described at the top of this file.

    Args:
      json_path, root, folders: the records, as in `data_pipelines.records.build_records`.
      output: a new folder.
      options: what to speak.
      processes: that speak at the same time; the result does not depend on it.
      progress: called with a short line now and then.

    Returns:
      Counts: "questions", those "spoken", those that stay written because they are "too long" or "cannot be said",
      records "already with audio", "negatives", and records that are "unusable" and left as they are, so that the
      build of the result names them.

    Raises:
      UserError: unreadable records, an output that exists, folder keys that are used here, no synthesiser.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"output {output} exists; give a new folder")
    for key in (FILES, SPOKEN):
        if folders and key in folders:
            raise UserError(f"the folder table has a key {key!r}, which is used for the result; rename it")
    entries = read_json_records(json_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.new-", dir=output.parent))
    try:
        (temporary / MEDIA).mkdir()
        plan = _Plan(temporary, options, temporary if root is None else Path(root))
        records = [plan.speak(entry, index) for index, entry in enumerate(entries)]
        records += [plan.negative(index) for index in range(round(options.negatives * len(entries)))]
        if plan.clips:
            render_all(plan.clips, progress, processes=processes)
        table = {key: str(Path(place).resolve()) for key, place in (folders or {}).items()} | {SPOKEN: MEDIA}
        if root is not None:
            table[FILES] = str(Path(root).resolve())
        for name, content in ((RECORDS, records), (ROOTS, table)):
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dict(plan.counts)


class _Plan:
    """The recordings to make, while the records are rewritten one by one."""

    def __init__(self, folder: Path, options: SpeakOptions, root: Path) -> None:
        self._folder, self._options, self._root = folder, options, root
        self.clips: list[Clip] = []
        self.counts = Counter[str](questions=0, spoken=0)

    def speak(self, entry: Any, index: int) -> Any:
        """A record with some of its questions spoken; drawn from its place in the file alone."""
        try:
            checked = check_record(entry, self._root, where="records", index=index)
        except RecordError:
            self.counts["unusable"] += 1
            return entry
        if "audio" in entry and entry["audio"]:
            self.counts["already with audio"] += 1
            return entry | self._keys(entry, checked.record.set, len(checked.files), 0)
        rng = np.random.default_rng([self._options.seed, 0, index])
        turns, names = [], []
        for turn in entry["conversations"]:
            aloud = self._aloud(turn, rng) if turn["from"] == "human" else None
            if aloud is None:
                turns.append(turn)
                continue
            names.append(self._clip(SPEECH, [aloud], rng))
            marks = "".join(f"{mark}\n" for mark in MARKS.findall(turn["value"]))
            turns.append({"from": "human", "value": marks + PLACEHOLDERS["audio"]})
        record = entry | self._keys(entry, checked.record.set, len(checked.files), len(names))
        return record | {"conversations": turns} | ({"audio": names} if names else {})

    def _aloud(self, turn: Mapping[str, str], rng: np.random.Generator) -> str | None:
        """What is said in place of a question; None if it stays written."""
        text = " ".join(MARKS.sub(" ", turn["value"]).split())
        self.counts["questions"] += 1
        drawn = rng.random() < self._options.fraction
        if not SAYABLE.search(text) or any(not SAYABLE.match(letter) for letter in LETTER.findall(text)):
            self.counts["cannot be said"] += 1
            return None
        if len(text) > LONGEST:
            self.counts["too long"] += 1
            return None
        self.counts["spoken"] += drawn
        return text if drawn else None

    def _keys(self, entry: Mapping[str, Any], sets: Sequence[str], files: int, spoken: int) -> dict[str, Any]:
        """`set` with a key for every file: those before, then what is spoken."""
        keys = list(sets) if len(sets) == files else [sets[0] if sets else FILES] * files
        keys += [SPOKEN] * spoken
        return {"set": keys} if keys else {}

    def _clip(self, kind: str, texts: Sequence[str], rng: np.random.Generator, seconds: float = 0.0) -> str:
        """Plans a recording by voices of training; returns its name below the media folder."""
        name = f"{len(self.clips):07d}.wav"
        parts = tuple((text, draw_delivery(training_voices(language_of(text)), rng)) for text in texts)
        augmented = kind == SPEECH and bool(rng.random() < AUGMENTED_SHARE)
        background = str(rng.choice(SYNTHETIC_KINDS)) if augmented and rng.random() < 0.5 else None
        seed = (self._options.seed, 1, len(self.clips))
        path = str(self._folder / MEDIA / name)
        self.clips.append(Clip(path, seed, kind, parts, seconds=seconds, augmented=augmented, background=background))
        return name

    def negative(self, index: int) -> dict[str, Any]:
        """A record of a sound that is not for the model."""
        rng = np.random.default_rng([self._options.seed, 2, index])
        statements = self._options.statements
        kind, texts = str(rng.choice(SYNTHETIC_KINDS)), []
        if statements and rng.random() < STATEMENT_SHARE:
            kind = str(rng.choice(SPEECH_NEGATIVES))
            voices = {SPEECH: 1, "second_speaker": 2, "babble": int(rng.integers(*BABBLE_VOICES))}[kind]
            texts = [statements[i] for i in rng.integers(len(statements), size=voices)]
        self.counts["negatives"] += 1
        name = self._clip(kind, texts, rng, float(rng.uniform(*NEGATIVE_SECONDS)))
        turns = [
            {"from": "human", "value": PLACEHOLDERS["audio"]},
            {"from": "gpt", "value": self._options.refusal},
        ]
        return {"id": f"negative-{index}", "set": SPOKEN, "audio": name, "conversations": turns, "inserted_id": 1}
