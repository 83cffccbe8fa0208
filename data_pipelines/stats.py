"""What is in built records or in a manifest of recordings: sizes, durations, tokens, scripts; a table and a page."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data_pipelines.document_layouts import DOCUMENT_LAYOUTS
from data_pipelines.records import LONGEST_AUDIO
from vita_jax.data.audio import read_audio
from vita_jax.data.documents import DocumentRecord, decode_document
from vita_jax.data.images import ImageConfig, open_image, tile_count
from vita_jax.data.loader import RecordSource, SourceConfig
from vita_jax.data.manifests import MANIFEST as SPEECH_MANIFEST
from vita_jax.data.manifests import read_manifest
from vita_jax.data.records import MANIFEST_NAME, PLACEHOLDERS, Media, Record, decode_record
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import choose_frames, probe_video
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED

AUDIO_RATE = RELEASED.sample_rate  # Hz; durations do not depend on it
HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
LATIN, LETTER = re.compile(r"[A-Za-z\u00c0-\u024f]"), re.compile(r"[^\W\d_]")
MARKS = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))

Progress = Callable[[int, int], None]  # records done, records in all


@dataclass
class Stats:
    """What was counted.

    Attributes:
      numbers: quantity with its unit -> one value for each thing measured.
      classes: question -> answer -> how many, such as "script of a question" -> {"latin": 3, "han": 4}.
      records, of: how many records were read, and how many there are.
    """

    numbers: dict[str, list[float]] = field(default_factory=dict)
    classes: dict[str, Counter[str]] = field(default_factory=dict)
    records: int = 0
    of: int = 0

    def add(self, quantity: str, value: float) -> None:
        """One more value."""
        self.numbers.setdefault(quantity, []).append(float(value))

    def count(self, question: str, answer: str) -> None:
        """One more of its class."""
        self.classes.setdefault(question, Counter())[answer] += 1


def script_of(text: str) -> str:
    """What most letters of a text are: "han", "latin", "other" or "no letters"."""
    letters = LETTER.findall(text)
    if not letters:
        return "no letters"
    counts = {"han": len(HAN.findall(text)), "latin": len(LATIN.findall(text))}
    counts["other"] = len(letters) - sum(counts.values())
    return max(counts, key=lambda script: counts[script])


def gather(
    folder: str | Path,
    *,
    image: ImageConfig = ImageConfig(),  # noqa: B008
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Stats:
    """Reads a folder of built records, or a manifest of recordings and their texts.

    Args:
      folder: written by `data_pipelines.build`; or a manifest.jsonl, or a folder that holds one.
      image: decides how many tiles a picture gives.
      tokenizer: counts tokens; None counts characters only.
      limit: how many records to read, evenly spaced over all; None = all.
      progress: called after every record.

    Raises:
      UserError: neither is there, `limit` is below 1, or something in it is damaged.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    folder, stats = Path(folder), Stats()
    total, read = _open(folder)
    chosen = range(total) if limit is None or limit >= total else [i * total // limit for i in range(limit)]
    stats.records, stats.of = len(chosen), total
    for done, index in enumerate(chosen, start=1):
        record = read(index)
        _measure(stats, record, image, tokenizer)
        progress(done, len(chosen))
    return stats


def _open(folder: Path) -> tuple[int, Callable[[int], Record | DocumentRecord]]:
    """How many records there are, and what reads one of them."""
    if (folder / MANIFEST_NAME).is_file():
        source = RecordSource(SourceConfig(str(folder)), 0, 0)
        decode = decode_document if source.manifest.options.get("layout") in DOCUMENT_LAYOUTS else decode_record
        return len(source), lambda index: decode(source[index][1])
    if folder.is_file() or (folder / SPEECH_MANIFEST).is_file():
        pairs = read_manifest(folder)

        def pair(index: int) -> Record:
            spoken = pairs[index]
            try:
                data = spoken.audio.read_bytes()
            except OSError as error:
                raise UserError(f"{spoken.place}: audio {spoken.audio}: {error.strerror}") from None
            turns = ({"from": "human", "value": PLACEHOLDERS["audio"]}, {"from": "gpt", "value": spoken.text})
            return Record(spoken.place, turns, (Media("audio", str(spoken.audio), data),))

        return len(pairs), pair
    raise UserError(
        f"{folder} holds neither {MANIFEST_NAME} nor {SPEECH_MANIFEST}; give a folder that data_pipelines.build wrote, "
        "or a manifest of recordings"
    )


def _measure(stats: Stats, record: Record | DocumentRecord, image: ImageConfig, tokenizer: Tokenizer | None) -> None:
    if isinstance(record, DocumentRecord):
        _measure_document(stats, record, tokenizer)
    else:
        _measure_conversation(stats, record, tokenizer)
    for media in record.media:
        _measure_media(stats, media, image)


def _measure_document(stats: Stats, record: DocumentRecord, tokenizer: Tokenizer | None) -> None:
    stats.add("pictures and videos of a document", len(record.media))
    stats.count("media of a record", " + ".join(sorted({media.kind for media in record.media})) or "text only")
    for text in record.texts:
        stats.add("characters of a text", len(text))
        stats.count("script of a text", script_of(text))
    if tokenizer is not None:
        ids = (tokenizer.encode(text, allow_special=False, add_bos=False) for text in record.texts)
        stats.add("text tokens of a record", sum(map(len, ids)))


def _measure_conversation(stats: Stats, record: Record, tokenizer: Tokenizer | None) -> None:
    stats.add("rounds of a record", record.num_rounds)
    kinds = Counter(media.kind for media in record.media)
    stats.count("media of a record", " + ".join(sorted(kinds)) or "text only")
    tokens = 0
    for turn in record.conversations:
        text = MARKS.sub("", turn["value"]).strip()
        what = "a question" if turn["from"] == "human" else "an answer"
        stats.add(f"characters of {what}", len(text))
        stats.count(f"script of {what}", script_of(text))
        if tokenizer is not None:
            tokens += len(tokenizer.encode(text, allow_special=False, add_bos=False))
    if tokenizer is not None:
        stats.add("text tokens of a record", tokens)


def _measure_media(stats: Stats, media: Media, image: ImageConfig) -> None:
    stats.add(f"kB of {'an' if media.kind != 'video' else 'a'} {media.kind}", len(media.data) / 1e3)
    if media.kind == "image":
        width, height = open_image(media.data, name=media.name).size
        stats.add("longer side of an image in pixels", max(width, height))
        stats.add("tiles of an image", tile_count(width, height, image))
    elif media.kind == "audio":
        samples = read_audio(media.data, LONGEST_AUDIO, name=media.name, sample_rate=AUDIO_RATE)
        stats.add("seconds of an audio", len(samples) / AUDIO_RATE)
    else:
        info = probe_video(media.data, name=media.name)
        stats.add("seconds of a video", info.num_frames / info.fps)
        stats.add("frames taken of a video", len(choose_frames(info.num_frames, info.fps)))


# ---- what is printed ------------------------------------------------------------------------------------------------

HEAD = ("", "number", "sum", "mean", "median", "95 %", "largest")


def number_rows(stats: Stats) -> list[tuple[str, ...]]:
    """A row for every quantity, as texts."""
    rows = []
    for quantity, values in stats.numbers.items():
        array = np.asarray(values)
        figures = (array.sum(), array.mean(), np.median(array), np.percentile(array, 95), array.max())
        rows.append((quantity, f"{len(array):,}", *(_short(float(figure)) for figure in figures)))
    return rows


def class_rows(stats: Stats) -> Iterator[tuple[str, str, str, str]]:
    """Question, answer, number and share, the most frequent answers first."""
    for question, answers in stats.classes.items():
        total = sum(answers.values())
        for answer, number in answers.most_common():
            yield question, answer, f"{number:,}", f"{number / total:.1%}"


def _short(value: float) -> str:
    if value == int(value) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def format_stats(stats: Stats) -> str:
    """Both tables, for a terminal."""
    read = f"{stats.records:,} records" + (f" of {stats.of:,}, evenly spaced" if stats.records < stats.of else "")
    return "\n".join([read, "", *_columns([HEAD, *number_rows(stats)]), "", *_columns(list(class_rows(stats)), 2)])


def _columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with columns of even width; the first `left` ones begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(widths[i]) if i < left else cell.rjust(widths[i]) for i, cell in enumerate(row))

    return [line(row).rstrip() for row in rows]


# ---- the page -------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 40px auto; padding: 0 20px; color: #1c2430 }
h1 { font-size: 24px } h2 { font-size: 18px; margin-top: 32px } img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 4px 12px; border-bottom: 1px solid #e3e7ee; text-align: right } th { color: #667085; font-size: 13px }
td:first-child, th:first-child, .classes td:nth-child(2) { text-align: left }"""
COLUMNS, BINS = 3, 40


def write_page(stats: Stats, path: str | Path, title: str) -> None:
    """One HTML file with the tables and a histogram of every quantity.

    Raises:
      UserError: the file cannot be written.
    """
    numbers = _table([HEAD, *number_rows(stats)])
    classes = _table([("", "", "number", "share"), *class_rows(stats)], "classes")
    read = f"{stats.records:,} of {stats.of:,} records were read."
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{read}</p>{numbers}<h2>Distributions</h2>{_histograms(stats)}"
        f"<h2>Kinds</h2>{classes}"
    )
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"page {path} cannot be written: {error.strerror}") from None


def _table(rows: Sequence[Sequence[str]], name: str = "") -> str:
    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table class='{name}'>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _histograms(stats: Stats) -> str:
    rows = -(-len(stats.numbers) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, (quantity, values) in zip(axes, stats.numbers.items(), strict=False):
        axis.hist(values, bins=BINS, color="#2f5fd0")
        axis.set_title(quantity, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(stats.numbers) :]:
        axis.set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return f"<img alt='histograms of every quantity' src='data:image/png;base64,{encoded}'>"
