"""Builds everything the quickstart trains on and is measured with, from scikit-learn's digit scans and a synthesiser.

Writes the public record format (JSON, PNG, MP4), as a user's own data would come, and takes the same way on from there:
`data_pipelines.records` checks it and packs it into ArrayRecord files.

    DIR/raw/<set>/records.json, media     the public format
    DIR/<set>/                            ArrayRecord files: text, cells, captions, questions
    DIR/benchmarks/quickstart/            held-out questions: items.jsonl and media
    DIR/tokenizer_text.txt                what the tokenizer is trained on

With speech there are also the sets and the benchmark of `speech.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.quickstart.clips import clip_transcript, draw_clip, sample_clip
from data_pipelines.quickstart.questions import KINDS, LANGUAGES, Question, ask
from data_pipelines.quickstart.scans import ScanSplit, load_scan_splits
from data_pipelines.quickstart.scenes import (
    BLANK,
    CELLS_PER_TILE_SIDE,
    INKS,
    MAX_DIGITS,
    OVERVIEW,
    PAPERS,
    Scene,
    cell_names,
    draw_sheet,
    sample_scene,
    transcript,
)
from data_pipelines.quickstart.sentences import TRANSCRIBE, Split, draw_sentence, draw_words
from data_pipelines.quickstart.speech import RECORD_SETS, build_speech
from data_pipelines.quickstart.speech_sets import SpeechCounts
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from vita_jax.data.ctc_vocabulary import split_words
from vita_jax.data.video import write_video

SETS = ("text", "cells", "captions", "questions")
# Rounds of one record: the more questions share a scene, the less it costs to look at it.
TEXT_ROUNDS = 4
# With speech, one text in so many has sentences to be written down, as clips later have them spoken.
SENTENCES_EVERY = 6
LONGEST_GAP = 3  # frames of 80 ms between two words
PICTURE_ROUNDS = 4
CLIP_ROUNDS = 4
# What training asks about a sheet. Both colours, and the hard kinds twice.
QUESTION_MIX = ("count", "kth", "kth", "largest", "sum", "sum", "read", "ink", "paper")
CLIP_FPS = 4
DONE = "quickstart_data.json"

Progress = Callable[[str], None]


def _conversation(questions: list[Question], first_prefix: str) -> list[dict[str, str]]:
    turns = []
    for index, question in enumerate(questions):
        turns.append({"from": "human", "value": (first_prefix if index == 0 else "") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def _language(rng: np.random.Generator, languages: Sequence[str] = LANGUAGES) -> str:
    return str(rng.choice(languages))


def written_scene(scene: Scene, language: str, cells: str | None = None) -> str:
    """A sheet in words: ink and paper, then what stands in its cells (default: the sheet's own)."""
    name = LANGUAGES.index(language)
    cells = transcript(scene) if cells is None else cells
    return f"{INKS[scene.ink][name]}/{PAPERS[scene.paper][name]}: {cells}"


def text_record(index: int, rng: np.random.Generator, languages: Sequence[str] = LANGUAGES) -> dict[str, Any]:
    """Questions about one written scene: a sheet, or every fifth time a clip. Scene and questions each have one of the
    languages.

    Half of the scenes list their digits only, as captions do: the words for digits, colours and questions are learnt
    from these first, and looking them up between empty cells is easier afterwards.
    """
    if index % 5 == 0:
        clip = sample_clip(rng)
        scene, cells = clip.scene, clip_transcript(clip, CLIP_FPS)
        kinds = rng.permutation(["order", "order", "clip_caption", "ink", "paper"])[:TEXT_ROUNDS]
    else:
        scene = sample_scene(rng)
        cells = transcript(scene)
        kinds = rng.permutation([*QUESTION_MIX, "caption"])[:TEXT_ROUNDS]
    if rng.random() < 0.5:
        cells = "".join(str(digit) for digit in scene.digits)
    written = written_scene(scene, _language(rng, languages), cells)
    questions = [ask(scene, str(kind), _language(rng, languages), rng) for kind in kinds]
    return {"id": f"text-{index}", "conversations": _conversation(questions, written + "\n")}


def drawn_out(sentence: str, rng: np.random.Generator) -> str:
    """A sentence as it comes out of a speech encoder: between words, or Chinese characters, frames with nothing new."""
    return "".join(part + BLANK * int(rng.integers(0, LONGEST_GAP + 1)) for part in split_words(sentence)).strip()


def sentences_record(
    index: int, rng: np.random.Generator, languages: Sequence[str] = LANGUAGES, split: Split = "train"
) -> dict[str, Any]:
    """Written sentences of a split stand in for spoken ones as written scenes do for pictures: each is asked for word
    by word.

    Half of them are words in no order, which cannot be guessed. Half are drawn out, as half of the scenes have their
    empty cells.
    """
    conversations = []
    for _ in range(TEXT_ROUNDS):
        language = _language(rng, languages)
        sentence = (draw_words if rng.random() < 0.5 else draw_sentence)(language, split, rng)
        request = str(rng.choice(TRANSCRIBE[language]))
        written = drawn_out(sentence, rng) if rng.random() < 0.5 else sentence
        conversations += [{"from": "human", "value": f"{written}\n{request}"}, {"from": "gpt", "value": sentence}]
    return {"id": f"text-{index}", "conversations": conversations}


def cell_record(index: int, scene: Scene, image: str) -> dict[str, Any]:
    """One name for every visual token: digit and colours; the overview is named as such."""
    ink, paper = INKS[scene.ink][0], PAPERS[scene.paper][0]
    names = [f"{BLANK} {paper}" if digit is None else f"{digit} {ink} {paper}" for digit in cell_names(scene)]
    if scene.num_tiles > 1:
        names += [f"{OVERVIEW} {ink} {paper}"] * CELLS_PER_TILE_SIDE**2
    conversation = [
        {"from": "human", "value": "<image>\nName every cell."},
        {"from": "gpt", "value": " | ".join(names)},
    ]
    return {"id": f"cells-{index}", "image": image, "conversations": conversation}


class Writer:
    """Writes the records and media of one set in the public format."""

    def __init__(self, folder: Path, scans: ScanSplit, seed: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "media").mkdir(parents=True)
        self.folder = folder
        self.scans = scans
        self.rng = np.random.default_rng(seed)
        self.records: list[dict[str, Any]] = []

    def picture(self, scene: Scene) -> str:
        """Draws a sheet; returns its path below the set's folder."""
        name = f"media/{len(self.records):06d}.png"
        pixels, _ = draw_sheet(scene, self.scans, self.rng)
        Image.fromarray(pixels).save(self.folder / name, compress_level=1)
        return name

    def add_text(self, sentences: bool) -> None:
        """A text about a scene, or with `sentences` every so often sentences."""
        index = len(self.records)
        make = sentences_record if sentences and index % SENTENCES_EVERY == SENTENCES_EVERY - 1 else text_record
        self.records.append(make(index, self.rng))

    def add_cells(self) -> None:
        scene = sample_scene(self.rng)
        self.records.append(cell_record(len(self.records), scene, self.picture(scene)))

    def add_picture(self, kinds: Iterable[str]) -> None:
        scene = sample_scene(self.rng)
        questions = [ask(scene, kind, _language(self.rng), self.rng) for kind in kinds]
        record = {"id": f"{self.folder.name}-{len(self.records)}", "image": self.picture(scene)}
        self.records.append({**record, "conversations": _conversation(questions, "<image>\n")})

    def add_clip(self, kinds: Iterable[str]) -> None:
        clip = sample_clip(self.rng)
        questions = [ask(clip.scene, kind, _language(self.rng), self.rng) for kind in kinds]
        name = f"media/{len(self.records):06d}.mp4"
        write_video(self.folder / name, draw_clip(clip, self.scans, self.rng, CLIP_FPS), CLIP_FPS)
        record = {"id": f"{self.folder.name}-{len(self.records)}", "video": name}
        self.records.append({**record, "conversations": _conversation(questions, "<video>\n")})

    def picture_kinds(self) -> list[str]:
        """The kinds of questions about one picture."""
        return [str(kind) for kind in self.rng.permutation(QUESTION_MIX)[:PICTURE_ROUNDS]]

    def finish(self) -> None:
        text = json.dumps(self.records, ensure_ascii=False)
        (self.folder / "records.json").write_text(text, encoding="utf-8")


def _write_set(name: str, writer: Writer, counts: dict[str, int], sentences: bool) -> None:
    if name == "text":
        for _ in range(counts["text"]):
            writer.add_text(sentences)
    elif name == "cells":
        for _ in range(counts["cells"]):
            writer.add_cells()
    elif name == "captions":
        for _ in range(counts["captions"]):
            writer.add_picture(["caption"])
        for _ in range(counts["clips"] // 2):
            writer.add_clip(["clip_caption"])
    else:
        for _ in range(counts["pictures"]):
            writer.add_picture(writer.picture_kinds())
        for _ in range(counts["clips"]):
            writer.add_clip(["order"] * CLIP_ROUNDS)
    writer.finish()


_PLACEHOLDERS = re.compile(r"<(?:image|video|audio)>\n?")


def tokenizer_texts(records: Iterable[dict[str, Any]]) -> list[str]:
    """Every turn once, see `tokenizer_pieces`."""
    turns = (turn for record in records for turn in record["conversations"])
    return tokenizer_pieces(_PLACEHOLDERS.sub("", turn["value"]) for turn in turns)


def tokenizer_pieces(texts: Iterable[str]) -> list[str]:
    """Every text once; cells of written scenes apart from each other, so that each stays one token."""
    pieces = {BLANK, OVERVIEW, *(str(digit) for digit in range(10))}
    for text in texts:
        pieces.update(part for part in text.replace(OVERVIEW, BLANK).split(BLANK) if part)
    return sorted(pieces)


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def _benchmark_items(folder: Path, splits: dict[str, ScanSplit], counts: dict[str, int], seed: int) -> list[dict]:
    """Held-out questions, one picture or clip each; kinds, languages and digit counts in equal shares."""
    rng = np.random.default_rng([seed, 1])
    items: list[dict[str, Any]] = []

    def add(group: str, question: Question, scene: Scene, **media: str) -> None:
        items.append(
            {"id": f"{group}-{len(items)}", "group": group, "kind": question.kind, "language": question.language}
            | {"num_digits": len(scene.digits), "question": question.text, "answer": question.answer}
            | media
        )

    for group, split in (("typed", "held_out"), ("typed_unseen_writers", "unseen_writers")):
        for kind in KINDS:
            for index in range(counts[group]):
                scene = sample_scene(rng, num_digits=index % MAX_DIGITS + 1)
                name = f"media/{len(items):06d}.png"
                pixels, _ = draw_sheet(scene, splits[split], rng)
                Image.fromarray(pixels).save(folder / name, compress_level=1)
                language = LANGUAGES[index // MAX_DIGITS % len(LANGUAGES)]
                add(group, ask(scene, kind, language, rng), scene, image=name)
    for index in range(counts["video_order"]):
        clip = sample_clip(rng)
        name = f"media/{len(items):06d}.mp4"
        write_video(folder / name, draw_clip(clip, splits["held_out"], rng, CLIP_FPS), CLIP_FPS)
        add("video_order", ask(clip.scene, "order", LANGUAGES[index % 2], rng), clip.scene, video=name)
    for kind in KINDS:
        for index in range(counts["text_only"]):
            scene = sample_scene(rng, num_digits=index % MAX_DIGITS + 1)
            question = ask(scene, kind, LANGUAGES[index // MAX_DIGITS % len(LANGUAGES)], rng)
            written = written_scene(scene, question.language)
            add(
                "text",
                Question(kind, question.language, f"{written}\n{question.text}", question.answer),
                scene,
            )
    return items


def build_benchmark(folder: Path, splits: dict[str, ScanSplit], counts: dict[str, int], seed: int) -> None:
    """Writes `items.jsonl` and its media."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "media").mkdir(parents=True)
    items = _benchmark_items(folder, splits, counts, seed)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / "items.jsonl").write_text(lines, encoding="utf-8")


def build_quickstart(
    folder: Path, counts: dict[str, int], seed: int, progress: Progress = print, speech: SpeechCounts | None = None
) -> None:
    """Builds all sets and the benchmarks; does nothing if they are there for the same counts and seed.

    Args:
      folder: where everything goes.
      counts: records of `text`, `cells`, `captions`, `pictures`, `clips`; benchmark questions per kind of `typed`,
        `typed_unseen_writers` and `text_only`, and in all of `video_order`.
      seed: of the split of the scans and of everything drawn.
      progress: gets one line per finished part.
      speech: amounts of speech; None leaves it out, and the sentences among the texts.
    """
    done = folder / DONE
    wanted: dict[str, Any] = {"counts": counts, "seed": seed}
    if speech is not None:
        wanted["speech"] = dataclasses.asdict(dataclasses.replace(speech, processes=1))  # they change no file
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == wanted:
        progress(f"data: {folder} is up to date")
        return
    done.unlink(missing_ok=True)
    splits = load_scan_splits(seed)
    records: list[dict[str, Any]] = []
    for index, name in enumerate(SETS):
        writer = Writer(folder / "raw" / name, splits["train"], seed * len(SETS) + index)
        _write_set(name, writer, counts, sentences=speech is not None)
        records += writer.records
        manifest = build_records(RecordsFile(writer.folder / "records.json", writer.folder), folder / name)
        progress(f"data: {name}: {manifest.counts}")
    if speech is not None:
        records += build_speech(folder, splits, speech, seed, progress)
        for name in RECORD_SETS:
            raw = folder / "raw" / name
            manifest = build_records(RecordsFile(raw / "records.json", raw), folder / name)
            progress(f"data: {name}: {manifest.counts}")
    (folder / "tokenizer_text.txt").write_text(
        "\n".join(json.dumps(text, ensure_ascii=False) for text in tokenizer_texts(records)), encoding="utf-8"
    )
    build_benchmark(folder / "benchmarks" / "quickstart", splits, counts, seed)
    progress("data: benchmark of held-out scans")
    done.write_text(json.dumps(wanted), encoding="utf-8")
