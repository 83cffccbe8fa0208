"""Plans every full-size stage on its recommended slices and writes a table.

    python -m experiments.plans                          # all: 65 compilations of about a minute each on two cores
    python -m experiments.plans stage_1_3 stage_2_2      # only these stages
    python -m experiments.plans --missing                # only what the document lacks
    python -m experiments.plans --output /tmp/plans.md

Every stage is compiled in a process of its own, by `python -m vita_jax.plan`. Lines of stages that are planned again
replace the old ones; the others stay. The document is docs/plans.md; `python -m experiments.stage_tables` then brings
its times into docs/stages.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.flamingo.curriculum import MODELS as MODELS_FLAMINGO
from experiments.flamingo.curriculum import SLICES as SLICES_FLAMINGO
from experiments.llava.curriculum import MODELS as LLAVAS
from experiments.llava.curriculum import SLICES as SLICES_LLAVA
from experiments.vita_1_0.curriculum import SLICES as SLICES_1_0
from experiments.vita_1_5.curriculum import SLICES as SLICES_1_5
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.config import load_config_file
from vita_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "one"  # the slice of any single device
HEAD = """\
# Full-size stages on TPU slices

Written by `python -m experiments.plans`: the training step of every stage, compiled by XLA's TPU compiler for the slice
that its configuration recommends. `rows` are packed rows of a step x tokens of a row / micro-batches; `state`, `peak`
and `headroom` are of one device; a step takes at least the time given, and MFU is at most the share given.
How these numbers are computed is said in [planning](plan.md#what-each-number-is).
"""


class Planned(NamedTuple):
    """A stage of a model: its file, the slices it is laid out for, and what else the file is asked for."""

    model: str
    path: Path
    slices: list[str]
    options: tuple[str, ...] = ()


def stage_files() -> Iterator[Planned]:
    """Every stage of every model."""
    folder = ROOT / "experiments"
    for model, name, slices in (("VITA-1.5", "vita_1_5", SLICES_1_5), ("VITA-1.0", "vita_1_0", SLICES_1_0)):
        for path in sorted((folder / name).glob("stage_*.py")):
            yield Planned(model, path, [slice for slice in slices if slice != DEVICE])
    for version, scale in LLAVAS:
        model = f"LLaVA-{'1.5-' if version == 'v1_5' else ''}{scale.upper()}"
        for path in sorted((folder / "llava").glob(f"{version}_stage_*.py")):
            slices = [slice for slice in SLICES_LLAVA if slice != DEVICE]
            yield Planned(model, path, slices, (f"--config.scale={scale}",))
    for scale in MODELS_FLAMINGO:
        slices = [slice for slice in SLICES_FLAMINGO if slice != DEVICE]
        options = (f"--config.scale={scale}",)
        yield Planned(f"Flamingo-{scale.upper()}", folder / "flamingo" / "pretrain.py", slices, options)


def key_of(planned: Planned, slice: str) -> str:
    """What `read_lines` calls the table's line of one stage on one slice."""
    overrides = dict(option.removeprefix("--config.").split("=") for option in planned.options)
    config = load_config_file(planned.path, {**overrides, "slice": slice})
    return f"{planned.model} | {config.stages[0].title} | {slice}"


def plan_line(planned: Planned, slice: str) -> str:
    """The table's line of one stage on one slice. Raises UserError with the command's last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.md"
        command = [sys.executable, "-m", "vita_jax.plan", f"--config={planned.path}", f"--config.slice={slice}"]
        done = subprocess.run(
            [*command, *planned.options, f"--topology={slice}", f"--table={table}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode not in (0, 1) or not table.is_file():
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            # The compiler's library logs to the same place, also behind the command's own words.
            said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
            raise UserError(f"{planned.path.name} on {slice}: status {done.returncode}: {said.removeprefix('error: ')}")
        head, rule, line = table.read_text(encoding="utf-8").splitlines()
    return line


def read_lines(output: Path) -> dict[str, str]:
    """The lines of an earlier table by what they plan: `model | stage | slice`."""
    if not output.is_file():
        return {}
    known = ("| VITA", "| LLaVA", "| Flamingo")
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith(known)]
    return {" | ".join(cell.strip() for cell in row.split("|")[1:4]): row for row in rows}


def write_table(output: Path, lines: dict[str, str]) -> None:
    """Head and lines, sorted by model, stage and slice."""
    from vita_jax.planning.report import COLUMNS

    columns = ("model", *COLUMNS)
    rule = "| " + " | ".join("---" for _ in columns) + " |"
    table = ["| " + " | ".join(columns) + " |", rule, *(lines[key] for key in sorted(lines, reverse=True))]
    output.write_text(HEAD + "\n" + "\n".join(table) + "\n", encoding="utf-8")


def plan_all(arguments: object) -> int:
    """Plans what is asked for; the table is written after every line, so that a run can be stopped.

    A stage that cannot be planned is named and left out; the status is 1 then.
    """
    output = Path(arguments.output)
    lines = read_lines(output)
    failed = False
    known = list(stage_files())
    names = list(dict.fromkeys(planned.path.stem for planned in known))
    for name in arguments.stages:
        if name not in names:
            raise UserError(f"there is no stage {name!r}; stages: {', '.join(names)}")
    chosen = [planned for planned in known if not arguments.stages or planned.path.stem in arguments.stages]
    for planned in chosen:
        for slice in planned.slices:
            if arguments.missing and key_of(planned, slice) in lines:
                continue
            try:
                line = f"| {planned.model} {plan_line(planned, slice)}"
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            lines[" | ".join(cell.strip() for cell in line.split("|")[1:4])] = line
            write_table(output, lines)
            print(line, flush=True)
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    parser = ArgumentParser(prog="python -m experiments.plans", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="names of stage files, such as stage_1_3")
    parser.add_argument("--missing", action="store_true", help="leave the lines that the document has as they are")
    parser.add_argument("--output", default="docs/plans.md", metavar="FILE", help="default docs/plans.md")
    return run_command(plan_all, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
