"""Checkpoints: complete or absent, verified before use, restored bit for bit, found from any folder of a run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.tiny import experiment, stage
from vita_jax import config as config_lib
from vita_jax.errors import UserError
from vita_jax.training.checkpoint import (
    MANIFEST,
    StageCheckpoints,
    StopSignal,
    checkpoint_folder,
    complete_steps,
    find_checkpoint,
    load_params,
    read_meta,
    snapshot_meta,
    write_manifest,
)

STATE = {"position": 7, "nested": {"list": [1, 2.5, None, "x"]}}


def save_some(run_dir: Path, steps=(2, 4, 6), keep=2) -> tuple[Path, dict, object]:
    """Checkpoints of the tiny experiment's first stage with made-up parameters."""
    config = experiment(run_dir, stages=(stage("first", objective="cell_naming", steps=6), stage("second")))
    config_lib.save_json(config, run_dir / "config.json")
    folder = checkpoint_folder(run_dir, "first")
    with StageCheckpoints(folder, keep) as checkpoints:
        for step in steps:
            params = {"vision": {"a": jnp.arange(2000.0) * step}, "naming_head": {"kernel": jnp.ones((3,)) * step}}
            opt_state = optax.scale_by_adam().init({"vision/a": params["vision"]["a"]})
            meta = snapshot_meta(config, config.stages[0], step, [1, 2], STATE, 1.5)
            checkpoints.save(step, params, opt_state, meta)
    return folder, params, opt_state


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_round_trip_and_retention(tmp_path):
    folder, params, opt_state = save_some(tmp_path)
    assert complete_steps(folder) == [4, 6]
    with StageCheckpoints(folder, 2) as checkpoints:
        assert checkpoints.latest() == 6
        restored = checkpoints.restore(6, abstract(params), abstract(opt_state))
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(opt_state)
    assert restored.meta["data_state"] == STATE and restored.meta["rng"] == [1, 2] and restored.meta["finished"]


def test_saving_does_not_read_arrays_that_are_donated_afterwards(tmp_path):
    config = experiment(tmp_path)
    folder = checkpoint_folder(tmp_path, "x")
    advance = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with StageCheckpoints(folder, 20) as checkpoints:
        for step in range(1, 6):
            big = jnp.full((400, 400), float(step))
            meta = snapshot_meta(config, config.stages[0], step, [0, 0], {}, 0.0)
            checkpoints.save(step, {"a": big}, {"b": jnp.zeros(1)}, meta)
            advance(big)
        checkpoints.wait()
        for step in range(1, 6):
            got = checkpoints.restore(
                step, abstract({"a": np.zeros((400, 400), np.float32)}), abstract({"b": jnp.zeros(1)})
            ).params["a"]
            assert float(got.min()) == float(got.max()) == step


def test_load_params_from_run_stage_folder_and_checkpoint(tmp_path):
    folder, params, _ = save_some(tmp_path)
    for path in (tmp_path, folder.parent, folder, folder / "6"):
        loaded = load_params(path)
        assert (loaded.stage, loaded.step, loaded.run_dir) == ("first", 6, tmp_path)
        assert loaded.config.name == "tiny"
        assert set(loaded.params) == {"vision"}, "the objective's own parameters are dropped"
        np.testing.assert_array_equal(loaded.params["vision"]["a"], params["vision"]["a"])
    assert load_params(folder / "4").step == 4


def test_an_unfinished_run_is_an_error_that_says_what_can_be_used(tmp_path):
    folder, _, _ = save_some(tmp_path, steps=(2, 4))
    with pytest.raises(UserError, match="no finished stage.*checkpoints"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(folder) == folder / "4"
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run"):
        find_checkpoint(folder / "4" / "params")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty"])
def test_any_damaged_file_is_named(tmp_path, damage):
    folder, _, _ = save_some(tmp_path)
    good = folder / "6"
    listed = json.loads((good / MANIFEST).read_text())["files"]
    assert {name.split("/")[0] for name in listed} == {"params", "optimizer", "meta"}
    for number, path in enumerate(good / name for name in listed):
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
        elif damage == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
        with pytest.raises(UserError) as error:
            load_params(tmp_path)
        for part in (str(good), str(path.relative_to(good)), "go on from step 4"):
            assert part in str(error.value), number
        path.write_bytes(content)
    load_params(tmp_path)


def test_damaged_manifest_and_other_format_versions(tmp_path):
    folder, _, _ = save_some(tmp_path)
    (folder / "6" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_params(tmp_path)
    meta = folder / "4" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "format_version": 99}))
    write_manifest(folder / "4")
    with pytest.raises(UserError, match="format version 99"):
        load_params(folder / "4")


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path):
    folder, _, _ = save_some(tmp_path)
    (folder / "6" / MANIFEST).unlink()
    assert complete_steps(folder) == [4]
    with StageCheckpoints(folder, 2) as checkpoints:
        assert checkpoints.latest() == 4
        assert not (folder / "6").exists(), "the remains are removed, so that step 6 can be saved again"


def test_moved_runs_load(tmp_path):
    save_some(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_params(tmp_path / "b").run_dir == tmp_path / "b"


def test_meta_holds_the_configuration(tmp_path):
    folder, _, _ = save_some(tmp_path)
    assert read_meta(folder / "6")["config"]["name"] == "tiny"


@pytest.fixture
def interruptible():
    """Jobs in a shell's background start with SIGINT ignored; here it acts as at a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_stop_signal_asks_once_and_then_acts_as_usual(interruptible):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
