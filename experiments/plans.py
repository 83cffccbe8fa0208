"""Plans every full-size stage on its recommended slices and writes a table.

    python -m experiments.plans                          # all: 32 compilations of about a minute each on two cores
    python -m experiments.plans stage_1_3 stage_2_2      # only these stages
    python -m experiments.plans --output /tmp/plans.md

Every stage is compiled in a process of its own, by `python -m vita_jax.plan`. Lines of stages that are planned again
replace the old ones; the others stay.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.vita_1_0.curriculum import SLICES as SLICES_1_0
from experiments.vita_1_5.curriculum import SLICES as SLICES_1_5
from vita_jax.command_line import ArgumentParser, run_command

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "one"  # the slice of any single device
HEAD = """\
# Full-size stages on TPU slices

Written by `python -m experiments.plans`: the training step of every stage, compiled by XLA's TPU compiler for the slice
that its configuration recommends. `rows` are packed rows of a step x tokens of a row / micro-batches; `state`, `peak`
and `headroom` are of one device; a step takes at least the time given, and MFU is at most the share given.
How these numbers are computed is said in docs/plan.md.
"""


def stage_files() -> list[tuple[Path, list[str]]]:
    """Every stage's file, and the slices it is laid out for."""
    found = []
    for folder, slices in (("vita_1_5", SLICES_1_5), ("vita_1_0", SLICES_1_0)):
        names = [name for name in slices if name != DEVICE]
        found += [(path, names) for path in sorted((ROOT / "experiments" / folder).glob("stage_*.py"))]
    return found


def model_of(path: Path) -> str:
    """`VITA-1.5` for a file of `vita_1_5/`."""
    return path.parent.name.replace("vita_", "VITA-").replace("_", ".")


def plan_line(path: Path, slice: str) -> str:
    """The table's line of one stage on one slice. Raises RuntimeError if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.md"
        command = [sys.executable, "-m", "vita_jax.plan", f"--config={path}", f"--config.slice={slice}"]
        done = subprocess.run(
            [*command, f"--topology={slice}", f"--table={table}"], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode not in (0, 1) or not table.is_file():
            raise RuntimeError(f"{path.name} on {slice}: {done.stderr.strip()[-2000:]}")
        head, rule, line = table.read_text(encoding="utf-8").splitlines()
    return line


def read_lines(output: Path) -> dict[str, str]:
    """The lines of an earlier table by what they plan: `model | stage | slice`."""
    if not output.is_file():
        return {}
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| VITA")]
    return {" | ".join(cell.strip() for cell in row.split("|")[1:4]): row for row in rows}


def write_table(output: Path, lines: dict[str, str]) -> None:
    """Head and lines, sorted by model, stage and slice."""
    from vita_jax.planning.report import COLUMNS

    columns = ("model", *COLUMNS)
    rule = "| " + " | ".join("---" for _ in columns) + " |"
    table = ["| " + " | ".join(columns) + " |", rule, *(lines[key] for key in sorted(lines, reverse=True))]
    output.write_text(HEAD + "\n" + "\n".join(table) + "\n", encoding="utf-8")


def plan_all(arguments: object) -> int:
    """Plans what is asked for; the table is written after every line, so that a run can be stopped."""
    output = Path(arguments.output)
    lines = read_lines(output)
    chosen = [(path, names) for path, names in stage_files() if not arguments.stages or path.stem in arguments.stages]
    for path, names in chosen:
        for slice in names:
            line = f"| {model_of(path)} {plan_line(path, slice)}"
            lines[" | ".join(cell.strip() for cell in line.split("|")[1:4])] = line
            write_table(output, lines)
            print(line, flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    parser = ArgumentParser(prog="python -m experiments.plans", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="names of stage files, such as stage_1_3")
    parser.add_argument("--output", default="plans.md", metavar="FILE", help="the document")
    return run_command(plan_all, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
