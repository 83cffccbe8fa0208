"""The texts of the study of vocabularies: the quickstart's written scenes and sentences, every record in one language.

DIR/english, DIR/chinese              ArrayRecord files to train on
DIR/held_out_english, .._chinese      other scenes, and sentences that training never has
DIR/benchmarks/quickstart             questions about written scenes in both languages
DIR/tokenizer_text.txt                English, which the first tokenizer is learnt from
DIR/lines_english.txt, .._chinese     the training texts line by line, for `vita_jax.enlarge_vocabulary`
DIR/texts.json                        what was asked for, and characters of every set
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.quickstart.build import (
    SENTENCES_EVERY,
    build_benchmark,
    sentences_record,
    text_record,
    tokenizer_texts,
)
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile

LANGUAGES = {"english": "en", "chinese": "zh"}
HELD_OUT = "held_out_"
DONE = "texts.json"
# Groups of the benchmark that have pictures.
UNASKED = {"typed": 0, "typed_unseen_writers": 0, "video_order": 0}


def draw_records(count: int, language: str, held_out: bool, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Records of one language, one in `SENTENCES_EVERY` with sentences.

    Sentences that are held out are others by what they say; scenes are drawn anew, and there are so many of them that
    hardly one comes again.
    """
    split = "held_out" if held_out else "train"
    return [
        sentences_record(index, rng, (language,), split)
        if index % SENTENCES_EVERY == SENTENCES_EVERY - 1
        else text_record(index, rng, (language,))
        for index in range(count)
    ]


def turns_of(records: list[dict[str, Any]]) -> Iterator[str]:
    """What is said in the records, turn by turn."""
    return (turn["value"] for record in records for turn in record["conversations"])


def build_texts(folder: Path, counts: Mapping[str, int], seed: int) -> None:
    """Builds everything; does nothing if it is there for the same numbers.

    Args:
      folder: where.
      counts: "records" and "held_out" of each language, "questions" of each kind of the benchmark.
      seed: of what is drawn.
    """
    wanted, done = {"counts": dict(counts), "seed": seed}, folder / DONE
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["wanted"] == wanted:
        return
    characters = {}
    for number, (name, language) in enumerate(LANGUAGES.items()):
        for held_out in (False, True):
            records = draw_records(
                counts["held_out" if held_out else "records"],
                language,
                held_out,
                np.random.default_rng([seed, number, held_out]),
            )
            part = HELD_OUT * held_out + name
            raw = folder / "raw" / part
            raw.mkdir(parents=True, exist_ok=True)
            (raw / "records.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
            manifest = build_records(RecordsFile(raw / "records.json", raw), folder / part)
            characters[part] = {"records": len(records), "characters": sum(map(len, turns_of(records)))}
            print(f"data: {part}: {manifest.counts}", flush=True)
            if not held_out:
                lines = "".join(f"{turn}\n" for turn in turns_of(records))
                (folder / f"lines_{name}.txt").write_text(lines, encoding="utf-8")
            if language == "en" and not held_out:
                texts = "\n".join(json.dumps(text, ensure_ascii=False) for text in tokenizer_texts(records))
                (folder / "tokenizer_text.txt").write_text(texts, encoding="utf-8")
    asked = {**UNASKED, "text_only": counts["questions"]}
    build_benchmark(folder / "benchmarks" / "quickstart", {}, asked, seed)
    done.write_text(json.dumps({"wanted": wanted, "sets": characters}), encoding="utf-8")


def held_out_turns(folder: Path, name: str) -> list[str]:
    """The turns of a language that are held out."""
    records = json.loads((folder / "raw" / f"{HELD_OUT}{name}" / "records.json").read_text(encoding="utf-8"))
    return list(turns_of(records))


def characters_of(folder: Path, name: str) -> dict[str, int]:
    """{"records", "characters"} of a set."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))["sets"][name]
