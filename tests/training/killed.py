"""The tiny experiment as a process to be killed: `python -m tests.training.killed RUN_DIR`.

It writes a line for every step it begins and every checkpoint it is about to complete, and takes its time over both, so
that whoever reads along can choose the moment.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.training.tiny import Batches, experiment, make_batches
from vita_jax.training import checkpoint, loop
from vita_jax.training.experiment import CheckpointConfig, ExperimentConfig, LogConfig
from vita_jax.training.stages import Stage

STEP, SAVING = "begins step", "writes a manifest"
PAUSE = 0.05  # seconds


def config_of(run_dir: str | Path) -> ExperimentConfig:
    """Reports and checkpoints out of step with each other, so that checkpoints fall into the middle of a report."""
    return experiment(run_dir, checkpoint=CheckpointConfig(every_steps=2, keep=2), log=LogConfig(every_steps=3))


def talking_batches(config: ExperimentConfig, stage: Stage) -> Batches:
    """Those of `tiny.make_batches`, announced."""
    quiet = make_batches(config, stage)

    class Talking(Batches):
        def __next__(self):
            print(STEP, stage.name, self.position, flush=True)
            time.sleep(PAUSE)
            return super().__next__()

    return Talking(quiet.seed, quiet.rows, quiet.length, quiet.tiles)


def main(run_dir: str) -> None:
    """Trains."""
    write = checkpoint.write_manifest

    def slow_write(folder: Path) -> None:
        print(SAVING, folder.name, flush=True)
        time.sleep(PAUSE)
        write(folder)
        time.sleep(PAUSE)

    checkpoint.write_manifest = slow_write
    loop.run(config_of(run_dir), make_batches=talking_batches)


if __name__ == "__main__":
    main(sys.argv[1])
