"""A run that somebody has trained, as what the arms of a study start from; it is only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vita_jax.command_line import ArgumentParser
from vita_jax.errors import UserError
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_config, read_meta
from vita_jax.training.experiment import CheckpointConfig, ExperimentConfig, data_folder, tokenizer_folder
from vita_jax.training.stages import Stage


def add_run(parser: ArgumentParser) -> None:
    """The argument --run."""
    parser.add_argument(
        "--run", default="runs/quickstart", metavar="RUN", help="a finished quickstart; default runs/quickstart"
    )


def open_run(run: str, stages: Sequence[str]) -> ExperimentConfig:
    """The configuration of a run, with its folders as they are now.

    Args:
      run: its folder.
      stages: that have to be finished, at least one.

    Raises:
      UserError: one of them is not, or the run's data is gone.
    """
    for stage in stages:
        folder = checkpoint_folder(run, stage)
        steps = complete_steps(folder)
        if not steps or not read_meta(folder / str(steps[-1]))["finished"]:
            raise UserError(
                f"--run {run}: its stage {stage!r} is not finished; train one with "
                "`python -m vita_jax.train --config=experiments/quickstart.py`, or give another"
            )
    config, place = load_config(folder)
    config = dataclasses.replace(config, run_dir=str(place))
    if not data_folder(config).is_dir():
        raise UserError(f"--run {run}: its data {data_folder(config)} is gone; build it again, or give another run")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, folder=str(data_folder(config))),
        tokenizer=dataclasses.replace(config.tokenizer, folder=str(tokenizer_folder(config))),
    )


def arm_config(run: ExperimentConfig, name: str, run_dir: str, stage: Stage) -> ExperimentConfig:
    """The configuration of an arm that trains one stage in `run_dir`, on the run's data and in all else as the run."""
    checkpoint = CheckpointConfig(every_steps=500, keep=1)
    return dataclasses.replace(run, name=name, run_dir=run_dir, checkpoint=checkpoint, stages=(stage,))
