"""How fast this package is beside PyTorch with transformers' models: the same sizes, weights and cores, in one run.

    python -m experiments.benchmarks.torch_ratio
    python -m experiments.benchmarks.torch_ratio --cases qwen2_small,tower_small --turns 31
    python -m experiments.benchmarks.torch_ratio --quick                      # seconds; tiny models, says nothing

Qwen2, Mixtral and InternViT towers in float32: a training step (forward, backward, clipping, AdamW), the forward pass,
prefill, and answers with a cache, of one prompt and of eight. Before an operation is timed, its results are compared
with PyTorch's within 1e-4, so both compute the same. Then both sides take turns; a ratio is PyTorch's time by ours, the
median of all turns, with quartiles: above 1 we are faster. PyTorch runs by eager kernels in the fastest of its kinds of
attention, caches and experts (`--compile`: `torch.compile` is one more); ours is compiled by XLA as always.

Threads: `--threads N` binds the process to N cores before XLA makes its threads, of which it makes one for each core,
and sets PyTorch's number to the same. On a machine that is never quiet, `--threads 1 --clock cpu` counts the time that
the process works in place of the time that goes by. Needs torch and transformers: pip install 'vita_jax[dev,convert]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from experiments.benchmarks.torch_sides import STEPS, Operations, Shape, fastest, language_operations, vision_operations
from experiments.benchmarks.turns import (
    CLOCKS,
    describe_machine,
    format_machine,
    format_table,
    take_turns,
    use_cores,
    write_page,
)
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError
from vita_jax.models.language.decoder import DecoderConfig, qwen2_7b
from vita_jax.models.vision.internvit import InternViTConfig, internvit_300m_448px
from vita_jax.models.vita import vita_small
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.parallel.process import prepare_process

EXAMPLES = """\
examples:
  python -m experiments.benchmarks.torch_ratio --threads 2
  python -m experiments.benchmarks.torch_ratio --cases mixtral_small --operations train,forward --output /tmp/ratios
"""
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
GOAL, FLOOR, ANSWER_GOAL = 1.0, 0.8, 2.0  # of the median of all rows, of every row, of answers to one prompt
NOTES = "## What is behind the rows below the floor"  # from here on the written file is kept: a person's words


@dataclass(frozen=True)
class Case:
    """One model at one size, and what it is timed at; no `operations` means all that it has."""

    config: DecoderConfig | InternViTConfig
    shape: Shape
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      case, operation, kind: what was timed, and how on PyTorch's side.
      ratio, lower, upper: PyTorch's time by ours, median and quartiles.
      ours_ms, torch_ms: medians of a call.
      difference: the largest between numbers of both sides.
    """

    case: str
    operation: str
    ratio: float
    lower: float
    upper: float
    ours_ms: float
    torch_ms: float
    kind: str
    difference: float


def sparse(config: DecoderConfig) -> DecoderConfig:
    """A Mixtral of a Qwen2's size: eight experts of its width, of which two work on a token."""
    return replace(config, num_experts=8, qkv_bias=False, rms_norm_eps=1e-5)


def cases() -> dict[str, Case]:
    """What is measured by default: the quickstart's sizes, larger ones, and layers of the released models."""
    small, middle = vita_small(), vita_small(512, 8, vocab_size=8192)
    middle_tower = InternViTConfig(512, 8, 8, 2048, image_size=224, patch_size=14)
    one_layer = replace(qwen2_7b(), num_layers=1, vocab_size=1024, remat="none")
    two_layers = replace(internvit_300m_448px(), num_layers=2, drop_path_rate=0.0)
    few_layers = replace(sparse(middle.language), num_layers=4)
    return {
        "qwen2_small": Case(small.language, Shape(6, 208, 256, 64)),
        "qwen2_middle": Case(middle.language, Shape(4, 256, 256, 32)),
        "qwen2_7b_layer": Case(one_layer, Shape(1, 128, 128, 8), ("forward", "prefill", "decode 1", "decode 8")),
        "mixtral_small": Case(sparse(small.language), Shape(6, 208, 256, 64)),
        "mixtral_middle": Case(few_layers, Shape(2, 256, 256, 32)),
        "tower_small": Case(small.vision, Shape(48)),
        "tower_middle": Case(middle_tower, Shape(4)),
        "tower_300m_layers": Case(two_layers, Shape(1)),
    }


def quick_cases() -> dict[str, Case]:
    """Tiny models of every kind."""
    tiny = vita_small(32, 2, 48, 64)
    shape = Shape(2, 12, 8, 3)
    return {
        "qwen2": Case(tiny.language, shape),
        "mixtral": Case(sparse(tiny.language), shape),
        "tower": Case(tiny.vision, Shape(2)),
    }


def operations_of(case: Case, compiled: bool) -> Operations:
    """What the case is timed at, in order."""
    build = vision_operations if isinstance(case.config, InternViTConfig) else language_operations
    operations = build(case.config, case.shape, compiled)
    return {name: operations[name] for name in case.operations or operations}


def measure(
    chosen: dict[str, Case],
    *,
    turns: int,
    sample_seconds: float,
    clock: str = "wall",
    compiled: bool = False,
    only: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows, one after the other.

    Args:
      chosen: cases by name.
      turns, sample_seconds, clock: see `take_turns`.
      compiled: whether `torch.compile` is tried.
      only: operations; none = all.

    Raises:
      UserError: the sides do not agree, see `torch_sides.fastest`.
    """
    for name, case in chosen.items():
        for operation, make in operations_of(case, compiled).items():
            if only and operation not in only:
                continue
            sides = make()
            theirs = fastest(sides, f"{name}, {operation}", clock)
            ratio = take_turns(sides.ours, theirs.call, turns=turns, sample_seconds=sample_seconds, clock=clock)
            times = (1e3 * ratio.first_seconds, 1e3 * ratio.other_seconds)
            figures = (ratio.median, ratio.lower, ratio.upper, *times)
            yield Row(name, operation, *figures, theirs.kind.name, theirs.difference)


# ---- what is printed ------------------------------------------------------------------------------------------------


def format_rows(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """The table."""
    head = ("model", "operation", "ratio", "quartiles", "ours ms", "torch ms", "torch runs", "largest difference")
    cells = [
        (
            row.case,
            row.operation,
            f"{row.ratio:.2f}",
            f"{row.lower:.2f} to {row.upper:.2f}",
            f"{row.ours_ms:.2f}",
            f"{row.torch_ms:.2f}",
            row.kind,
            f"{row.difference:.0e}",
        )
        for row in rows
    ]
    return format_table(head, cells, markdown=markdown)


def summarise(rows: Sequence[Row]) -> list[str]:
    """The goals, and what was reached."""
    below = [f"{row.case} {row.operation} ({row.ratio:.2f})" for row in rows if row.ratio < FLOOR]
    lines = [
        f"median of all {len(rows)} rows {np.median([row.ratio for row in rows]):.2f} (goal {GOAL:g})",
        f"rows below {FLOOR:g}: {', '.join(below) or 'none'}",
    ]
    answers = [row.ratio for row in rows if row.operation in ("decode 1", STEPS)]
    if answers:
        lines.append(
            f"answers to one prompt: {min(answers):.2f} to {max(answers):.2f}, median {np.median(answers):.2f} "
            f"(goal {ANSWER_GOAL:g})"
        )
    return lines


def describe_cases(chosen: dict[str, Case]) -> str:
    """The sizes, as a table in Markdown."""
    head = (
        "model",
        "width",
        "layers",
        "feed-forward",
        "vocabulary or tile",
        "training and forward",
        "prefill",
        "answer",
    )
    cells = []
    for name, case in chosen.items():
        config, shape = case.config, case.shape
        if isinstance(config, InternViTConfig):
            last = (f"{config.image_size} px", f"{shape.rows} tiles of {config.grid_side**2 + 1}", "-", "-")
        else:
            batch = f"{shape.rows} x {shape.length} tokens"
            last = (f"{config.vocab_size} rows", batch, str(shape.prompt), str(shape.new_tokens))
        experts = getattr(config, "num_experts", 0)
        wide = f"{experts} x {config.intermediate_size}" if experts else str(config.intermediate_size)
        cells.append((name, str(config.hidden_size), str(config.num_layers), wide, *last))
    return format_table(head, cells, markdown=True)


def write_results(
    output: Path, chosen: dict[str, Case], rows: Sequence[Row], machine: dict[str, str], turns: int
) -> None:
    """Writes the table, the goals and the sizes, see `turns.write_page`."""
    text = f"""\
# Speed beside PyTorch

Written by `python -m experiments.benchmarks.torch_ratio`; what is compared, and how, is said at its top. Ratios are
PyTorch's time by ours, medians of {turns} turns with quartiles: above 1 we are faster. Float32. The machine has other
jobs beside this one; the sides take turns within the run, so ratios hold where milliseconds may not.

{format_machine(machine)}

{format_rows(rows, markdown=True)}

{chr(10).join(f"* {line}" for line in summarise(rows))}

## Sizes

{describe_cases(chosen)}

`decode b` is b answers in one call, `{STEPS}` one answer by a call for every token; prompts have 16 tokens.
"""
    write_page(output, text, NOTES, {"machine": machine, "turns": turns, "rows": [asdict(row) for row in rows]})


def choose(names: str | None, available: dict[str, Case]) -> dict[str, Case]:
    """The cases named, separated by commas; all for None. Raises UserError for an unknown one."""
    if names is None:
        return available
    for name in names.split(","):
        if name not in available:
            raise UserError(f"--cases: {name!r} is unknown; use some of {', '.join(available)}")
    return {name: available[name] for name in names.split(",")}


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.benchmarks.torch_ratio", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--cases", metavar="A,B", help="default all")
    parser.add_argument("--operations", default="", metavar="A,B", help="default all")
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="samples of each side (default 15)")
    parser.add_argument(
        "--sample-seconds",
        type=float,
        default=0.05,
        metavar="X",
        help="a sample lasts at least this long (default 0.05)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores of both sides (default all of this process)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time worked; one thread only")
    parser.add_argument("--compile", action="store_true", help="PyTorch's side by torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="tiny models, two turns, nothing written by default")
    parser.add_argument("--output", type=Path, metavar="PATH", help="of .md and .json (default results/torch_ratio)")
    return parser


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes. Raises UserError for fewer than one turn."""
    if arguments.turns < 1:
        raise UserError(f"--turns {arguments.turns} must be at least 1")
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise UserError("--clock cpu needs --threads 1: several threads may work at nothing but waiting")
    threads = use_cores(arguments.threads)
    prepare_process()
    torch.set_num_threads(threads)
    machine = describe_machine(PACKAGES) | {"threads of each side": str(threads), "clock": arguments.clock}
    quick = arguments.quick
    chosen = choose(arguments.cases, quick_cases() if quick else cases())
    turns, sample_seconds = (2, 0.0) if quick else (arguments.turns, arguments.sample_seconds)
    output = arguments.output or (None if quick else RESULTS / "torch_ratio")
    options = {"clock": arguments.clock, "compiled": arguments.compile}
    only = tuple(filter(None, arguments.operations.split(",")))
    rows: list[Row] = []
    for row in measure(chosen, turns=turns, sample_seconds=sample_seconds, only=only, **options):
        print(f"{row.case} {row.operation}: {row.ratio:.2f}", file=sys.stderr, flush=True)
        rows.append(row)
        if output is not None:  # after every row, so that a run can be stopped
            write_results(output, chosen, rows, machine, turns)
    if not rows:
        raise UserError(f"--operations {arguments.operations} names none that these cases have")
    print(format_machine(machine), format_rows(rows), *summarise(rows), sep="\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(benchmark, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
