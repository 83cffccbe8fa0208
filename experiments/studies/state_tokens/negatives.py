"""What the arms of the study are taught not to answer: as many records for each, of other sounds.

FOLDER/raw         the public format: records.json and media
FOLDER/records     the same packed, as training reads it
FOLDER/made.json   what was asked for, and how many sounds of each kind there are; written last
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.quickstart.scans import ScanSplit
from data_pipelines.quickstart.speech_sets import Folder, plan_negatives
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from data_pipelines.speech.clips import SPEECH, render_all
from vita_jax.storage import write_whole

RECORDS, MADE = "records", "made.json"
SEED = 616
TWO_SPEAKERS = "second_speaker"


@dataclass(frozen=True)
class Mix:
    """The negatives of an arm: `title` in tables, and `shares`, kind of sound -> its share, see `plan_negatives`."""

    title: str
    shares: Mapping[str, float]


# Each has what the one before it has, and something more. Hums, coloured noise and clicks are in none.
MIXES = {
    "statements": Mix("statements", {SPEECH: 1.0}),
    "sounds": Mix("+ babble, music", {SPEECH: 0.5, "babble": 0.26, "chords": 0.12, "arpeggio": 0.12}),
    "speakers": Mix("+ two speakers", {SPEECH: 0.4, "babble": 0.2, "chords": 0.1, "arpeggio": 0.1, TWO_SPEAKERS: 0.2}),
}


def build_negatives(
    folder: Path, mix: Mix, count: int, scans: ScanSplit, progress: Callable[[str], None] = print
) -> dict[str, int]:
    """Writes the records, in place of others; does nothing if they are there.

    Args:
      folder: see the top of this file.
      mix: of what.
      count: records.
      scans: for the pictures that some of the sounds come with.
      progress: gets a line now and then.

    Returns:
      Kind -> how many sounds.
    """
    asked = {"shares": dict(mix.shares), "count": count, "seed": SEED}
    made = folder / MADE
    if made.is_file() and (found := json.loads(made.read_text(encoding="utf-8")))["asked"] == asked:
        return found["kinds"]
    shutil.rmtree(folder, ignore_errors=True)
    raw = Folder(folder / "raw", (SEED,))
    plan_negatives(raw, scans, count, mix.shares)
    raw.write(render_all(raw.clips, progress, processes=1))
    build_records(RecordsFile(raw.path / "records.json", raw.path), folder / RECORDS)
    kinds = dict(sorted(Counter(clip.kind for clip in raw.clips).items()))
    write_whole(made, json.dumps({"asked": asked, "kinds": kinds}, indent=1) + "\n")
    return kinds
