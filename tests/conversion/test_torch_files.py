"""Reading and writing safetensors checkpoints, whole, sharded and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from vita_jax.conversion import torch_files
from vita_jax.conversion.torch_files import INDEX_NAME, SINGLE_NAME, TensorFiles, write_tensors
from vita_jax.errors import UserError

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous on purpose
    "a": np.asarray([1, 2], np.int32),
    "c.weight": np.ones((2, 2), ml_dtypes.bfloat16),
}


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(10**6, 1), (30, 2), (1, 3)])
def test_round_trip(tmp_path: Path, shard_bytes: int, num_files: int) -> None:
    files = write_tensors(tmp_path / "out", TENSORS.items(), max_shard_bytes=shard_bytes)
    assert len(files) == num_files
    assert (tmp_path / "out" / INDEX_NAME).exists() == (num_files > 1)
    assert not list((tmp_path / "out").glob(".*"))
    read = TensorFiles(tmp_path / "out")
    assert set(read) == set(TENSORS) and len(read) == 3 and "b" in read and "d" not in read
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize(("held", "shard_bytes", "num_files"), [(0, 10**6, 2), (20, 10**6, 2), (0, 30, 3), (8, 1, 4)])
def test_tensors_that_are_not_held_are_written_one_by_one(tmp_path, monkeypatch, held, shard_bytes, num_files) -> None:
    monkeypatch.setattr(torch_files, "HELD_BYTES", held)
    monkeypatch.setattr(torch_files, "HEADER_BYTES", 4096)
    odd = np.asarray([1, 2, 3], np.uint8)  # what comes behind it cannot lie at a multiple of its size
    tensors = {"odd": odd, "scalar": np.float32(2.5)} | TENSORS
    tensors = {name: tensors[name] for name in ("b", "c.weight", "odd", "scalar")}
    files = write_tensors(tmp_path, ((name, np.asarray(array)) for name, array in tensors.items()),
                          max_shard_bytes=shard_bytes, metadata={"made": "here"})  # fmt: skip
    assert len(files) == num_files
    read = TensorFiles(tmp_path)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        np.testing.assert_array_equal(read[name], tensor)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "made": "here"}
            for name in opened.keys():
                np.testing.assert_array_equal(opened.get_tensor(name).float().numpy(), tensors[name].astype(np.float32))


def test_a_header_that_is_full_begins_a_shard(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch_files, "HELD_BYTES", 0)
    monkeypatch.setattr(torch_files, "HEADER_BYTES", 2048)
    tensors = {f"ü\u4f60{number}": np.asarray([number], np.int64) for number in range(40)}
    assert len(write_tensors(tmp_path, tensors.items())) > 1
    assert {name: int(TensorFiles(tmp_path)[name][0]) for name in tensors} == {n: int(t[0]) for n, t in tensors.items()}


def test_a_header_that_does_not_fit_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch_files, "HELD_BYTES", 0)
    with pytest.raises(UserError, match="names or metadata"):
        write_tensors(tmp_path / "a", TENSORS.items(), metadata={"long": "x" * torch_files.HEADER_BYTES})
    with pytest.raises(UserError, match="names or metadata"):
        write_tensors(tmp_path / "b", [("x" * torch_files.HEADER_BYTES, np.zeros(1))])


def test_what_cannot_be_read_is_not_called_unwritable(tmp_path) -> None:
    def broken():
        yield "a", np.zeros(1)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        write_tensors(tmp_path, broken())


def test_a_single_file_and_an_index_can_be_named(tmp_path: Path) -> None:
    (file,) = write_tensors(tmp_path / "one", TENSORS.items())
    assert file.name == SINGLE_NAME and set(TensorFiles(file)) == set(TENSORS)
    write_tensors(tmp_path / "many", TENSORS.items(), max_shard_bytes=1)
    assert set(TensorFiles(tmp_path / "many" / INDEX_NAME)) == set(TENSORS)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    (file,) = write_tensors(tmp_path, TENSORS.items())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        TensorFiles(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    files = write_tensors(tmp_path, TENSORS.items(), max_shard_bytes=1)
    index = tmp_path / INDEX_NAME
    good = json.loads(index.read_text())
    for change in ({"a": files[0].name}, {"z": files[0].name}):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))
        with pytest.raises(UserError, match=f"does not match its shards, first at tensor '{next(iter(change))}'"):
            TensorFiles(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        TensorFiles(tmp_path)
    index.write_text(json.dumps(good))
    files[1].unlink()
    with pytest.raises(UserError, match="download is incomplete"):
        TensorFiles(tmp_path)


def test_nothing_is_overwritten_and_nothing_is_written_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a safetensors file"):
        TensorFiles(tmp_path / "nowhere")
    with pytest.raises(UserError, match="given twice"):
        write_tensors(tmp_path / "a", [*TENSORS.items(), ("a", TENSORS["a"])])
    with pytest.raises(UserError, match="given twice"):
        write_tensors(tmp_path / "b", [*TENSORS.items(), ("a", TENSORS["a"])], max_shard_bytes=1)
    with pytest.raises(UserError, match="no tensor"):
        write_tensors(tmp_path / "c", [])
    write_tensors(tmp_path / "d", TENSORS.items())
    with pytest.raises(UserError, match="already holds"):
        write_tensors(tmp_path / "d", TENSORS.items())
