"""What a run survives: being killed at any moment, a full disk, damaged checkpoints. Always bit for bit."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.killed import PAUSE, SAVING, STEP, config_of
from tests.training.test_loop import Killed, assert_same_run, interrupted
from tests.training.tiny import make_batches
from vita_jax import config as config_lib
from vita_jax.errors import UserError
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, write_manifest
from vita_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# Of a metric, what is measured in time or memory.
MEASURED = ("_second", "seconds", "_gb", "share", "_chip")


def run(config, batches=make_batches) -> str:
    stream = io.StringIO()
    loop.run(config, make_batches=batches, stream=stream)
    return stream.getvalue()


def die() -> None:
    raise Killed


def start(run_dir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.training.killed", str(run_dir)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at(run_dir: Path, wanted: str, number: int, delay: float) -> bool:
    """Starts the run and kills it so many seconds after it has said `wanted` for the `number`-th time; whether it was
    still running.
    """
    process = start(run_dir)
    seen = 0
    for line in process.stdout:
        seen += line.startswith(wanted)
        if seen == number:
            time.sleep(delay)
            break
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def numbers_of(run_dir: Path) -> list[dict]:
    """Everything reported that is not a matter of time or memory."""
    return [
        {name: value for name, value in record.items() if not any(part in name for part in MEASURED)}
        for record in read_metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    process = start(run_dir)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return run_dir


def assert_goes_on_to_the_same_end(run_dir: Path, uninterrupted: Path) -> None:
    process = start(run_dir)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert_same_run(run_dir, uninterrupted)
    assert numbers_of(run_dir) == numbers_of(uninterrupted)


@pytest.mark.slow
def test_killed_in_the_middle_of_saves(uninterrupted, tmp_path):
    """Before the manifest is written, and between it and the renaming that completes the checkpoint."""
    for number, delay in ((1, 0.2 * PAUSE), (1, 1.5 * PAUSE), (2, 0.2 * PAUSE)):
        assert kill_at(tmp_path, SAVING, number, delay)
    assert_goes_on_to_the_same_end(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(uninterrupted, tmp_path, seed):
    draw = random.Random(seed)
    killed = [kill_at(tmp_path, STEP, draw.randint(1, 4), draw.uniform(0, 4 * PAUSE)) for _ in range(3)]
    assert any(killed)
    assert_goes_on_to_the_same_end(tmp_path, uninterrupted)


def test_a_report_that_a_checkpoint_falls_into_is_whole(tmp_path):
    """Killed at step 5: goes on from 4, and the report of step 6 covers 4, 5 and 6 as it would have."""
    whole, parts = (config_of(tmp_path / name) for name in ("whole", "parts"))
    run(whole)
    with pytest.raises(Killed):
        run(parts, interrupted("joint", 5, die))
    assert "going on from step 4" in run(parts)
    assert numbers_of(tmp_path / "parts") == numbers_of(tmp_path / "whole")
    assert [r["step"] for r in numbers_of(tmp_path / "whole") if r["event"] == "step"] == [3, 4, 3, 6]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was killed in its second stage, which has the checkpoints 2 and 4; and what it comes to in the end."""
    whole, parts = (tmp_path_factory.mktemp(name) for name in ("whole", "parts"))
    run(config_of(whole))
    with pytest.raises(Killed):
        run(config_of(parts), interrupted("joint", 5, die))
    assert complete_steps(checkpoint_folder(parts, "joint")) == [2, 4]
    return whole, parts


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_newest_checkpoint_is_put_aside(stopped, tmp_path, damage):
    whole, parts = stopped
    run_dir = tmp_path / "run"
    shutil.copytree(parts, run_dir)
    folder = checkpoint_folder(run_dir, "joint")
    largest = max(files_of(folder / "4"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    middle = len(content) // 2
    if damage == "truncated":
        largest.write_bytes(content[:middle])
    elif damage == "flipped":
        largest.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    elif damage == "missing":
        largest.unlink()
    else:
        (folder / "4" / "manifest.json").write_text("{")
    printed = run(config_of(run_dir))
    for text in (f"checkpoint {folder}/4 is damaged", "put aside as damaged-4, step 2 is used", "going on from step 2"):
        assert text in printed
    assert (folder / "damaged-4").is_dir()
    assert_same_run(run_dir, whole)


def test_without_a_checkpoint_that_can_be_used_the_run_stops(stopped, tmp_path):
    _, parts = stopped
    run_dir = tmp_path / "run"
    shutil.copytree(parts, run_dir)
    folder = checkpoint_folder(run_dir, "joint")
    for step in (2, 4):
        (folder / str(step) / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match="joint/checkpoints/4 is damaged: meta/metadata"):
        run(config_of(run_dir))
    assert complete_steps(folder) == [2, 4], "nothing is moved"


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(stopped, tmp_path, caplog):
    """A limit on the size of files stands for the full disk: the system refuses to write, in the same calls."""
    whole, _ = stopped
    config, folder = config_of(tmp_path), checkpoint_folder(tmp_path, "naming")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up():
        while complete_steps(folder) != [2]:
            time.sleep(0.01)
        # How much of the arrays comes into one file is a matter of timing; the list of their shardings is 15 KB always.
        resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 1024, hard))

    try:
        with pytest.raises(UserError) as error:
            run(config, interrupted("naming", 3, fill_up))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == (
        f"{folder}: the checkpoint of step 4 cannot be written: File too large; the checkpoint of step 2 is complete. "
        "See to the disk and start again to go on"
    )
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "no tracebacks beside it"
    assert complete_steps(folder) == [2]
    assert "going on from step 2" in run(config)
    assert_same_run(tmp_path, whole)


def test_a_run_of_an_earlier_version_goes_on(stopped, tmp_path):
    """Its configuration lacks fields that were added since, and its checkpoint has no counts."""
    whole, parts = stopped
    run_dir = tmp_path / "run"
    shutil.copytree(parts, run_dir)
    for path in (run_dir / "config.json", checkpoint_folder(run_dir, "joint") / "4" / "meta" / "metadata"):
        content = json.loads(path.read_text())
        content.pop("progress", None)
        for config in (content, content.get("config", {})):
            for field in ("guard", "profile"):
                config.pop(field, None)
        path.write_text(json.dumps(content))
    write_manifest(checkpoint_folder(run_dir, "joint") / "4")
    assert "going on from step 4" in run(config_of(run_dir))
    assert_same_run(run_dir, whole)


def test_a_guard_that_decides_what_is_computed_cannot_change(stopped):
    _, parts = stopped
    config = config_lib.apply_overrides(config_of(parts), {"guard.spike_factor": "4"})
    with pytest.raises(UserError, match="guard.spike_factor: None there, 4.0 now"):
        loop.claim_run_dir(config)
    loop.claim_run_dir(config_lib.apply_overrides(config_of(parts), {"guard.policy": "stop", "profile.start": "3"}))
    loop.claim_run_dir(config_of(parts))


def test_memory_saving_optimisers_go_on_bit_for_bit(tmp_path):
    whole, parts = (config_of(tmp_path / name) for name in ("whole", "parts"))
    whole, parts = (
        config_lib.apply_overrides(
            config, {"optimizer.moments": "bfloat16", "stages.joint.optimizer": "adafactor", "guard.spike_factor": "9"}
        )
        for config in (whole, parts)
    )
    run(whole)
    for name, at in (("naming", 3), ("joint", 5)):
        with pytest.raises(Killed):
            run(parts, interrupted(name, at, die))
    run(parts)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
