"""Builds what the small Flamingo reads: texts for its language model, and documents, captions and clips of digit scans.

    DIR/raw/<set>/documents.json, media   the public document format; raw/cells/records.json that of conversations
    DIR/<set>/                            ArrayRecord files: lists, texts, pages, captions, clips; cells, for the tower
    DIR/few_shot/                         held-out queries.jsonl, support.jsonl and their media
    DIR/tokenizer_text.txt                what the tokenizer is trained on

A page is a chain of pictures, each with a question or a caption, or with a name: on a labelling page two to four digits
have names that are drawn for this page, so that only its earlier pictures tell them. Names come from two lists,
one for training, one for the test. A text is such a page with every picture written out in characters, from which the
language model learns both before it sees anything.

To find the name of a digit again is the hard part: from pages alone the language model had not learnt it after 3,000
steps. `lists` are what it begins with: digits with their names side by side, among labelling pages. A quarter of the
texts are lists, too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.quickstart.build import CLIP_FPS, DONE, QUESTION_MIX, cell_record, tokenizer_pieces, written_scene
from data_pipelines.quickstart.clips import clip_transcript, draw_clip, sample_clip
from data_pipelines.quickstart.questions import KINDS, ask
from data_pipelines.quickstart.scans import ScanSplit, load_scan_splits
from data_pipelines.quickstart.scenes import CELLS_PER_TILE_SIDE, INKS, MAX_DIGITS, PAPERS, Scene, draw_sheet
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from vita_jax.data.few_shot import QUERIES, SUPPORT
from vita_jax.data.flamingo_prompts import caption_prompt, question_prompt
from vita_jax.data.interleaved import IMAGE
from vita_jax.data.video import write_video

SETS = ("lists", "texts", "pages", "captions", "clips")
LANGUAGE = "en"
CELLS = CELLS_PER_TILE_SIDE**2
# Shares of the pages, and of the texts: labelling, else questions; of the texts also clips, and before both lists; of
# the set `lists` lists, else labelling pages.
LABELLING, CLIPS, LISTS, LISTS_FIRST = 0.4, 0.15, 0.25, 0.6
MOST_PICTURES = 9  # of a page: eight demonstrations and a query
SUPPORT_PICTURES = 16  # of a labelling episode
MIN_CLASSES, MAX_CLASSES = 2, 4
# Of a list: most digits, most entries, and the share with a digit and its name side by side, which is learnt first.
LISTED_DIGITS, LISTED, SIDE_BY_SIDE = 10, 40, 2 / 3
# Names are two of 12 syllables that no question has, each a token of its own; every fifth name is kept for the test.
CONSONANTS, VOWELS = "knvz", "aio"
HELD_OUT_NAMES = 5

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """How much is built.

    Attributes:
      lists, texts, pages, captions, clips: documents of the sets; cells: pictures with the names of their cells.
      typed: held-out questions of each kind; labelling: episodes; video_order: held-out clips.
      support: pictures with questions that demonstrations for the typed questions are taken from.
    """

    lists: int = 24_000
    texts: int = 30_000
    pages: int = 12_000
    captions: int = 6_000
    clips: int = 5_000
    cells: int = 32_000
    typed: int = 84
    labelling: int = 400
    video_order: int = 400
    support: int = 128


# ---- names and scenes -----------------------------------------------------------------------------------------------


@functools.lru_cache
def syllables() -> tuple[str, ...]:
    """What names are made of."""
    return tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)


@functools.lru_cache
def names(held_out: bool) -> tuple[str, ...]:
    """All names of either list."""
    every = [first + second for first in syllables() for second in syllables() if first != second]
    return tuple(name for i, name in enumerate(every) if (i % HELD_OUT_NAMES == 0) == held_out)


def square_scene(rng: np.random.Generator, digits: list[int] | None = None, count: int | None = None) -> Scene:
    """A sheet of 2 x 2 cells with these digits, or `count` drawn ones (1 to 4, if None)."""
    if digits is None:
        count = int(rng.integers(1, MAX_DIGITS + 1)) if count is None else count
        digits = [int(digit) for digit in rng.integers(0, 10, count)]
    cells = np.sort(rng.choice(CELLS, len(digits), replace=False))
    side, ink, paper = CELLS_PER_TILE_SIDE, int(rng.integers(len(INKS))), int(rng.integers(len(PAPERS)))
    return Scene(side, side, tuple(digits), tuple(int(cell) for cell in cells), ink, paper)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture and the text behind it."""

    scene: Scene
    text: str


def asked(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question of that kind and its answer."""
    question = ask(scene, kind, LANGUAGE, rng)
    return question.text, question.answer


def _chunk(prompt: str) -> str:
    """A prompt of `flamingo_prompts` without its tag, which a piece of the document stands for."""
    return prompt.removeprefix(IMAGE)


def question_page(rng: np.random.Generator) -> list[Shown]:
    """One to four pictures, each with a question or, every sixth time, a caption."""
    page = []
    for _ in range(int(rng.integers(1, 5))):
        scene = square_scene(rng)
        if rng.random() < 1 / 6:
            page.append(Shown(scene, _chunk(caption_prompt()) + ask(scene, "caption", LANGUAGE, rng).answer))
            continue
        question, answer = asked(scene, str(rng.choice(QUESTION_MIX)), rng)
        page.append(Shown(scene, _chunk(question_prompt(question)) + answer))
    return page


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of an episode: digit -> its name."""

    of: dict[int, str]

    def example(self, rng: np.random.Generator) -> tuple[Scene, str]:
        """A picture of one of the digits, and its name."""
        digit = int(rng.choice(list(self.of)))
        return square_scene(rng, [digit]), self.of[digit]


def draw_labels(rng: np.random.Generator, held_out: bool, most: int = MAX_CLASSES) -> Labels:
    """Two to `most` digits with names for training or held-out ones."""
    count = int(rng.integers(MIN_CLASSES, most + 1))
    digits, words = rng.choice(10, count, replace=False), rng.choice(names(held_out), count, replace=False)
    return Labels({int(digit): str(word) for digit, word in zip(digits, words, strict=True)})


def labelling_page(rng: np.random.Generator) -> list[Shown]:
    """Three to nine pictures, each with the name that its digit has on this page."""
    labels = draw_labels(rng, held_out=False)
    examples = [labels.example(rng) for _ in range(int(rng.integers(3, MOST_PICTURES + 1)))]
    return [Shown(scene, _chunk(caption_prompt()) + name) for scene, name in examples]


def page(rng: np.random.Generator) -> list[Shown]:
    """Of either kind."""
    return labelling_page(rng) if rng.random() < LABELLING else question_page(rng)


def name_list(rng: np.random.Generator) -> str:
    """Two to ten digits, each with its name whenever it comes: 3kazi7nova3kazi, or 3:kazi 7:nova 3:kazi."""
    pairs = list(draw_labels(rng, held_out=False, most=LISTED_DIGITS).of.items())
    entries = rng.integers(0, len(pairs), int(rng.integers(2 * len(pairs), LISTED + 1)))
    between, behind = ("", "") if rng.random() < SIDE_BY_SIDE else (":", " ")
    return behind.join(between.join((str(digit), name)) for digit, name in (pairs[entry] for entry in entries))


def list_document(rng: np.random.Generator) -> list[str]:
    """A list, or a labelling page."""
    return [name_list(rng)] if rng.random() < LISTS_FIRST else written(labelling_page(rng))


def written(page: list[Shown]) -> list[str]:
    """A page with its pictures written out."""
    return [written_scene(shown.scene, LANGUAGE) + shown.text for shown in page]


def text_document(rng: np.random.Generator) -> list[str]:
    """A list, a page, or a clip with its question, with what is shown written out; every text is a chunk."""
    if rng.random() < LISTS:
        return [name_list(rng)]
    if rng.random() < CLIPS:
        clip = sample_clip(rng)
        question, answer = asked(clip.scene, "order", rng)
        frames = written_scene(clip.scene, LANGUAGE, clip_transcript(clip, CLIP_FPS))
        return [frames + _chunk(question_prompt(question)) + answer]
    return written(page(rng))


# ---- the sets -------------------------------------------------------------------------------------------------------


class DocumentWriter:
    """Writes the documents and media of one set in the public format."""

    def __init__(self, folder: Path, scans: ScanSplit, seed: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "media").mkdir(parents=True)
        self.folder, self.scans, self.rng = folder, scans, np.random.default_rng(seed)
        self.documents: list[dict[str, Any]] = []
        self._files = 0

    def picture(self, scene: Scene) -> str:
        """Draws a sheet; returns its path below the set's folder."""
        name = f"media/{self._files:06d}.png"
        self._files += 1
        pixels, _ = draw_sheet(scene, self.scans, self.rng)
        Image.fromarray(pixels).save(self.folder / name, compress_level=1)
        return name

    def clip(self) -> tuple[str, Scene]:
        """Draws a clip; returns its path and its digits in order."""
        name = f"media/{self._files:06d}.mp4"
        self._files += 1
        clip = sample_clip(self.rng)
        write_video(self.folder / name, draw_clip(clip, self.scans, self.rng, CLIP_FPS), CLIP_FPS)
        return name, clip.scene

    def add(self, pieces: list[Any]) -> None:
        """One document."""
        self.documents.append({"id": f"{self.folder.name}-{len(self.documents)}", "document": pieces})

    def add_page(self, shown: list[Shown]) -> None:
        """Pictures with their texts."""
        self.add([piece for one in shown for piece in ({"image": self.picture(one.scene)}, one.text)])

    def add_clip(self) -> None:
        """A clip with the question in which order its digits appear."""
        name, scene = self.clip()
        question, answer = asked(scene, "order", self.rng)
        self.add([{"video": name}, _chunk(question_prompt(question)) + answer])

    def finish(self) -> Path:
        """Writes the file of documents; returns it."""
        path = self.folder / "documents.json"
        path.write_text(json.dumps(self.documents, ensure_ascii=False), encoding="utf-8")
        return path


def _write_set(name: str, writer: DocumentWriter, count: int) -> None:
    for _ in range(count):
        if name == "lists":
            writer.add(list_document(writer.rng))
        elif name == "texts":
            writer.add(text_document(writer.rng))
        elif name == "pages":
            writer.add_page(page(writer.rng))
        elif name == "captions":
            scene = square_scene(writer.rng)
            caption = _chunk(caption_prompt()) + ask(scene, "caption", LANGUAGE, writer.rng).answer
            writer.add_page([Shown(scene, caption)])
        else:
            writer.add_clip()


def _write_cells(folder: Path, scans: ScanSplit, count: int, seed: int) -> list[str]:
    """Pictures with the names of their cells, from which the tower learns; returns the names."""
    writer = DocumentWriter(folder / "raw" / "cells", scans, seed)
    scenes = [square_scene(writer.rng) for _ in range(count)]
    records = [cell_record(index, scene, writer.picture(scene)) for index, scene in enumerate(scenes)]
    path = writer.folder / "records.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    build_records(RecordsFile(path, writer.folder), folder / "cells")
    return [record["conversations"][1]["value"] for record in records]


# ---- what is measured -----------------------------------------------------------------------------------------------


def _write_few_shot(folder: Path, splits: dict[str, ScanSplit], counts: DocumentCounts, seed: int) -> None:
    """Queries on held-out scans; what they may be shown before, of training scans for questions, of held-out ones in an
    episode.
    """
    writer = DocumentWriter(folder, splits["held_out"], seed)
    known = DocumentWriter(folder / "known", splits["train"], seed + 1)
    rng, queries, support = writer.rng, [], []

    def add(entries: list[dict], task: str, pool: str, question: str, answer: str, **more: Any) -> None:
        identity = f"{task}-{'support-' if entries is support else ''}{len(entries)}"
        fields = {"id": identity, "task": task, "pool": pool, "question": question, "answer": answer}
        entries.append(fields | more)

    for kind in KINDS:
        for index in range(counts.typed):
            scene = square_scene(rng, count=index % MAX_DIGITS + 1)
            question, answer = asked(scene, kind, rng)
            add(queries, "typed", "typed", question, answer, kind=kind, image=writer.picture(scene))
    for index in range(counts.support):
        scene, kind = square_scene(known.rng), KINDS[index % len(KINDS)]
        question, answer = asked(scene, kind, known.rng)
        add(support, "typed", "typed", question, answer, kind=kind, image=f"known/{known.picture(scene)}")
    for _ in range(counts.video_order):
        name, scene = writer.clip()
        question, answer = asked(scene, "order", rng)
        add(queries, "video_order", "video_order", question, answer, kind="order", video=name)
    for episode in range(counts.labelling):
        labels, pool = draw_labels(rng, held_out=True), f"episode-{episode}"
        for entries, number in ((support, SUPPORT_PICTURES), (queries, 1)):
            for _ in range(number):
                scene, name = labels.example(rng)
                more = {"kind": "label", "image": writer.picture(scene), "choices": sorted(labels.of.values())}
                add(entries, "labelling", pool, "", name, **more)
    for name, entries in ((QUERIES, queries), (SUPPORT, support)):
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (folder / name).write_text(lines, encoding="utf-8")


# ---- everything -----------------------------------------------------------------------------------------------------


def build_documents(folder: Path, counts: DocumentCounts, seed: int, progress: Progress = print) -> None:
    """Builds all sets and what is measured; does nothing if they are there for the same counts and seed.

    Args:
      folder: where everything goes.
      counts: how much.
      seed: of the split of the scans and of everything drawn.
      progress: gets one line per finished part.
    """
    done, wanted = folder / DONE, {"documents": dataclasses.asdict(counts), "seed": seed}
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == wanted:
        progress(f"data: {folder} is up to date")
        return
    done.unlink(missing_ok=True)
    splits, texts = load_scan_splits(seed), []
    for index, name in enumerate(SETS):
        writer = DocumentWriter(folder / "raw" / name, splits["train"], seed * len(SETS) + index)
        _write_set(name, writer, getattr(counts, name))
        source = RecordsFile(writer.finish(), writer.folder, layout="documents")
        manifest = build_records(source, folder / name)
        texts += [piece for one in writer.documents for piece in one["document"] if isinstance(piece, str)]
        progress(f"data: {name}: {manifest.counts}")
    texts += _write_cells(folder, splits["train"], counts.cells, seed + 2 * len(SETS))
    lines = "\n".join(json.dumps(text, ensure_ascii=False) for text in tokenizer_pieces(texts))
    (folder / "tokenizer_text.txt").write_text(lines, encoding="utf-8")
    _write_few_shot(folder / "few_shot", splits, counts, seed + len(SETS))
    progress("data: questions and episodes of held-out scans")
    done.write_text(json.dumps(wanted), encoding="utf-8")
