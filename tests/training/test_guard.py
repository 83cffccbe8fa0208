"""Steps that go wrong: bad numbers change nothing, are written down and counted; one compilation; hangs are told."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_loop import Killed, assert_same_run, interrupted
from tests.training.tiny import Batches, experiment, make_batches, stage
from vita_jax import config as config_lib
from vita_jax.errors import UserError
from vita_jax.training import guard, loop
from vita_jax.training.experiment import validate
from vita_jax.training.guard import GuardConfig, Watchdog, empty_window, is_spike, push_loss
from vita_jax.training.metrics import read_metrics
from vita_jax.training.objectives import LossSums
from vita_jax.training.optimizer import OptimizerConfig, make_optimizer
from vita_jax.training.step import init_state, train_step


def run(config, batches=make_batches) -> str:
    stream = io.StringIO()
    loop.run(config, make_batches=batches, stream=stream)
    return stream.getvalue()


def die() -> None:
    raise Killed


# ---------------------------------------------------------------------------------------------------------------------
# Inside the step
# ---------------------------------------------------------------------------------------------------------------------


def square_loss(params, batch, key) -> LossSums:
    """The gradient of sqrt at 0 is infinite, with a finite loss."""
    loss = jnp.sum((params["p"]["kernel"] - batch["x"]) ** 2) + jnp.sum(jnp.sqrt(batch["root"]) * params["p"]["bias"])
    return LossSums(loss, jnp.float32(1), {}, {"p/seen": batch["x"].sum()})


def steps(values: list[tuple[float, float]], spike_factor: float | None = None, window: int | None = None):
    """States and metrics of steps on batches with these `x` and `root`."""
    params = {"p/kernel": jnp.ones((3,)), "p/bias": jnp.ones(()), "p/seen": jnp.zeros(())}
    optimizer = make_optimizer(OptimizerConfig(), dict.fromkeys(params, 1.0))
    state = init_state(params, optimizer, jnp.zeros((2,), jnp.uint32), window)
    step = jax.jit(
        lambda state, batch: train_step(
            state,
            {},
            batch,
            loss_fn=square_loss,
            optimizer=optimizer,
            schedule=lambda step: jnp.float32(0.1),
            spike_factor=spike_factor,
        )
    )
    states, history = [state], []
    for x, root in values:
        state, metrics = step(state, {"x": jnp.full((3,), x), "root": jnp.float32(root)})
        states.append(state)
        history.append({name: float(value) for name, value in metrics.items()})
    return states, history


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (np.inf, 1.0), (1e19, 1.0), (2.0, np.inf)])
def test_a_bad_step_counts_but_changes_nothing(bad):
    states, history = steps([(2.0, 1.0), bad, (2.0, 1.0)])
    assert [values["skipped"] for values in history] == [0, 1, 0]
    before, after = (dataclasses.asdict(states[i]) for i in (1, 2))
    assert (int(before.pop("step")), int(after.pop("step"))) == (1, 2)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    # As if the bad step had not been: Adam's count included.
    straight, _ = steps([(2.0, 1.0), (2.0, 1.0)])
    for a, b in zip(jax.tree.leaves(straight[2].opt_state), jax.tree.leaves(states[3].opt_state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_spike_is_judged_by_the_median_of_good_losses():
    window = empty_window(3)
    for loss, good in ((1.0, True), (9.0, True), (500.0, False), (2.0, True)):
        assert not is_spike(window, jnp.float32(1e9), 3.0), "not before the window is full"
        window = push_loss(window, jnp.float32(loss), jnp.bool_(good))
    assert sorted(np.asarray(window.losses)) == [1, 2, 9] and int(window.count) == 3
    assert bool(is_spike(window, jnp.float32(6.1), 3.0)) and not bool(is_spike(window, jnp.float32(5.9), 3.0))
    window = push_loss(window, jnp.float32(4.0), jnp.bool_(True))
    assert sorted(np.asarray(window.losses)) == [2, 4, 9], "the oldest goes"


def test_spikes_are_skipped_and_do_not_enter_the_window():
    states, history = steps([(2.0, 0.0)] * 3 + [(9.0, 0.0), (2.0, 0.0)], spike_factor=4.0, window=3)
    assert [values["skipped"] for values in history] == [0, 0, 0, 1, 0]
    assert int(states[-1].window.count) == 4 and float(states[-1].window.losses.max()) < 4
    np.testing.assert_array_equal(states[3].trainable["p/kernel"], states[4].trainable["p/kernel"])


# ---------------------------------------------------------------------------------------------------------------------
# In a run
# ---------------------------------------------------------------------------------------------------------------------


def one_stage(run_dir: Path, overrides: dict[str, str] | None = None, **fields):
    own = stage("only", trainable=("^projector/",), steps=8, **fields)
    return config_lib.apply_overrides(experiment(run_dir, stages=(own,)), overrides or {})


def with_tiles(at: dict[int, float], die_at: int | None = None):
    """Batches with pictures as numbers; those of the batches in `at` all have the value given there."""

    class Floats(Batches):
        def __next__(self):
            number = self.position
            if number == die_at:
                raise Killed
            batch = super().__next__()
            return batch | {"tiles": np.where(number in at, np.float32(at.get(number, 0)), batch["tiles"] / 255.0)}

    def factory(config, own_stage):
        quiet = make_batches(config, own_stage)
        return Floats(quiet.seed, quiet.rows, quiet.length, quiet.tiles)

    return factory


def test_a_bad_batch_is_skipped_written_and_counted(tmp_path):
    config = one_stage(tmp_path / "run")
    printed = run(config, with_tiles({3: np.nan}))
    file = tmp_path / "run" / "bad_batches" / "only_4.npz"
    assert f"stage 'only': the loss is nan at step 4; its batch is in {file}; the update was left out" in printed
    assert "1 bad steps skipped" in printed
    with np.load(file) as saved:
        assert np.isnan(saved["tiles"]).all() and saved["tokens"].shape == (4, 16)
        assert (int(saved["step"]), str(saved["stage"])) == (4, "only") and np.isnan(saved["loss"])
    records = list(read_metrics(tmp_path / "run"))
    assert [r.get("skipped") for r in records] == [0, 1, 0, 0, 1]
    assert "loss" in records[1] and np.isfinite(records[1]["loss"]), "the mean of the steps that counted"
    assert "grad_norm" not in records[1], "what is not finite is left out"
    assert records[-1]["event"] == "stage"


def test_a_run_that_dies_behind_bad_steps_goes_on_bit_for_bit(tmp_path):
    whole, parts = (
        one_stage(tmp_path / name, {"guard.spike_factor": "1.2", "guard.window": "2", "guard.max_skips": "9"})
        for name in ("whole", "parts")
    )
    bad = {2: np.nan, 3: 900.0, 5: np.nan}
    run(whole, with_tiles(bad))
    with pytest.raises(Killed):
        run(parts, with_tiles(bad, die_at=5))
    assert "going on from step 4" in run(parts, with_tiles(bad))
    skipped = [[r["skipped"] for r in read_metrics(config.run_dir)] for config in (whole, parts)]
    assert skipped[0] == skipped[1] and skipped[0][-1] >= 2
    assert_same_run(tmp_path / "parts", tmp_path / "whole", ("only",))


@pytest.mark.parametrize(
    ("overrides", "bad", "last"),
    [
        ({"guard.policy": "stop"}, {1: np.nan}, 2),
        ({"guard.max_skips": "0"}, {1: np.nan}, 2),
        ({"guard.max_skips": "1"}, {1: np.nan, 3: np.nan, 4: np.nan}, 5),
    ],
)
def test_too_many_bad_steps_stop_the_run_and_name_the_batch(tmp_path, overrides, bad, last):
    with pytest.raises(UserError) as error:
        run(one_stage(tmp_path, overrides), with_tiles(bad))
    file = tmp_path / "bad_batches" / f"only_{last}.npz"
    for part in (f"the loss is nan at step {last}", str(file), "--config.stages.only.learning_rate"):
        assert part in str(error.value)
    assert file.is_file() and "\n" not in str(error.value)


def test_bad_batches_are_bounded(tmp_path):
    bad = dict.fromkeys((0, 2, 4, 6), np.nan)
    printed = run(one_stage(tmp_path, {"guard.saved_batches": "2"}), with_tiles(bad))
    assert sorted(path.name for path in (tmp_path / "bad_batches").iterdir()) == ["only_1.npz", "only_3.npz"]
    assert printed.count("its batch was not written") == 2 and "4 bad steps skipped" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Compilations
# ---------------------------------------------------------------------------------------------------------------------


def test_every_stage_compiles_its_step_once(tmp_path, monkeypatch):
    made, compiled_step = [], loop.compiled_step
    monkeypatch.setattr(loop, "compiled_step", lambda *args: made.append(compiled_step(*args)) or made[-1])
    config = experiment(tmp_path)
    with pytest.raises(Killed):
        run(config, interrupted("joint", 3, die))
    printed = run(config)
    assert [step_fn._cache_size() for step_fn in made] == [1, 1, 1], "also when it goes on from a checkpoint"
    assert "was compiled again" not in printed


def test_a_second_compilation_is_told_with_what_differs(tmp_path):
    class Shrinking(Batches):
        def __next__(self):
            batch = super().__next__()
            if self.position <= 3:
                return batch
            return {name: x[:, :12] if x.shape[1:] == (16,) else x for name, x in batch.items()}

    def factory(config, own_stage):
        return Shrinking(0, 4, 16, 1)

    printed = run(one_stage(tmp_path), factory)
    (line,) = [line for line in printed.splitlines() if "was compiled again" in line]
    assert "step 4 was compiled again" in line
    assert "tokens: int32 (4, 16)" in line and "now" in line and "(4, 12)" in line and "tiles" not in line


# ---------------------------------------------------------------------------------------------------------------------
# Hangs
# ---------------------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_hang_is_told_once_with_all_stacks(tmp_path, capsys):
    file = tmp_path / guard.HANG
    head = "stage 'only': no step has finished for"

    def told() -> int:
        return file.read_text().count(head) if file.is_file() else 0

    config = GuardConfig(hang_seconds=0.1, compile_seconds=0.2)
    with Watchdog(config, tmp_path, stage("only")) as watchdog:
        wait_for(lambda: told() == 1)
        time.sleep(0.4)
        assert told() == 1, "once per hang"
        watchdog.beat(7)
        wait_for(lambda: told() == 2)
    text = file.read_text()
    assert "the last was 7;" in text and "test_a_hang_is_told_once_with_all_stacks" in text
    assert capsys.readouterr().err.count(head) == 2


def test_compiling_may_take_longer_than_a_step(tmp_path):
    config = GuardConfig(hang_seconds=0.1, compile_seconds=1000.0)
    with Watchdog(config, tmp_path, stage("only")):
        time.sleep(0.5)
    assert not (tmp_path / guard.HANG).exists()


def test_a_run_whose_data_hangs_tells_so_and_goes_on(tmp_path):
    file = tmp_path / guard.HANG

    def hang():
        wait_for(lambda: file.is_file() and "in hang" in file.read_text())

    # Without saves, which on a busy machine may take longer than the limit and be told instead.
    overrides = {"guard.hang_seconds": "0.5", "checkpoint.every_steps": "100"}
    printed = run(config_lib.apply_overrides(experiment(tmp_path), overrides), interrupted("naming", 3, hang))
    assert "stage naming: 4 steps in" in printed


@pytest.mark.parametrize(
    ("field", "value"),
    [("spike_factor", 1.0), ("window", 0), ("max_skips", -1), ("hang_seconds", 0.0), ("policy", "ignore")],
)
def test_validation_names_the_field(tmp_path, field, value):
    config = experiment(tmp_path)
    wrong = dataclasses.replace(config, guard=dataclasses.replace(config.guard, **{field: value}))
    with pytest.raises(UserError, match=f"guard.{field}="):
        validate(wrong)
