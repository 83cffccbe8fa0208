"""Folders that hold a model and need no run: complete, exact, loadable by everything that loads a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.training.everything import everything_run
from vita_jax import config as config_lib
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import SINGLE_NAME, TensorFiles
from vita_jax.errors import UserError
from vita_jax.inference.session import Session
from vita_jax.training import portable
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import CTC_VOCABULARY
from vita_jax.training.portable import (
    MODEL_FILE,
    PortableModel,
    as_dtype,
    read_portable,
    without_places,
    write_portable,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("portable") / "run"
    config, params = everything_run(run_dir)
    (run_dir / CTC_VOCABULARY).write_text('["a"]')
    return run_dir, PortableModel(params, config, "joint", 6)


@pytest.fixture(scope="module")
def kept(run, tmp_path_factory):
    run_dir, model = run
    folder = tmp_path_factory.mktemp("kept") / "model.v1"
    write_portable(folder, model, run_dir)
    return folder


def test_every_parameter_comes_back_bit_for_bit(run, kept):
    _, model = run
    assert {"codec", "speech", "audio", "ctc_head", "state_head"} < set(model.params)
    loaded = load_params(kept)
    assert (loaded.stage, loaded.step, loaded.run_dir) == ("joint", 6, kept)
    want, got = flatten(model.params), flatten(loaded.params)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert got[path].dtype == np.float32 and np.asarray(got[path]).tobytes() == leaf.tobytes(), path
    assert loaded.config.model == model.config.model


def test_the_folder_tells_no_places(run, kept):
    run_dir, _ = run
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert names == {SINGLE_NAME, MODEL_FILE, "tokenizer/tokenizer.model", CTC_VOCABULARY}
    assert str(run_dir.parent) not in (kept / MODEL_FILE).read_text()
    assert not kept.with_name("model.v1.partial").exists()


def test_no_path_of_the_data_goes_along(run):
    _, model = run
    paths = {f.name: "/volumes/disk/x" for f in dataclasses.fields(model.config.data) if f.type == "str | None"}
    assert {"folder", "json", "root", "asr", "speech"} <= set(paths)
    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, **paths))
    assert "/volumes" not in json.dumps(config_lib.to_dict(without_places(config)))


def test_a_session_answers_from_a_moved_folder(kept, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(kept, moved)
    session = Session.load(moved)
    session.max_new_tokens = 2
    assert isinstance("".join(session.ask("number?")), str) and len(session.turns) == 2


def test_half_precision(run, tmp_path):
    run_dir, model = run
    write_portable(tmp_path / "half", model, run_dir, "bfloat16")
    stored = TensorFiles(tmp_path / "half")
    assert stored["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert stored["model.norm.weight"].dtype == np.float32
    got, want = flatten(read_portable(tmp_path / "half").params), flatten(model.params)
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=2**-8)
        assert got[path].dtype == np.float32
    kernel = want["language/lm_head/kernel"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got["language/lm_head/kernel"], kernel)
    # Written again from what was read, nothing changes any more.
    write_portable(tmp_path / "again", read_portable(tmp_path / "half"), tmp_path / "half", "bfloat16")
    assert (tmp_path / "again" / SINGLE_NAME).read_bytes() == (tmp_path / "half" / SINGLE_NAME).read_bytes()


def test_numbers_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="tensor w holds 70000, which float16 cannot; use bfloat16"):
        list(as_dtype(iter([("w", np.full((2, 2), -7e4, np.float32))]), "float16"))
    ((_, kept_as),) = as_dtype(iter([("w", np.full((2, 2), np.inf, np.float32))]), "float16")
    assert np.isinf(kept_as).all()
    ((_, integers),) = as_dtype(iter([("w", np.ones((2, 2), np.int32))]), "float16")
    assert integers.dtype == np.int32


def test_layout_of_a_mesh_is_kept(kept):
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",)), jax.sharding.PartitionSpec("data")
    )
    params = read_portable(kept, {"language": {"lm_head": {"kernel": sharding}}}).params
    assert params["language"]["lm_head"]["kernel"].sharding == sharding


def test_nothing_is_overwritten_or_left_half_done(run, tmp_path, monkeypatch):
    run_dir, model = run
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write_portable(tmp_path / "used", model, run_dir)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(portable, "write_tensors", full_disk)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        write_portable(tmp_path / "new", model, run_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]
    with pytest.raises(UserError, match="no folder 'tokenizer'"):
        write_portable(tmp_path / "new", model, tmp_path / "used")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MODEL_FILE).write_text("{"), "cannot be read"),
        (lambda folder: (folder / SINGLE_NAME).unlink(), "no model.safetensors"),
        (lambda folder: (folder / SINGLE_NAME).write_bytes(b"abc"), "not a complete safetensors file"),
        (lambda folder: change(folder, format_version=9), "format version 9"),
        (lambda folder: change(folder, config={}), "a configuration this program does not know"),
    ],
)
def test_damage_is_one_clear_line(kept, tmp_path, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(kept, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_params(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def change(folder: Path, **fields: object) -> None:
    path = folder / MODEL_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_weights_of_another_size_are_refused(kept, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(kept, folder)
    content = json.loads((folder / MODEL_FILE).read_text())
    content["config"]["model"]["language"]["vocab_size"] = 331
    (folder / MODEL_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"embed_tokens.weight: shape \(330, 16\), expected \(331, 16\)"):
        load_params(folder)
