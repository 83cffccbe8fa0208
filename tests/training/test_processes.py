"""Several processes of one run: what they agree on, and that they train as one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.training.test_checkpoint import save_some
from tests.training.test_loop import assert_same_run
from tests.training.test_recovery import numbers_of
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps
from vita_jax.training.loop import HOOK_DONE
from vita_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# Of a loss: sums over devices are taken in another order when they are in several processes.
ROUNDING = 1e-6

AGREE = """
import json, sys
from pathlib import Path
from tests.training.tiny import experiment
from vita_jax.errors import UserError
from vita_jax.parallel.mesh import MeshConfig, check_processes, make_mesh
from vita_jax.parallel.processes import DistributedConfig, Largest, join_processes, on_first
from vita_jax.training.checkpoint import newest_usable
from vita_jax.training.experiment import join_others
from vita_jax.training.loop import gathered_state

place, number, *folders = sys.argv[1:]
number = int(number)
join_processes(DistributedConfig(place, 2, number))

class Batches:
    def get_state(self):
        return {"lanes": {str(number): {"taken": 7 ** (number + 1)}}, "given": 0}

def told(action, *arguments):
    try:
        return action(*arguments)
    except UserError as error:
        return str(error)

def step_of(folder):
    return on_first(lambda: (newest_usable(Path(folder), print) or {"step": None})["step"])

largest = Largest(make_mesh(MeshConfig()), delay=2)
print(json.dumps({
    "state": gathered_state(Batches()),
    "steps": [told(step_of, folder) for folder in folders],
    "meshes": [told(check_processes, make_mesh(MeshConfig(tensor=t))) for t in (1, 2, 4, 8)],
    "largest": [largest(asked) for asked in ([0, 15, 0, 2, 0, 0], [3, 0, 0, 0, 9, 0])[number]],
    "seeds": told(join_others, experiment("run", seed=5 * number)),
}))
"""


def free_place() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(command: list[str], processes: int, **environment: str) -> subprocess.Popen:
    """One of the processes that have eight devices together."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_what_two_processes_agree_on(tmp_path):
    """Among the folders, the newest checkpoint of the first is damaged, all of the second are, the third has none."""
    some, none = tmp_path / "some", tmp_path / "none"
    some_folder, _, _ = save_some(some, steps=(2, 4))
    all_folder, _, _ = save_some(none, steps=(2, 4))
    for folder in (some_folder / "4", all_folder / "4", all_folder / "2"):
        (folder / "meta" / "metadata").write_text("{")
    place, folders = free_place(), [str(folder) for folder in (some_folder, all_folder, tmp_path / "nothing")]
    running = [start(["-c", AGREE, place, str(number), *folders], 2) for number in range(2)]
    ended = [process.communicate(timeout=300) for process in running]
    for out, error in ended:
        assert out, error
        told = json.loads(out.splitlines()[-1])
        assert told["state"] == {"lanes": {"0": {"taken": 7}, "1": {"taken": 49}}, "given": 0}
        assert told["steps"][::2] == [2, None] and f"checkpoint {all_folder}/4 is damaged" in told["steps"][1]
        assert told["largest"] == [0, 0, 3, 15, 0, 2]
        assert told["meshes"][:3] == [None] * 3 and "a batch in 1 parts" in told["meshes"][3]
        assert "different configurations (seed: 0 and 5)" in told["seeds"]
    assert (some_folder / "damaged-4").is_dir() and not (all_folder / "damaged-4").exists()


def slurm_environment(job: int, tasks: int, task: int) -> dict[str, str]:
    """What Slurm tells a task of a job on this machine, as far as jax reads it."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
    }


def free_job() -> int:
    """A job for which jax chooses a port that is free: the last 4096 belong to jobs, by their number."""
    for job in range(1 + os.getpid(), 4096 + os.getpid()):
        with socket.socket() as port:
            if port.connect_ex(("localhost", 61440 + job % 4096)):
                return job
    raise RuntimeError("no free port from 61440 on")


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    out: str
    error: str


def train(
    *run_dirs: Path, processes: int, stop_at: str | None = None, job: int | None = None, heartbeat: int = 100
) -> list[Ended]:
    """Runs `together`; `job`: as tasks of that Slurm job, which find each other by what Slurm tells them."""
    place, running = free_place(), []
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes most of the time
    if stop_at is not None:
        environment["STOP_AT"] = stop_at
    for number in range(processes):
        flags, slurm = {}, {}
        if job is not None:
            flags, slurm = {"coordinator": "auto"}, slurm_environment(job, processes, number)
        elif processes > 1:
            flags = {"coordinator": place, "num_processes": processes, "process_id": number}
        command = ["-m", "tests.training.together", ",".join(map(str, run_dirs))]
        flags["heartbeat_seconds"] = heartbeat
        command += [f"--config.distributed.{name}={value}" for name, value in flags.items()]
        running.append(start(command, processes, **environment, **slurm))
    told = [process.communicate(timeout=600) for process in running]
    return [Ended(process.returncode, *texts) for process, texts in zip(running, told, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs, and how their processes ended.

    `one`, `two`: uninterrupted, by so many processes. `stopped`: by two, of which the second got a signal; gone on with
    by two, and in `two_to_one` by one. `one_to_two`: the first checkpoint of `joint` of `one`, gone on with by two.
    """
    folder = tmp_path_factory.mktemp("together")
    names = ("one", "two", "stopped", "two_to_one", "one_to_two")
    place = {name: folder / name for name in names}
    ended = {"two": train(place["two"], processes=2)}
    ended["stopped"] = train(place["stopped"], processes=2, stop_at="1,joint,1,SIGTERM")
    shutil.copytree(place["stopped"], place["two_to_one"])
    ended["one"] = train(place["one"], place["two_to_one"], processes=1)
    shutil.copytree(place["one"], place["one_to_two"])
    joint = checkpoint_folder(place["one_to_two"], "joint")
    (joint.parent / HOOK_DONE).unlink()
    for step in (4, 6):
        shutil.rmtree(joint / str(step))
    ended["gone_on"] = train(place["stopped"], place["one_to_two"], processes=2, job=free_job())
    for name, all_ended in ended.items():
        for process in all_ended:
            assert process.status == (143 if name == "stopped" else 0), process.out + process.error
    return place, ended


def losses(run_dir: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_metrics(run_dir) if record["event"] == "step"])


def sums_of(process: Ended) -> list[float]:
    """What the hooks made of the parameters."""
    return [float(line.split(": ")[1]) for line in process.out.splitlines() if line.startswith("after")]


@pytest.mark.slow
def test_two_processes_train_as_one_does(runs):
    place, _ = runs
    np.testing.assert_allclose(losses(place["two"]), losses(place["one"]), rtol=ROUNDING)
    assert len(losses(place["two"])) == 8 and losses(place["one"])[-1] < losses(place["one"])[2]


@pytest.mark.slow
def test_only_the_first_process_prepares_reports_and_calls_hooks(runs):
    place, ended = runs
    first, second = ended["two"]
    for text in ("prepared by 0", "after naming by 0", "after joint by 0", "finished by 0", "step 6/6"):
        assert first.out.count(text) == 1, first.out
    assert sums_of(first) == pytest.approx(sums_of(ended["one"][0])[:2], rel=1e-5)
    assert all(line.startswith("[Gloo]") for line in second.out.splitlines()), "a library's, which no one can silence"
    steps = [(record["event"], record["stage"], record["step"]) for record in read_metrics(place["two"])]
    assert len(steps) == len(set(steps)) == 10
    assert len(list((place["two"] / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_go_on_bit_for_bit(runs):
    place, ended = runs
    for process in ended["stopped"]:
        assert "stopped by SIGTERM at step 4 of stage joint" in process.error
    assert "stage joint: going on from step 4 of 6" in ended["gone_on"][0].out
    assert_same_run(place["stopped"], place["two"])
    assert numbers_of(place["stopped"]) == numbers_of(place["two"])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs):
    place, ended = runs
    assert "stage joint: going on from step 4 of 6" in ended["one"][0].out
    assert "stage joint: going on from step 2 of 6" in ended["gone_on"][0].out
    for name in ("two_to_one", "one_to_two"):
        assert complete_steps(checkpoint_folder(place[name], "joint")) == [2, 4, 6]
        np.testing.assert_allclose(losses(place[name]), losses(place["one"]), rtol=ROUNDING)


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends_and_they_go_on_bit_for_bit(runs, tmp_path):
    place, _ = runs
    first, second = train(tmp_path / "run", processes=2, stop_at="1,joint,3,SIGKILL", heartbeat=20)
    assert second.status == -signal.SIGKILL
    assert first.status == -signal.SIGABRT and "another task died" in first.error
    assert complete_steps(checkpoint_folder(tmp_path / "run", "joint"))[-1] < 6
    for process in train(tmp_path / "run", processes=2):
        assert process.status == 0, process.out + process.error
    assert_same_run(tmp_path / "run", place["two"])
