"""How fast and in how much memory public weights come in and go out: random ones of full size, on this disk.

    python -m experiments.benchmarks.conversion --model vita_1_5 --folder /scratch
    python -m experiments.benchmarks.conversion --model small --folder /tmp/conversion

Draws a public folder, copies one of its files for the disk's own rate, imports and exports with the command, and
compares every tensor of the result with what was drawn. Every file is written through to the disk and out of the page
cache before the clock stops or starts. Takes twice the model's size on the disk, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import ml_dtypes
import numpy as np

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.conversion.torch_files import write_tensors
from vita_jax.conversion.torch_pickles import open_tensors
from vita_jax.errors import UserError
from vita_jax.models.vita import VitaConfig, vita_1_0, vita_1_5, vita_small
from vita_jax.models.vita_hf import config_to_hf
from vita_jax.models.vita_weights import weight_table

EXAMPLES = """\
examples:
  python -m experiments.benchmarks.conversion --model vita_1_5 --folder /scratch
  python -m experiments.benchmarks.conversion --model vita_1_0_tenth --folder /scratch
"""
SHARD_BYTES = 5 * 10**9  # as the released files
COPY_CHUNK = 16 << 20
FINITE = 0xFF7F  # keeps a bfloat16's sign, and no exponent of all ones
POLL_SECONDS = 0.02


def vita_1_0_tenth() -> VitaConfig:
    """VITA-1.0 with 3 of its 32 layers, everything else at full size."""
    full = vita_1_0()
    return replace(full, language=replace(full.language, num_layers=3))


MODELS: dict[str, tuple[Callable[[], VitaConfig], str]] = {
    "vita_1_5": (vita_1_5, "vita_1_5"),
    "vita_1_0_tenth": (vita_1_0_tenth, "vita_1_0"),
    "small": (vita_small, "vita_1_5"),
}


@dataclass(frozen=True)
class Step:
    """One measured step.

    Attributes:
      name: of the step.
      gigabytes: of the model, which it read and wrote once.
      seconds: until everything was on the disk.
      peak_gigabytes: largest memory of its process that is not file cache; None for the copy.
    """

    name: str
    gigabytes: float
    seconds: float
    peak_gigabytes: float | None = None

    @property
    def rate(self) -> float:
        """MB/s."""
        return self.gigabytes * 1e3 / self.seconds


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits that are finite bfloat16 numbers, the same for the same name."""
    bits = np.random.default_rng(crc32(name.encode())).integers(0, 1 << 16, shape, np.uint16)
    return (bits & np.uint16(FINITE)).view(ml_dtypes.bfloat16)


def shapes_of(config: VitaConfig) -> dict[str, tuple[int, ...]]:
    """Torch name -> shape of every tensor of the model."""
    return {name: rule.torch_shape for rule in weight_table(config).rules for name in rule.names}


def write_public(folder: Path, config: VitaConfig) -> int:
    """Writes the model as a public folder; returns its bytes of weights."""
    shapes = shapes_of(config)
    files = write_tensors(
        folder, ((name, draw(name, shape)) for name, shape in shapes.items()), max_shard_bytes=SHARD_BYTES
    )
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    return sum(file.stat().st_size for file in files)


def count_different(folder: Path, config: VitaConfig) -> int:
    """How many tensors of a folder have other bits than were drawn, or are missing."""
    source = open_tensors(folder)
    different = 0
    for name, shape in shapes_of(config).items():
        same = name in source and np.array_equal(source[name].view(np.uint16), draw(name, shape).view(np.uint16))
        different += not same
    return different


# ---- the clock ------------------------------------------------------------------------------------------------------


def settle(folder: Path) -> None:
    """Everything below the folder is on the disk afterwards, and no longer in memory."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def copy_rate(folder: Path, copy: Path) -> Step:
    """Copies the first file of weights into the folder `copy`, as a plain copy would."""
    source = next(path for path in _files(folder) if path.suffix == ".safetensors")
    copy.mkdir()
    target = copy / source.name
    settle(folder)
    start = time.monotonic()
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, COPY_CHUNK)
        write.flush()
        os.fsync(write.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(copy)
    return Step("plain copy of one file", source.stat().st_size / 1e9, seconds)


def run_command_line(name: str, arguments: Sequence[str], result: Path, gigabytes: float) -> Step:
    """Runs `python -m vita_jax.convert` in a process of its own. Raises UserError if it fails."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "vita_jax.convert", *arguments], stdout=subprocess.DEVNULL)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    status = process.wait()
    watcher.join()
    if status:
        raise UserError(f"vita_jax.convert {' '.join(arguments)} ended with status {status}; its message is above")
    settle(result)
    return Step(name, gigabytes, time.monotonic() - start, peak[0] / 1e9)


def _watch(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    """Keeps the largest anonymous memory of a process in bytes: pages of mapped files are the cache's."""
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            return
        peak[0] = max([peak[0], *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))])
        time.sleep(POLL_SECONDS)


# ---- the benchmark --------------------------------------------------------------------------------------------------


def measure(model: str, folder: Path) -> tuple[list[Step], int]:
    """The steps, and how many tensors came back with other bits.

    Raises:
      UserError: there is no such model, `folder` holds something of an earlier benchmark, or a command fails.
    """
    if model not in MODELS:
        raise UserError(f"--model {model!r} is unknown; use one of {', '.join(MODELS)}")
    build, released = MODELS[model]
    public, run, export, copy = places = [folder / f"{model}.{name}" for name in ("public", "run", "export", "copy")]
    for path in places:
        if path.exists():
            raise UserError(f"{path} is in the way; remove it, or choose another --folder")
    config = build()
    try:
        gigabytes = write_public(public, config) / 1e9
        steps = [copy_rate(public, copy)]
        settle(public)
        come = ["import", "--model", released, "--from", str(public), "--to", str(run)]
        steps.append(run_command_line("import", come, run, gigabytes))
        shutil.rmtree(public)
        go = ["export", "--from", str(run), "--to", str(export), "--shard-gb", f"{SHARD_BYTES / 1e9:g}"]
        steps.append(run_command_line("export", go, export, gigabytes))
        return steps, count_different(export, config)
    finally:
        for path in places:
            shutil.rmtree(path, ignore_errors=True)


def format_steps(model: str, steps: Sequence[Step], different: int) -> str:
    """A table; rates also as a share of the plain copy's."""
    lines = [f"{model}: {'step':<24}{'GB':>7}{'s':>8}{'MB/s':>8}{'of copy':>9}{'memory GB':>11}"]
    indent = " " * (len(model) + 2)
    for step in steps:
        memory = "-" if step.peak_gigabytes is None else f"{step.peak_gigabytes:.2f}"
        share = step.rate / steps[0].rate
        row = f"{step.gigabytes:>7.2f}{step.seconds:>8.1f}{step.rate:>8.0f}{share:>9.0%}{memory:>11}"
        lines.append(f"{indent}{step.name:<24}{row}")
    lines.append(f"{indent}{'every tensor has its bits' if not different else f'{different} tensors differ'}")
    return "\n".join(lines)


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.benchmarks.conversion", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--model", choices=tuple(MODELS), required=True, help=", ".join(MODELS))
    parser.add_argument("--folder", required=True, type=Path, help="where to write, with twice the model's size free")
    return parser


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures and prints; returns 1 if a tensor came back with other bits."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    steps, different = measure(arguments.model, arguments.folder)
    print(format_steps(arguments.model, steps, different))
    return int(different > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(benchmark, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
