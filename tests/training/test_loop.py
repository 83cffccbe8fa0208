"""Whole runs of the tiny experiment: curriculum, stopping and going on bit for bit, changed configurations, the
command.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.records import prepare_records, records_experiment
from tests.training.tiny import Batches, experiment, make_batches, stage
from vita_jax import config as config_lib
from vita_jax import train
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_params, read_meta
from vita_jax.training.experiment import CheckpointConfig, tokenizer_folder
from vita_jax.training.metrics import MetricsWriter, Progress, format_duration, format_rate, read_metrics
from vita_jax.training.stages import flatten


class Killed(Exception):
    """Stands for a process that dies without saving."""


def run(config, batches=make_batches, **hooks) -> str:
    """Trains quietly; returns what was printed."""
    stream = io.StringIO()
    loop.run(config, make_batches=batches, stream=stream, **hooks)
    return stream.getvalue()


def interrupted(stage_name: str, at: int, action) -> loop.MakeBatches:
    """Batches that call `action` when number `at` of a stage is fetched."""

    def factory(config, own_stage):
        batches = make_batches(config, own_stage)
        if own_stage.name != stage_name:
            return batches

        class Interrupted(Batches):
            def __next__(self):
                if self.position == at:
                    action()
                return super().__next__()

        return Interrupted(batches.seed, batches.rows, batches.length, batches.tiles)

    return factory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its directory, output, and the calls of its hook."""
    run_dir = tmp_path_factory.mktemp("finished")
    calls = []
    printed = run(
        experiment(run_dir), after_stage=lambda s, params: calls.append((s.name, flatten(jax.device_get(params))))
    )
    return run_dir, printed, calls


def assert_same_run(got: Path, want: Path, stages: Sequence[str] = ("naming", "joint")) -> None:
    """Parameters, optimiser state and data position of the last checkpoints are equal bit for bit."""
    for name in stages:
        a, b = (checkpoint_folder(run_dir, name) for run_dir in (got, want))
        assert complete_steps(a)[-1] == complete_steps(b)[-1]
        last = str(complete_steps(a)[-1])
        metas = [read_meta(folder / last) for folder in (a, b)]
        for key in ("data_state", "rng", "step", "finished", "progress"):
            assert metas[0][key] == metas[1][key]
        left, right = (read_arrays(folder / last) for folder in (a, b))
        assert left.keys() == right.keys() and len(left) > 10
        for path in left:
            assert left[path].tobytes() == right[path].tobytes(), f"{name}: {path}"


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, parameters and optimiser state, whatever devices it was saved from."""
    import orbax.checkpoint as ocp

    arrays = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in ("params", "optimizer"):
            saved = checkpointer.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            restored = checkpointer.restore(folder / item, restore_args=as_numpy)
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
                arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def test_curriculum_carries_parameters_and_freezes_bytes(finished):
    run_dir, printed, calls = finished
    naming, joint = (flatten(load_params(checkpoint_folder(run_dir, name)).params) for name in ("naming", "joint"))
    assert [name for name, _ in calls] == ["naming", "joint"]
    for path, value in joint.items():
        assert (np.asarray(value).tobytes() == np.asarray(naming[path]).tobytes()) == path.startswith("vision/"), path
        np.testing.assert_array_equal(value, calls[1][1][path])
    assert not any(path.startswith("naming_head") for path in calls[0][1])
    assert load_params(run_dir).stage == "joint"
    for text in ("stage naming", "naming_head", "trainable", "starts from", "4 steps in"):
        assert text in printed


def test_run_directory_and_metrics(finished):
    run_dir, _, _ = finished
    assert json.loads((run_dir / "config.json").read_text())["name"] == "tiny"
    assert any((run_dir / "tensorboard").iterdir())
    records = list(read_metrics(run_dir))
    steps = [(r["stage"], r["step"]) for r in records if r["event"] == "step"]
    assert steps == [("naming", 2), ("naming", 4), ("joint", 2), ("joint", 4), ("joint", 6)]
    for name in (
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "update_norm",
        "tokens_per_second",
        "tokens_per_second_per_chip",
        "data_seconds",
        "data_share",
        "skipped",
        "memory_gb",
    ):
        assert all(np.isfinite(r[name]) for r in records if r["event"] == "step")
    ends = [r for r in records if r["event"] == "stage"]
    assert [r["stage"] for r in ends] == ["naming", "joint"]
    assert ends[1]["trainable"] > 0 and ends[1]["frozen"] > 0 and ends[1]["seconds"] > 0


@pytest.mark.parametrize(
    ("stage_name", "at"), [("naming", 3), *(pytest.param("joint", at, marks=pytest.mark.slow) for at in (1, 5))]
)
def test_killed_and_started_again_is_the_uninterrupted_run(finished, tmp_path, stage_name, at):
    def die():
        raise Killed

    config = experiment(tmp_path)
    with pytest.raises(Killed):
        run(config, interrupted(stage_name, at, die))
    printed = run(config)
    if at >= 2:
        assert f"going on from step {at - at % 2}" in printed
    assert_same_run(tmp_path, finished[0])
    left, right = (
        [(r["event"], r["stage"], r["step"], r.get("loss")) for r in read_metrics(d)] for d in (tmp_path, finished[0])
    )
    assert left == right, "repeated steps replace their records"


def test_stop_signal_saves_and_the_run_goes_on(finished, tmp_path):
    config = config_lib.apply_overrides(experiment(tmp_path), {"checkpoint.every_steps": "100"})
    with pytest.raises(loop.Stopped, match="SIGTERM at step 4 of stage joint") as stopped:
        run(config, interrupted("joint", 3, lambda: signal.raise_signal(signal.SIGTERM)))
    assert stopped.value.signal == signal.SIGTERM
    assert complete_steps(checkpoint_folder(tmp_path, "joint")) == [4]
    assert "going on from step 4" in run(config)
    assert_same_run(tmp_path, finished[0])


def test_milestones_stay_and_change_nothing(finished, tmp_path):
    saved = CheckpointConfig(every_steps=2, keep=1, milestones=(1, 3, 50))
    run(experiment(tmp_path, checkpoint=saved))
    assert {name: complete_steps(checkpoint_folder(tmp_path, name)) for name in ("naming", "joint")} == {
        "naming": [1, 3, 4],
        "joint": [1, 3, 6],
    }
    assert_same_run(tmp_path, finished[0])
    with pytest.raises(UserError, match="checkpoint.milestones=0: must be at least 1"):
        run(experiment(tmp_path, checkpoint=CheckpointConfig(milestones=(4, 0))))


def test_a_finished_run_does_nothing_and_the_hook_is_called_once(finished):
    run_dir, _, _ = finished
    calls = []
    printed = run(experiment(run_dir), after_stage=lambda s, params: calls.append(s.name))
    assert printed.count("already finished") == 2 and calls == []


@pytest.mark.slow
def test_a_hook_that_was_killed_is_called_again(tmp_path):
    def die(own_stage, params):
        raise Killed

    config = experiment(tmp_path, stages=(stage("only", objective="cell_naming", trainable=("^vision/",), steps=1),))
    with pytest.raises(Killed):
        run(config, after_stage=die)
    calls = []
    assert "already finished" in run(config, after_stage=lambda s, params: calls.append(s.name))
    assert calls == ["only"]


def test_a_changed_configuration_is_refused_and_a_changed_layout_is_not(finished):
    run_dir, _, _ = finished
    config = config_lib.apply_overrides(experiment(run_dir), {"stages.joint.steps": "9", "seed": "3"})
    with pytest.raises(UserError) as error:
        run(config)
    for part in ("stages.joint.steps: 6 there, 9 now", "seed: 0 there, 3 now", "--config.run_dir"):
        assert part in str(error.value)
    run(config_lib.apply_overrides(experiment(run_dir), {"checkpoint.every_steps": "5", "mesh.data": "1"}))


def test_a_damaged_checkpoint_that_is_the_only_one_stops_the_run(tmp_path):
    def die():
        raise Killed

    config = experiment(tmp_path)
    with pytest.raises(Killed):
        run(config, interrupted("naming", 3, die))
    folder = checkpoint_folder(tmp_path, "naming") / "2"
    (folder / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match="checkpoint .*naming/checkpoints/2 is damaged"):
        run(config)


@pytest.mark.slow
def test_real_records_go_on_bit_for_bit(tmp_path):
    whole, parts = (records_experiment(tmp_path / name) for name in ("whole", "parts"))
    for config in (whole, parts):
        prepare_records(config)
    own_tokenizer = tmp_path / "parts" / "tokenizer" / "tokenizer.model"
    written = own_tokenizer.stat().st_mtime_ns
    run(whole, None)

    def dying_batches(config, own_stage):
        batches = loop.record_batches(config, own_stage, tokenizer=load_tokenizer(tokenizer_folder(config)))
        fetched = itertools.count()

        class Dying:
            counts = batches.counts
            get_state, set_state, close = batches.get_state, batches.set_state, batches.close

            def __next__(self):
                if own_stage.name == "joint" and next(fetched) == 3:
                    raise Killed
                return next(batches)

        return Dying()

    with pytest.raises(Killed):
        run(parts, dying_batches)
    assert "going on from step 2" in run(parts, None)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert own_tokenizer.stat().st_mtime_ns == written, "another process may be reading it"


def test_a_run_keeps_a_copy_of_a_tokenizer_from_elsewhere(tmp_path):
    config = records_experiment(tmp_path / "run")
    prepare_records(config)
    elsewhere = (tmp_path / "run" / "tokenizer").rename(tmp_path / "elsewhere")
    config = config_lib.apply_overrides(config, {"tokenizer.folder": str(elsewhere), "stages.joint.steps": "1"})

    def stop_at_once(config, own_stage):
        raise Killed

    with pytest.raises(Killed):
        run(config, stop_at_once)
    assert not (tmp_path / "run" / "tokenizer").exists(), "batches that are given need none"
    run(config, None)
    for file in elsewhere.iterdir():
        assert (tmp_path / "run" / "tokenizer" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_several_starts_each_give_what_they_trained(tmp_path):
    stages = (
        stage("tower", objective="cell_naming", trainable=("^vision/",), steps=1),
        stage("text", trainable=("^language/",), steps=1),
        stage("both", trainable=("^projector/",), steps=1, start_from=("tower", "text")),
    )
    run(experiment(tmp_path, stages=stages))
    tower, text, both = (flatten(load_params(checkpoint_folder(tmp_path, s.name)).params) for s in stages)
    for path, value in both.items():
        source = {"vision": tower, "language": text}.get(path.split("/")[0])
        if source is not None:
            np.testing.assert_array_equal(value, source[path])


def test_a_run_can_start_from_another_run(finished, tmp_path):
    stages = (stage("more", trainable=("^language/norm",), steps=2, start_from=str(finished[0])),)
    run(experiment(tmp_path, stages=stages))
    before, after = (flatten(load_params(d).params) for d in (finished[0], tmp_path))
    changed = [path for path in before if np.asarray(before[path]).tobytes() != np.asarray(after[path]).tobytes()]
    assert changed == ["language/norm/scale"]
    assert before.keys() == after.keys()


@pytest.mark.slow
def test_losses_that_stay_bad_are_an_error(tmp_path):
    stages = (stage("bad", trainable=("^language/",), learning_rate=1e30, warmup_ratio=0.0),)
    with pytest.raises(UserError, match="stage 'bad'.*4 bad steps in a row.*learning_rate"):
        run(experiment(tmp_path, stages=stages))


def test_missing_arrays_are_named(tmp_path):
    def factory(config, own_stage):
        class NoNames(Batches):
            def __next__(self):
                return {name: x for name, x in super().__next__().items() if name != "cell_names"}

        return NoNames(0, 4, 16, 1)

    with pytest.raises(UserError, match="needs cell_names"):
        run(experiment(tmp_path), factory)


EXPERIMENT_FILE = """
from tests.training.records import prepare_records, records_experiment

def get_config(size: str = "smoke"):
    return records_experiment("unset")

def prepare(config):
    print("prepared", config.seed)
    prepare_records(config)

def after_stage(config, stage, params):
    print("after", stage.name, sorted(params))

def finish(config):
    print("finished", config.run_dir)
"""


REFUSING_PREPARE = """
from vita_jax.errors import UserError

def get_config():
    return experiment("unset")

def prepare(config):
    raise UserError("data built")
"""


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vita_jax.train", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_command_trains_and_calls_the_hooks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the data goes to a folder of the working directory
    path = tmp_path / "tiny_experiment.py"
    path.write_text(EXPERIMENT_FILE)
    assert (
        train.main([f"--config={path}", f"--config.run_dir={tmp_path / 'run'}", "--config.stages.joint.steps=2"]) == 0
    )
    printed = capsys.readouterr().out
    for text in (
        "prepared 0",
        "after naming ['language', 'projector', 'vision']",
        "after joint",
        f"finished {tmp_path / 'run'}",
    ):
        assert text in printed
    assert "    steps: 2" in printed, "the resolved configuration is printed"


def test_command_refuses_another_configuration_before_it_builds_data(tmp_path, capsys):
    path = tmp_path / "tiny_experiment.py"
    path.write_text("from tests.training.tiny import experiment\n" + REFUSING_PREPARE)
    arguments = [f"--config={path}", f"--config.run_dir={tmp_path / 'run'}"]
    assert train.main(arguments) == 2
    assert "data built" in capsys.readouterr().err
    assert train.main([*arguments, "--config.seed=9"]) == 2
    assert "seed: 0 there, 9 now" in capsys.readouterr().err


@pytest.mark.slow
def test_command_errors_are_one_line(tmp_path):
    path = tmp_path / "tiny_experiment.py"
    path.write_text(EXPERIMENT_FILE)
    done = command(f"--config={path}", "--config.stages.joint.step=2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --config.stages.joint.step: ") and done.stderr.count("\n") == 1
    assert "--config.stages.joint.steps (int)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE is missing"),
        (["--config=nowhere.py"], "no such Python file"),
        (["--stage=1"], "unknown argument '--stage=1'"),
        (["--config"], "needs a value"),
    ],
)
def test_command_usage_errors(arguments, message, capsys):
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_shows_examples_and_exit_status(capsys):
    assert train.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "--config=experiments/quickstart.py" in printed
    assert "143 for SIGTERM" in printed


def test_metrics_survive_a_half_written_line(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.step("a", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert len(list(read_metrics(tmp_path))) == 1
    with MetricsWriter(tmp_path) as metrics:
        metrics.step("a", 2, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_progress_lines_and_numbers():
    stream = io.StringIO()
    progress = Progress("1.1 vision", 10, stream, plain_seconds=0.0)
    progress.report(5, {"loss": 1.25, "accuracy": 0.5}, 12345.0, 3723.0)
    assert stream.getvalue() == "1.1 vision  step 5/10  loss 1.2500  acc 50.0%  12.3k tok/s  ETA 1:02:03\n"
    assert (format_duration(59.6), format_rate(2.5e6), format_rate(12)) == ("1:00", "2.5M", "12")
