"""The quickstart's speech: sets in the public record format, spoken by a synthesiser, and the benchmark made of it.

    DIR/raw/asr/              transcribed sentences: manifest.jsonl, and the same as records.json
    DIR/raw/spoken/           records: pictures with questions, about half of them spoken
    DIR/raw/negatives/        records: sounds that are not meant for the model, with and without a picture
    DIR/raw/speech_out/       texts in the assistant's voice: manifest.jsonl
    DIR/benchmarks/speech/    see `speech_benchmark.py`

Each folder has its WAV files (16 kHz, mono, 16 bit) and pictures in media/; paths in records and manifests are relative
to the folder. A line of a manifest has id, audio, text, kind, language and duration (seconds); those of `speech_out`
also `written` (as the language model writes it), and `question` where the text is an answer to one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.quickstart.scans import ScanSplit
from data_pipelines.quickstart.speech_benchmark import plan_benchmark, write_benchmark
from data_pipelines.quickstart.speech_sets import (
    Folder,
    SpeechCounts,
    plan_asr,
    plan_negatives,
    plan_speech_out,
    plan_spoken,
    turns,
)
from data_pipelines.speech.clips import render_all
from vita_jax.errors import UserError

SPEECH_SETS = ("asr", "spoken", "negatives", "speech_out")
RECORD_SETS = ("asr", "spoken", "negatives")  # those with records, which training reads packed

Progress = Callable[[str], None]


def check_counts(counts: SpeechCounts) -> None:
    """Raises UserError for an amount that is not a positive number."""
    for name, value in dataclasses.asdict(counts).items():
        if type(value) is not int or value < 1:
            raise UserError(f"speech: {name}={value!r} must be a whole number, at least 1")


def build_speech(
    folder: Path, splits: dict[str, ScanSplit], counts: SpeechCounts, seed: int, progress: Progress = print
) -> list[dict[str, Any]]:
    """Writes all sets and the benchmark, in place of those that are there.

    Args:
      folder: where everything goes, see the top of this file.
      splits: of the scans, "train" for the sets and "held_out" for the benchmark.
      counts: how much.
      seed: of everything drawn; the same seed writes the same bytes.
      progress: gets a line now and then.

    Returns:
      The records of all sets, and the texts of `speech_out` as records of one turn, for the tokenizer.

    Raises:
      UserError: an impossible amount, or no synthesiser.
    """
    check_counts(counts)
    sets = {name: Folder(folder / "raw" / name, (seed, 10 + index)) for index, name in enumerate(SPEECH_SETS)}
    plan_asr(sets["asr"], counts.asr)
    plan_spoken(sets["spoken"], splits["train"], counts.spoken, counts.question_clips)
    plan_negatives(sets["negatives"], splits["train"], counts.negatives)
    plan_speech_out(sets["speech_out"], "train", counts.speech_out)
    benchmark = Folder(folder / "benchmarks" / "speech", (seed, 20))
    items = plan_benchmark(benchmark, sets["asr"], splits["held_out"], counts)
    assistant = Folder(benchmark.path / "speech_out", (seed, 21))
    plan_speech_out(assistant, "held_out", counts.benchmark_speech_out)
    everything = [*sets.values(), benchmark, assistant]
    seconds = render_all([clip for part in everything for clip in part.clips], progress, processes=counts.processes)
    for part in everything:
        part.write(seconds)
    write_benchmark(benchmark, items)
    amounts = ", ".join(f"{name} {len(part.clips)}" for name, part in sets.items())
    progress(f"speech: clips of {amounts}; benchmark of {len(items)} items")
    texts = [{"conversations": turns(entry["text"])} for entry in sets["speech_out"].manifest]
    return [record for part in sets.values() for record in part.records] + texts
