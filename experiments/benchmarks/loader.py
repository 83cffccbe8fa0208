"""How fast records become batches, by modality, where the time goes, and how many cores feed one accelerator.

    python -m experiments.benchmarks.loader
    python -m experiments.benchmarks.loader --records 64 --model-flops 4.6e14

Draws pictures, clips, sounds and talk of the size that VITA-1.5 is trained on, builds them to records, and reads them
with one core: by the package's loader (Grain, packing), and by a PyTorch DataLoader with the same transforms in one
process, which pads each batch to its longest (`convert` brings torch). A token is a position of the language model.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.audio import AudioConfig, AudioContext
from vita_jax.data.examples import ExampleContext, tile_table, training_example
from vita_jax.data.images import ImageConfig
from vita_jax.data.lanes import Reading
from vita_jax.data.loader import SourceConfig, make_loader
from vita_jax.data.records import decode_record, load_manifest
from vita_jax.data.splice import FeatureLayout
from vita_jax.data.templates import SystemTexts, get_template
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.data.video import write_video
from vita_jax.errors import UserError
from vita_jax.models.vita import vita_1_5

EXAMPLES = """\
examples:
  python -m experiments.benchmarks.loader
  python -m experiments.benchmarks.loader --records 16 --modalities text,audio
"""
TOKENIZER = Path(__file__).parents[1] / "quickstart" / "weights" / "tokenizer"
MODALITIES = ("text", "image", "video", "audio")
ROW_LENGTH, ROW_TILES, ROW_CLIPS, CLIP_FRAMES = 6144, 26, 8, 1600
BATCH_SIZE = 2
# What is drawn: a picture of a phone's screen, a clip of 16 s, a question of 8 s.
PICTURE, FRAME, VIDEO_SECONDS, VIDEO_FPS, SOUND_SECONDS, RATE = (1024, 768), (320, 240), 16, 4.0, 8, 16000
WORDS = ("what", "is", "the", "largest", "digit", "how", "many", "colour", "read", "sum", "of", "paper", "次", "数字")
V5P_FLOPS, UTILISATION = 4.59e14, 0.4  # bfloat16 peak of one chip, and what training usually reaches of it
LANGUAGE_PARAMETERS = 7.6e9


@dataclass(frozen=True)
class Rate:
    """What one core reads of one modality.

    Attributes:
      modality: of the records.
      records, tokens: per second, by the package's loader.
      fill: share of the token slots of its batches that are used.
      media, text, packing: seconds per record of decoding and tiling or features; of prompt and tokens; of the rest.
      torch_records: per second, by the PyTorch DataLoader; None where torch is not installed.
    """

    modality: str
    records: float
    tokens: float
    fill: float
    media: float
    text: float
    packing: float
    torch_records: float | None


# ---- data -----------------------------------------------------------------------------------------------------------


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Blurred noise: about as hard to decode as a photograph."""
    small = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def _sound(rng: np.random.Generator) -> bytes:
    samples = (3000 * rng.standard_normal(SOUND_SECONDS * RATE)).astype("<i2")
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return data.getvalue()


def _media(modality: str, path: Path, rng: np.random.Generator) -> str | None:
    """Writes one file; returns its name."""
    if modality == "text":
        return None
    ending = {"image": "jpg", "video": "mp4", "audio": "wav"}[modality]
    file = path.with_suffix(f".{ending}")
    if modality == "image":
        _picture(rng, PICTURE).save(file, quality=90)
    elif modality == "video":
        frames = [np.asarray(_picture(rng, FRAME)) for _ in range(int(VIDEO_SECONDS * VIDEO_FPS))]
        write_video(file, np.stack(frames), VIDEO_FPS)
    else:
        file.write_bytes(_sound(rng))
    return file.name


def build(modality: str, count: int, folder: Path) -> Path:
    """Draws `count` records of one modality with 1 to 4 rounds and builds them; returns the built folder."""
    rng = np.random.default_rng(MODALITIES.index(modality))
    media = folder / f"{modality}.media"
    media.mkdir()
    entries = []
    for index in range(count):
        name = _media(modality, media / str(index), rng)
        turns = []
        for round_ in range(int(rng.integers(1, 5))):
            mark = f"<{modality}>\n" if name is not None and round_ == 0 else ""
            turns.append({"from": "human", "value": mark + _words(rng, 12)})
            turns.append({"from": "gpt", "value": _words(rng, int(rng.integers(2, 120)))})
        entries.append({"conversations": turns} | ({modality: name} if name else {}))
    source = folder / f"{modality}.json"
    source.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    build_records(RecordsFile(source, media), folder / modality)
    return folder / modality


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))


# ---- reading --------------------------------------------------------------------------------------------------------


def full_context() -> ExampleContext:
    """Records as VITA-1.5 is trained on them, but for the tokenizer, which is the quickstart's."""
    model = vita_1_5()
    return ExampleContext(
        tokenizer=load_tokenizer(TOKENIZER),
        template=get_template("qwen2p5_instruct"),
        system_texts=SystemTexts("Look.", "Watch.", "Read."),
        image=ImageConfig(image_size=model.vision.image_size),
        layout=FeatureLayout(model.vision.tokens_per_tile, model.pooled_grids),
        audio=AudioContext(AudioConfig(), model.audio.num_tokens),
    )


def read_stored(folder: Path) -> list[bytes]:
    """All stored records of a folder."""
    names = [str(folder / shard.name) for shard in load_manifest(folder).shards]
    source = grain.sources.ArrayRecordDataSource(names)
    return [source[i] for i in range(len(source))]


def seconds_of(action: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Mean seconds of `action` on an item."""
    start = time.perf_counter()
    for item in items:
        action(item)
    return (time.perf_counter() - start) / len(items)


def measure(modality: str, folder: Path, context: ExampleContext) -> Rate:
    """Reads one modality once, with one core."""
    stored = read_stored(folder)
    records = [decode_record(data) for data in stored]
    whole = seconds_of(lambda data: training_example(decode_record(data), context), stored)
    media = seconds_of(lambda record: tile_table(record.media, context), records) if modality != "text" else 0.0
    loader = make_loader(
        [SourceConfig(str(folder))],
        context,
        batch_size=BATCH_SIZE,
        row_length=ROW_LENGTH,
        row_tiles=0 if modality in ("text", "audio") else ROW_TILES,
        row_clips=ROW_CLIPS if modality == "audio" else 0,
        clip_frames=CLIP_FRAMES if modality == "audio" else 0,
        seed=0,
        reading=Reading(0),
        num_epochs=1,
        drop_remainder=False,
        prefetch_batches=0,
    )
    start, used, slots = time.perf_counter(), 0, 0
    for batch in loader:
        used += int(np.count_nonzero(batch["segment_ids"]))
        slots += batch["segment_ids"].size
    seconds = (time.perf_counter() - start) / len(stored)
    tokens = used / len(stored)
    return Rate(
        modality,
        1 / seconds,
        tokens / seconds,
        used / slots,
        media,
        max(0.0, whole - media),
        max(0.0, seconds - whole),
        torch_rate(stored, context),
    )


def torch_rate(stored: Sequence[bytes], context: ExampleContext) -> float | None:
    """Records per second of a PyTorch DataLoader in this process that does the same and pads."""
    try:
        from torch.utils.data import DataLoader
    except ImportError:
        return None

    class Stored:
        def __len__(self) -> int:
            return len(stored)

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return training_example(decode_record(stored[index]), context)

    def collate(examples: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        longest = max(len(example["tokens"]) for example in examples)
        return np.stack([np.pad(example["tokens"], (0, longest - len(example["tokens"]))) for example in examples])

    start = time.perf_counter()
    for _ in DataLoader(Stored(), batch_size=8, shuffle=True, num_workers=0, collate_fn=collate):
        pass
    return len(stored) / (time.perf_counter() - start)


# ---- what is printed ------------------------------------------------------------------------------------------------


def chip_tokens(flops: float) -> float:
    """Tokens per second that one chip trains: 6 operations per parameter and token."""
    return flops * UTILISATION / (6 * LANGUAGE_PARAMETERS)


def format_rates(rates: Sequence[Rate], flops: float) -> str:
    """A table, and how many cores one chip needs."""
    head = ("", "records/s", "tokens/s", "fill", "media ms", "text ms", "packing ms", "torch records/s", "cores/chip")
    need = chip_tokens(flops)
    rows = [head]
    for rate in rates:
        torch = "-" if rate.torch_records is None else f"{rate.torch_records:.1f}"
        times = (f"{1e3 * seconds:.2f}" for seconds in (rate.media, rate.text, rate.packing))
        figures = (f"{rate.records:.1f}", f"{rate.tokens:,.0f}", f"{rate.fill:.1%}", *times, torch)
        rows.append((rate.modality, *figures, f"{need / rate.tokens:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"one chip trains {need:,.0f} tokens/s ({UTILISATION:.0%} of {flops:.3g} FLOP/s)"])


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.benchmarks.loader", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--records", type=int, default=48, metavar="N", help="of each modality (default 48)")
    parser.add_argument("--modalities", default=",".join(MODALITIES), metavar="A,B", help=", ".join(MODALITIES))
    parser.add_argument(
        "--model-flops", type=float, default=V5P_FLOPS, metavar="X", help="of the chip, peak (default TPU v5p)"
    )
    return parser


def run(count: int, modalities: Sequence[str]) -> Iterator[Rate]:
    """The rates, one after the other.

    Raises:
      UserError: no records, or an unknown modality.
    """
    if count < 1:
        raise UserError(f"--records {count} must be at least 1")
    for modality in modalities:
        if modality not in MODALITIES:
            raise UserError(f"--modalities: {modality!r} is unknown; use some of {', '.join(MODALITIES)}")
    context = full_context()
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        for modality in modalities:
            yield measure(modality, build(modality, count, Path(folder)), context)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    rates = list(run(arguments.records, arguments.modalities.split(",")))
    print(format_rates(rates, arguments.model_flops))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(benchmark, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
