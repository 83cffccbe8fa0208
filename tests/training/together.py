"""The tiny experiment on records, for several processes: `python -m tests.training.together RUN_DIR[,RUN_DIR] FLAG ...`
trains in each folder in turn and ends with the highest exit status. Its hooks tell who called them.

`STOP_AT=process,stage,number,signal`: this process sends itself the signal, such as SIGTERM, when it fetches that batch
of that stage.
"""

from __future__ import annotations

import os
import signal
import sys

import jax

from tests.training.records import prepare_records, records_experiment
from vita_jax import config as config_lib
from vita_jax import train
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.training import loop
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder
from vita_jax.training.stages import Stage, flatten

record_batches = loop.record_batches
# Eight rows in two lanes; parameters are cut over all devices, so that no process has any of them whole.
OVERRIDES = {
    "stages.naming.batch_size": "8",
    "stages.joint.batch_size": "8",
    "data.lanes": "2",
    "mesh.fsdp": "8",
    "log.every_steps": "1",
}


def get_config() -> ExperimentConfig:
    """`naming` for 2 steps, `joint` for 6; every second one is saved."""
    return config_lib.apply_overrides(records_experiment("unset"), OVERRIDES)


def prepare(config: ExperimentConfig) -> ExperimentConfig:
    """Completes the configuration, too, which the other processes have to be told."""
    print("prepared by", jax.process_index())
    config = config_lib.apply_overrides(config, {"data.folder": f"{config.run_dir}/data", "checkpoint.keep": "9"})
    if not tokenizer_folder(config).is_dir():
        prepare_records(config)
    return config


def after_stage(config: ExperimentConfig, stage: Stage, params: dict) -> None:
    """Computes with the parameters, which a process can only do alone if they are all its own."""
    total = jax.jit(lambda leaves: sum(leaf.sum() for leaf in leaves))(list(flatten(params).values()))
    print(f"after {stage.name} by {jax.process_index()}: {float(total):.3f}")


def finish(config: ExperimentConfig) -> None:
    """Reads what was trained."""
    params = loop.load_params(config.run_dir).params
    print("finished by", jax.process_index(), sorted(params))


def stopping_batches(config: ExperimentConfig, stage: Stage, *, tokenizer: Tokenizer) -> loop.BatchIterator:
    """Those of the loop; see the top of this file."""
    batches = record_batches(config, stage, tokenizer=tokenizer)
    process, name, number, sent = os.environ["STOP_AT"].split(",")
    if (process, name) != (str(jax.process_index()), stage.name):
        return batches

    class Stopping:
        counts = batches.counts
        get_state, set_state, close = batches.get_state, batches.set_state, batches.close
        fetched = 0

        def __next__(self) -> dict:
            if self.fetched == int(number):
                signal.raise_signal(signal.Signals[sent])
            self.fetched += 1
            return next(batches)

    return Stopping()


def main(run_dirs: str, *flags: str) -> int:
    """Trains."""
    if "STOP_AT" in os.environ:
        loop.record_batches = stopping_batches
    return max(
        train.main([f"--config={__file__}", f"--config.run_dir={folder}", *flags]) for folder in run_dirs.split(",")
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
