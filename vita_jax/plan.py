"""`python -m vita_jax.plan --config=... --topology=v5p:4x4x4`: what a stage takes on machines you do not have yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vita_jax import config as config_lib
from vita_jax.command_line import options_of, run_with_config, whole_number
from vita_jax.errors import UserError

HELP = """\
usage: python -m vita_jax.plan --config=FILE --topology=CHIP:SHAPE [--stage=NAME] [--search] [--config.FIELD=VALUE ...]

Compiles the training step of every stage for a slice of TPUs, without any, and prints what it takes: parameters, memory
of a device, model FLOPs, the least time of a step, collectives, the highest possible MFU, and what to change if it does
not fit. A full-size stage takes about a minute. docs/plan.md says how each number is computed.

  --config=FILE            an experiment, such as experiments/vita_1_5/stage_1_3.py
  --topology=CHIP:SHAPE    v4, v5p, tpu7x: three extents (v5p:4x4x4); v5e, v6e: two (v5e:8x8). GPUs by formula, without
                           a compiler: a100, h100, h200 with their number (h100:64)
  --stage=NAME             only this stage of the experiment
  --search                 tries meshes, remat policies and micro-batches, and ranks those that fit
  --tries=N                compilations of a search (default 6)
  --table=FILE             appends one line per stage to a Markdown table
  --config.FIELD=VALUE     replaces any field of the configuration
  --help                   this text

examples:
  python -m vita_jax.plan --config=experiments/vita_1_5/stage_1_3.py --config.slice=v5e:8x8 --topology=v5e:8x8
  python -m vita_jax.plan --config=experiments/vita_1_0/stage_3.py --topology=v5p:4x4x8 --search --tries=4
  python -m vita_jax.plan --config=experiments/quickstart.py --config.size=full --stage=vision_sft --topology=h100:64

Exit status: 0 if everything fits, 1 if a stage does not, 2 for bad input.
"""

SWITCHES = ("--search",)
DEFAULTS = {"topology": "", "stage": "", "tries": "6", "table": ""}


def plan(arguments: config_lib.ConfigArgs) -> int:
    """Plans the stages that are asked for. Returns the exit status."""
    searching = "--search" in arguments.rest
    options = options_of([argument for argument in arguments.rest if argument not in SWITCHES], DEFAULTS)
    tries = whole_number(options, "tries", 1)
    if not options["topology"]:
        raise UserError("--topology=CHIP:SHAPE is missing, for example --topology=v5p:4x4x4; see --help")
    # Imported here so that --help and a mistyped flag answer at once.
    from vita_jax.planning.report import Result, format_result, format_table
    from vita_jax.planning.search import plan_on, search
    from vita_jax.planning.topology import open_topology
    from vita_jax.training.experiment_file import open_experiment

    topology = open_topology(options["topology"])
    _, config = open_experiment(arguments.file, arguments.overrides, topology.num_devices)
    stages = [config.stage(options["stage"])] if options["stage"] else config.stages
    results: list[Result] = []
    for stage in stages:
        if searching:
            found = search(config, stage, topology, tries, progress=lambda text: print(text, flush=True))
            print(f"\n{stage.title}, best first:\n{format_table(found)}\n")
            results.append(found[0])
        else:
            results.append(plan_on(config, stage, topology))
        print(format_result(results[-1]) + "\n", flush=True)
    if options["table"]:
        append_table(Path(options["table"]), format_table(results))
    return 0 if all(result.fits for result in results) else 1


def append_table(path: Path, table: str) -> None:
    """Adds the lines of a table to a file, with the head if the file is new."""
    lines = table.splitlines()
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines if file.tell() == 0 else lines[2:]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_with_config(plan, HELP, argv)


if __name__ == "__main__":
    sys.exit(main())
