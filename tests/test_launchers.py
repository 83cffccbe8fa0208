"""What launchers do when a slice is preempted, a job dies or training ends, with stand-ins for what they call."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    env |= {"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"}
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)


def program(folder: Path, name: str, body: str) -> None:
    """An executable that a launcher will call."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}")
    (folder / name).chmod(0o755)


# ---- launch/job.sh --------------------------------------------------------------------------------------------------


def job(*words: str | Path) -> str:
    done = run("bash", "launch/job.sh", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_job_outlives_its_terminal_and_tells_how_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "a job"
    assert job("status", folder) == "job: none\n"
    save = "trap 'echo saved; exit 143' TERM; echo begun; while :; do sleep 0.05; done"
    assert job("start", folder, "--", "bash", "-c", save) == f"started; log: {folder}/log.txt\n"
    assert job("status", folder) == "job: running\n"
    refused = run("bash", "launch/job.sh", "start", folder, "--", "true")
    assert (refused.returncode, refused.stderr.split(";")[0]) == (1, f"error: {folder} has a command that is running")
    assert job("stop", folder) == "job: exit 143\n"
    assert job("logs", folder).splitlines()[1:] == ["begun", "saved"]
    job("start", folder, "--", "bash", "-c", "exit 2")
    while job("status", folder) == "job: running\n":
        time.sleep(0.05)
    assert job("status", folder) == "job: exit 2\n"
    assert job("stop", folder) == "not running; job: exit 2\n"
    assert (folder / "command").read_text() == "bash -c 'exit 2'\n"
    assert sorted(path.name for path in folder.iterdir()) == ["command", "exit_status", "keeper", "log.txt", "pid"]


def test_a_job_of_a_machine_that_was_started_again_is_lost(tmp_path: Path) -> None:
    (tmp_path / "keeper").write_text("1 of-another-boot\n")
    assert job("status", tmp_path) == "job: lost\n"


# ---- launch/tpu_pod.sh ----------------------------------------------------------------------------------------------

# Answers by the next word of a file; what it is asked for goes to another.
GCLOUD = """\
echo "$*" >>"$HERE/asked"
next() { head -n 1 "$HERE/$1"; sed -i 1d "$HERE/$1"; }
case "$*" in
  *describe*)
    state="$(next states)"
    case "$state" in
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1 ;;
      DOWN) echo "ERROR: network is unreachable" >&2; exit 1 ;;
      *) echo "$state" ;;
    esac ;;
  *job.sh\\ status*) next jobs ;;
  *cat\\ vita_jax_job/command*) next commands ;;
  *queued-resources\\ create*) exit "$(next creates)" ;;
esac
"""
OURS = ".venv/bin/python -m vita_jax.train --config=x.py --config.distributed.coordinator=auto"
SHORT = (  # what was asked for, without flags
    ("queued-resources create", "create"),
    ("queued-resources delete", "delete"),
    ("scp", "copy"),
    ("setup.sh", "install"),
    ("job.sh start", "start"),
    ("job.sh stop", "stop"),
)


def watched(
    folder: Path, states: list[str], jobs: list[str], commands: tuple[str, ...] = (), creates: tuple[int, ...] = ()
) -> tuple[int, list[str], str]:
    """Status, what was done beside looking, and messages of `tpu_pod.sh run` with these answers."""
    program(folder / "bin", "gcloud", GCLOUD)
    program(folder / "bin", "git", "echo 0123456789")
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    (folder / "jobs").write_text("".join(f"job: {state}\n" for state in jobs))
    (folder / "commands").write_text("".join(f"{command}\n" for command in commands))
    (folder / "creates").write_text("".join(f"{status}\n" for status in creates))
    (folder / "asked").write_text("")
    (folder / "tmp").mkdir()
    script = [
        "bash",
        "launch/tpu_pod.sh",
        "run",
        "--name=v",
        "--zone=z",
        "--slice=v5e:2x2",
        "--interval=0",
        "--commit=HEAD",
    ]
    done = run(
        *script,
        "--restarts=1",
        "--",
        "--config=x.py",
        path=folder / "bin",
        HERE=str(folder),
        TMPDIR=str(folder / "tmp"),
    )
    asked = (folder / "asked").read_text().splitlines()
    acts = [name for line in asked for word, name in SHORT if word in line]
    assert {(folder / name).read_text() for name in ("states", "jobs", "commands", "creates")} == {""}
    assert not list((folder / "tmp").iterdir())
    return done.returncode, acts, done.stderr


BRING_UP = ["create", "copy", "install", "start"]


def test_a_preempted_slice_is_asked_for_again_and_the_same_command_started(tmp_path: Path) -> None:
    up = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "DOWN"]
    preempted = ["ACTIVE", "SUSPENDING", "SUSPENDED", "DELETING"]
    jobs = ["none", "running", "exit 143", "none", "running", "exit 0"]
    status, acts, told = watched(tmp_path, [*up, *preempted, *up, "ACTIVE"], jobs, creates=(0, 0))
    assert (status, acts) == (0, [*BRING_UP, "delete", *BRING_UP])
    assert "training is done; the slice is still there: launch/tpu_pod.sh delete --name v --zone z" in told
    starts = [line for line in (tmp_path / "asked").read_text().splitlines() if "job.sh start" in line]
    assert len(set(starts)) == 1
    assert "--worker=all" in starts[0] and "--config=x.py --config.distributed.coordinator=auto" in starts[0]


@pytest.mark.parametrize(
    ("jobs", "acts", "told"),
    [
        (["exit 2"], [], "training cannot go on as it is"),
        (["exit 134", "running", "lost"], ["stop", "start"], "training died more than 1 times (now: lost)"),
        (["exit 143"] * 3, [], "training was stopped, and the slice is still there"),
    ],
)
def test_training_that_cannot_go_on_ends_the_watch(tmp_path: Path, jobs: list[str], acts: list[str], told: str) -> None:
    status, done, said = watched(tmp_path, ["ACTIVE"] * (1 + len(jobs)), ["none", *jobs])
    assert (status, done) == (1, [*BRING_UP[1:], *acts])
    assert said.splitlines()[-1].startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("before", "command", "acts"),
    [
        ("exit 2", None, ["stop", *BRING_UP[1:]]),
        ("exit 143", None, ["stop", *BRING_UP[1:]]),
        ("lost", None, ["stop", *BRING_UP[1:]]),
        ("exit 0", "another", ["stop", *BRING_UP[1:]]),
        ("running", OURS, []),
    ],
)
def test_what_had_ended_before_is_started_anew(
    tmp_path: Path, before: str, command: str | None, acts: list[str]
) -> None:
    commands = () if command is None else (command,)
    status, done, said = watched(tmp_path, ["ACTIVE"] * 3, [before, "running", "exit 0"], commands)
    assert (status, done) == (0, acts), said


@pytest.mark.parametrize(
    ("state", "command", "status", "told"),
    [("exit 0", OURS, 0, "training is done"), ("running", "another", 1, "another command is running there: launch")],
)
def test_what_is_there_already_is_found(tmp_path: Path, state: str, command: str, status: int, told: str) -> None:
    found, acts, said = watched(tmp_path, ["ACTIVE"], [state], (command,))
    assert (found, acts) == (status, []) and told in said


def test_a_slice_is_asked_for_again_when_that_was_refused_once(tmp_path: Path) -> None:
    states = ["SUSPENDED", "ABSENT", "ABSENT", "ACTIVE", "ACTIVE"]
    status, acts, said = watched(tmp_path, states, ["none", "exit 0"], creates=(1, 0))
    assert (status, acts) == (0, ["delete", "create", *BRING_UP]) and "was refused; it is asked for again" in said
    again = tmp_path / "again"
    assert watched(again, ["ABSENT"], [], creates=(1,))[:2] == (1, ["create"])


def test_a_slice_that_cannot_be_looked_at_is_an_error_at_once(tmp_path: Path) -> None:
    status, acts, told = watched(tmp_path, ["DOWN"], [])
    assert (status, acts) == (1, [])
    assert told.splitlines()[-1] == "error: gcloud: UNKNOWN (ERROR: network is unreachable)"


# ---- launch/slurm.sbatch and launch/gpu.sh --------------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    """Scripts without what they start."""
    (folder / "launch").mkdir()
    for name in ("slurm.sbatch", "gpu.sh", "common.bash"):
        (folder / "launch" / name).write_bytes((ROOT / "launch" / name).read_bytes())
    (folder / "launch" / "setup.sh").write_text("exit 0\n")
    return folder


@pytest.mark.parametrize(
    ("ended", "count", "status", "queued"),
    [(0, 0, 0, 0), (2, 0, 1, 0), (143, 19, 0, 1), (134, 0, 0, 1), (143, 20, 1, 0)],
)
def test_a_slurm_job_is_queued_again_unless_it_is_over(
    tmp_path: Path, ended: int, count: int, status: int, queued: int
) -> None:
    program(tmp_path / "bin", "srun", f'echo "$*" >"$HERE/srun"; exit {ended}')
    program(tmp_path / "bin", "scontrol", 'echo "$*" >>"$HERE/scontrol"')
    given = {"SLURM_SUBMIT_DIR": checkout(tmp_path), "SLURM_RESTART_COUNT": count, "SLURM_JOB_ID": 7, "HERE": tmp_path}
    given |= {"SLURM_NTASKS_PER_NODE": 8, "SLURM_GPUS_ON_NODE": 8}
    env = {name: str(value) for name, value in given.items()}
    done = run("bash", "launch/slurm.sbatch", "--config=x.py", path=tmp_path / "bin", **env)
    assert done.returncode == status, done.stderr
    assert (
        (tmp_path / "srun")
        .read_text()
        .endswith("-m vita_jax.train --config=x.py --config.distributed.coordinator=auto\n")
    )
    assert (tmp_path / "scontrol").exists() == bool(queued)


def test_slurm_gives_every_process_a_gpu(tmp_path: Path) -> None:
    program(tmp_path / "bin", "srun", "exit 0")
    env = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
    refused = run("bash", "launch/slurm.sbatch", "--config=x.py", path=tmp_path / "bin", **env)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: --ntasks-per-node=1, but a node gives 8 GPUs")


@pytest.mark.parametrize(("driver", "status"), [("470.82.01", 1), ("525.60.13", 0), ("1000.1", 0)])
def test_an_old_driver_is_refused(tmp_path: Path, driver: str, status: int) -> None:
    program(tmp_path / "bin", "nvidia-smi", f'echo "NVIDIA H100, {driver}"; echo "NVIDIA H100, {driver}"')
    program(checkout(tmp_path) / ".venv" / "bin", "python", 'echo "$XLA_FLAGS $*"')
    done = run("bash", tmp_path / "launch" / "gpu.sh", "--config=x.py", path=tmp_path / "bin", XLA_FLAGS="--mine")
    assert done.returncode == status
    if status:
        assert done.stderr.splitlines()[-1] == f"error: the NVIDIA driver is {driver}; CUDA 12 needs 525 or newer"
    else:
        assert f"GPUs: 2 NVIDIA H100, {driver}\n" in done.stderr
        assert done.stdout == "--mine -m vita_jax.train --config=x.py\n"
