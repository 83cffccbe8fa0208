"""Files of `torch.save`: tensors with all their bits, and nothing else."""

from __future__ import annotations

import os
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import torch

from vita_jax.conversion.torch_files import TensorFiles, write_tensors
from vita_jax.conversion.torch_pickles import PickledTensors, open_tensors, require_torch
from vita_jax.errors import UserError


def test_without_torch_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "final.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'vita_jax\[convert\]'"):
        open_tensors(tmp_path / "final.pt")


def test_an_old_torch_is_not_trusted(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1+cpu"))
    with pytest.raises(UserError, match=r"torch 2\.9\.1\+cpu is too old .* 2\.10 or newer"):
        require_torch()


def test_what_is_in_a_folder_is_found(tmp_path):
    tensors = {"a": np.arange(3.0)}
    (file,) = write_tensors(tmp_path / "one", tensors.items())
    assert isinstance(open_tensors(tmp_path / "one"), TensorFiles)
    file.rename(tmp_path / "one" / "adapter_model.safetensors")
    assert set(open_tensors(tmp_path / "one")) == {"a"}
    write_tensors(tmp_path / "two", tensors.items())
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "one" / "second.safetensors")
    with pytest.raises(UserError, match="found adapter_model.safetensors, second.safetensors"):
        open_tensors(tmp_path / "one")
    with pytest.raises(UserError, match="does not exist"):
        open_tensors(tmp_path / "none")


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_keeps_its_bits(tmp_path, zipped):
    tensors = {
        "bf": torch.randn(3, 4).bfloat16().t(),
        "half": torch.randn(5).half(),
        "single": torch.randn(2, 2),
        "long": torch.arange(4),
        "scalar": torch.tensor(7, dtype=torch.int8),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    file = tmp_path / "final.pt"
    torch.save({"model": tensors, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    read = open_tensors(file)
    assert set(read) == set(tensors)
    assert read["bf"].dtype == ml_dtypes.bfloat16 and read["bf"].shape == (4, 3)
    for name, tensor in tensors.items():
        info = read.info(name)
        assert info.shape == tuple(tensor.shape) == read[name].shape and info.dtype == read[name].dtype.name
        same = tensor.detach().float().numpy()
        np.testing.assert_array_equal(read[name].astype(np.float32), same)


def test_nested_dicts_have_dotted_names(tmp_path):
    parts = {part: {"w": torch.ones(1)} for part in ("encoder", "generator", "quantizer")}
    torch.save({**parts, "steps": 10}, tmp_path / "codec.pt")
    assert set(PickledTensors(tmp_path / "codec.pt")) == {"encoder.w", "generator.w", "quantizer.w"}


def test_shards_and_names_that_come_twice(tmp_path):
    names = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    for name, file in names.items():
        torch.save({name: torch.ones(2)}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {names}}}'.replace("'", '"'))
    assert set(open_tensors(tmp_path)) == {"a", "b"}
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(UserError, match="'a' is also in pytorch_model-1.bin"):
        open_tensors(tmp_path)


class Program:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["VITA_JAX_TEST_TRAP"],))


@pytest.mark.parametrize("damage", ["program", "cut", "text", "empty"])
def test_programs_and_damage(tmp_path, monkeypatch, damage):
    trap = tmp_path / "ran"
    monkeypatch.setenv("VITA_JAX_TEST_TRAP", str(trap))
    file = tmp_path / "final.pt"
    torch.save({"a": torch.ones(64), "b": Program() if damage == "program" else 1}, file)
    if damage != "program":
        file.write_bytes({"cut": file.read_bytes()[:500], "text": b"hello world", "empty": b""}[damage])
    with pytest.raises(UserError, match="only tensors are read|not a complete file") as error:
        open_tensors(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value) and not trap.exists()
