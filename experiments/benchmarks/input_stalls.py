"""Which share of a training step waits for data, with a step of the planned length in the accelerator's place.

    python -m experiments.benchmarks.input_stalls
    python -m experiments.benchmarks.input_stalls --modalities image,video --workers 2 --steps 10

Records as `experiments.benchmarks.loader` draws them are built and read by the package's loader, by worker processes,
into the batches that one chip gets in a full-size stage of VITA-1.5: 2.2 for sound, 1.3 for everything else. A step is
a sleep as long as the chip takes for the stage's model FLOPs (`vita_jax.training.flops`) at 40 % of its peak; meanwhile
the loader goes on. What counts is how long `next` takes after each sleep, as a share of all time; the first batch, for
which processes start, is told apart. Goal: below 1 %, with no more cores than the chip has in its host.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.benchmarks.loader import MODALITIES, UTILISATION, build, full_context
from experiments.benchmarks.turns import describe_machine, format_machine, format_table, write_page
from experiments.vita_1_5 import stage_1_3, stage_2_2
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.lanes import Reading
from vita_jax.data.loader import SourceConfig, make_loader
from vita_jax.errors import UserError
from vita_jax.parallel.chips import CHIPS
from vita_jax.training.flops import stage_flops

EXAMPLES = """\
examples:
  python -m experiments.benchmarks.input_stalls --chip v6e
  python -m experiments.benchmarks.input_stalls --workers 0 --threads 1 --step-seconds 2
"""
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("grain", "array-record", "numpy")
NOTES = "## What this says"  # from here on the written file is kept: a person's words
GOAL = 0.01
CHIPS_OF_SLICE = 32  # of v5p:4x4x2, for which the stages are laid out


@dataclass(frozen=True)
class Step:
    """What one chip has to do.

    Attributes:
      rows, length, tiles, clips, frames: its batch: packed rows, and what fits into one.
      seconds: a step takes.
    """

    rows: int
    length: int
    tiles: int
    clips: int
    frames: int
    seconds: float


@dataclass(frozen=True)
class Stall:
    """One line of the table.

    Attributes:
      modality: of the records.
      rows, step_seconds: of a step.
      records: read for a step.
      first_seconds: until the first batch, start of the workers included.
      wait_seconds, longest_seconds: of the later batches, mean and longest.
      share: of all time after the first batch that was spent waiting.
    """

    modality: str
    rows: int
    step_seconds: float
    records: float
    first_seconds: float
    wait_seconds: float
    longest_seconds: float
    share: float


def planned_step(modality: str, chip: str) -> Step:
    """The step of the stage that trains on records of this kind, for one chip."""
    config = (stage_2_2 if modality == "audio" else stage_1_3).get_config("full", slice="v5p:4x4x2")
    (stage,) = config.stages
    flops = stage_flops(config, stage).total / CHIPS_OF_SLICE
    return Step(
        rows=stage.batch_size // CHIPS_OF_SLICE,
        length=stage.row_length,
        tiles=stage.row_tiles,
        clips=stage.row_clips,
        frames=stage.clip_frames,
        seconds=flops / (UTILISATION * CHIPS[chip].peak_flops_bf16),
    )


def measure(modality: str, step: Step, reading: Reading, *, records: int, steps: int, folder: Path) -> Stall:
    """Takes steps and waits for their batches.

    Args:
      modality: a name of `MODALITIES`.
      step: what is read for a step, and how long it takes.
      reading: threads or workers of the loader.
      records: drawn and built, then read again and again, in a new order each time.
      steps: after the first batch.
      folder: for the records.
    """
    built = build(modality, records, folder)
    loader = make_loader(
        [SourceConfig(str(built))],
        full_context(),
        batch_size=step.rows,
        row_length=step.length,
        row_tiles=step.tiles,
        row_clips=step.clips,
        clip_frames=step.frames,
        seed=0,
        reading=reading,
    )
    with contextlib.closing(loader):
        first, waits, seen = _wait(loader), [], []
        for _ in range(steps):
            time.sleep(step.seconds)
            seen.append(loader.counts.seen)
            waits.append(_wait(loader))
    waited = float(np.sum(waits))
    return Stall(
        modality=modality,
        rows=step.rows,
        step_seconds=step.seconds,
        records=(seen[-1] - seen[0]) / max(1, steps - 1),
        first_seconds=first,
        wait_seconds=waited / steps,
        longest_seconds=max(waits),
        share=waited / (waited + steps * step.seconds),
    )


def _wait(loader: Iterator) -> float:
    """Seconds until the next batch."""
    start = time.perf_counter()
    next(loader)
    return time.perf_counter() - start


# ---- what is printed ------------------------------------------------------------------------------------------------


def format_stalls(stalls: Sequence[Stall], *, markdown: bool = False) -> str:
    """The table."""
    head = ("records", "rows", "step s", "records/step", "first batch s", "wait ms", "longest ms", "share")
    cells = [
        (
            stall.modality,
            str(stall.rows),
            f"{stall.step_seconds:.2f}",
            f"{stall.records:.1f}",
            f"{stall.first_seconds:.2f}",
            f"{1e3 * stall.wait_seconds:.1f}",
            f"{1e3 * stall.longest_seconds:.1f}",
            f"{stall.share:.2%}",
        )
        for stall in stalls
    ]
    return format_table(head, cells, markdown=markdown)


def summarise(stalls: Sequence[Stall]) -> str:
    """The goal, and what was reached."""
    over = [stall.modality for stall in stalls if stall.share >= GOAL]
    return f"waiting takes {max(stall.share for stall in stalls):.2%} at most (goal below {GOAL:.0%})" + (
        f"; over the goal: {', '.join(over)}" if over else ""
    )


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.benchmarks.input_stalls", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--modalities", default=",".join(MODALITIES), metavar="A,B", help=", ".join(MODALITIES))
    parser.add_argument("--records", type=int, default=48, metavar="N", help="of each modality (default 48)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of each modality (default 8)")
    parser.add_argument("--chip", choices=tuple(CHIPS), default="v5p", help="that is planned with (default v5p)")
    parser.add_argument("--step-seconds", type=float, metavar="X", help="instead of the planned length")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read (default one for each core)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads that read, without workers")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "input_stalls", metavar="PATH", help="of .md and .json"
    )
    return parser


def run(
    modalities: Sequence[str],
    reading: Reading,
    *,
    records: int,
    steps: int,
    chip: str = "v5p",
    step_seconds: float | None = None,
) -> Iterator[Stall]:
    """The stalls, one modality after the other.

    Raises:
      UserError: an unknown modality, or a number below 1.
    """
    for name, value in (("records", records), ("steps", steps)):
        if value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    for modality in modalities:
        if modality not in MODALITIES:
            raise UserError(f"--modalities: {modality!r} is unknown; use some of {', '.join(MODALITIES)}")
    with tempfile.TemporaryDirectory() as folder:
        for modality in modalities:
            step = planned_step(modality, chip)
            if step_seconds is not None:
                step = dataclasses.replace(step, seconds=step_seconds)
            yield measure(modality, step, reading, records=records, steps=steps, folder=Path(folder))


def write_results(output: Path, stalls: Sequence[Stall], machine: dict[str, str], chip: str) -> None:
    """Writes the table, see `turns.write_page`."""
    text = f"""\
# Waiting for data

Written by `python -m experiments.benchmarks.input_stalls`; what is measured, and how, is said at its top. A step is a
sleep of the length that one {chip} takes for its part of a full-size stage. The machine has other jobs beside this one.

{format_machine(machine)}

{format_stalls(stalls, markdown=True)}

{summarise(stalls)}
"""
    content = {"machine": machine, "chip": chip, "stalls": [dataclasses.asdict(stall) for stall in stalls]}
    write_page(output, text, NOTES, content)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 1 if a modality misses the goal."""
    workers = arguments.workers
    if workers is None:
        workers = 0 if arguments.threads else os.cpu_count() or 1
    reading = Reading(arguments.threads, workers)
    machine = describe_machine(PACKAGES) | {"reading": f"{workers} workers, {arguments.threads} threads"}
    stalls = list(
        run(
            arguments.modalities.split(","),
            reading,
            records=arguments.records,
            steps=arguments.steps,
            chip=arguments.chip,
            step_seconds=arguments.step_seconds,
        )
    )
    print(format_machine(machine), format_stalls(stalls), summarise(stalls), sep="\n")
    write_results(arguments.output, stalls, machine, arguments.chip)
    return int(any(stall.share >= GOAL for stall in stalls))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(benchmark, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
