"""`python -m vita_jax.train --config=experiments/quickstart.py`: train a model through all stages of an experiment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from vita_jax import config as config_lib
from vita_jax.command_line import run_with_config
from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import restart_with_huge_pages

HELP = """\
usage: python -m vita_jax.train --config=FILE [--config.FIELD=VALUE ...]

Trains every stage of an experiment and goes on where it was stopped: run the same command again.

  --config=FILE            a Python file that defines get_config(size=...), for example experiments/quickstart.py
  --config.size=SIZE       smoke, small or full, as far as the experiment offers them
  --config.FIELD=VALUE     replaces any field of the configuration, dots between levels; entries of a list by index or
                           name
  --print_config           prints the resolved configuration and stops
  --help                   this text

examples:
  python -m vita_jax.train --config=experiments/quickstart.py
  python -m vita_jax.train --config=experiments/quickstart.py --config.size=smoke --config.run_dir=/tmp/smoke
  python -m vita_jax.train --config=experiments/quickstart.py --config.optimizer.learning_rate=1e-4
  python -m vita_jax.train --config=experiments/quickstart.py --config.stages.vision_sft.steps=500
  python -m vita_jax.train --config=experiments/own_data.py --config.data.json=records.json --config.data.root=pictures

Exit status: 0 done; 2 bad input, a full disk, or too many steps in a row with bad numbers, one line says which;
128 + N stopped by signal N after saving everything (143 for SIGTERM, 130 for SIGINT): run the same command again, and
also after 134: another process died, or did not come.

An experiment file may also define these functions; each is called if it is there:
  prepare(config)                      before training, to build data and tokenizer; may return a changed configuration
  after_stage(config, stage, params)   when a stage is finished
  finish(config)                       when all are

Several processes: the same command for each, with --config.distributed.coordinator=auto where the machine tells them of
each other (TPU slices, Slurm), else HOST:PORT of the first, and .num_processes and .process_id. The first alone calls
the functions above and reports; a signal to any stops all.
"""

HOOKS = ("after_stage", "finish")


def hooks_of(module: ModuleType) -> dict[str, Any]:
    """The functions of an experiment file that are called while it trains; None for those it does not define."""
    return {name: getattr(module, name, None) for name in HOOKS}


def train(arguments: config_lib.ConfigArgs) -> int:
    """Resolves the configuration, prepares the data, trains, finishes. Returns the exit status."""
    # Imported here so that --help and a mistyped flag answer at once.
    from vita_jax.parallel.process import prepare_process
    from vita_jax.parallel.processes import is_first, on_first
    from vita_jax.training import loop
    from vita_jax.training.experiment_file import open_experiment, prepare_data

    print_only = "--print_config" in arguments.rest
    unknown = [argument for argument in arguments.rest if argument != "--print_config"]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; configuration fields start with --config., see --help")
    prepare_process()
    module, config = open_experiment(arguments.file, arguments.overrides)
    if print_only:
        print(config_lib.format_config(config))
        return 0
    config, hooks = prepare_data(module, config), hooks_of(module)
    if is_first():
        print(config_lib.format_config(config), flush=True)

    def after_stage(stage: Any, params: Any) -> None:
        hooks["after_stage"](config, stage, params)

    try:
        loop.run(config, after_stage=after_stage if hooks["after_stage"] else None)
    except loop.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    if hooks["finish"] is not None:
        on_first(lambda: hooks["finish"](config))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, see `HELP`."""
    return run_with_config(train, HELP, argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
