"""LoRA adapters of peft: onto a checkpoint and off it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.exchange.public import public_vita
from vita_jax import convert
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import TensorFiles, write_tensors
from vita_jax.exchange.importing import import_released
from vita_jax.exchange.released import read_released
from vita_jax.training.checkpoint import load_params

PREFIX = "base_model.model.model.layers"


@pytest.fixture
def base(tmp_path):
    public_vita(tmp_path / "public", dtype="float32")
    import_released(read_released("vita_1_5", tmp_path / "public"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapters(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "adapters"
    sizes = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (24, 16)}
    tensors = {}
    for layer in range(2):
        for name, (inputs, outputs) in sizes.items():
            tensors[f"{PREFIX}.{layer}.{name}.lora_A.weight"] = rng.normal(size=(3, inputs)).astype(np.float32)
            tensors[f"{PREFIX}.{layer}.{name}.lora_B.weight"] = rng.normal(size=(outputs, 3)).astype(np.float32)
    (file,) = write_tensors(folder, tensors.items())
    file.rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6, "peft_type": "LORA"}))
    return folder, tensors


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_merged(tmp_path, base, adapters):
    folder, tensors = adapters
    assert run("import", "--model", "lora", "--base", base, "--from", folder, "--to", tmp_path / "merged") == 0
    assert run("export", "--from", tmp_path / "merged", "--to", tmp_path / "out") == 0
    before, after = TensorFiles(tmp_path / "public"), TensorFiles(tmp_path / "out")
    assert set(before) == set(after)
    for name in before:
        want = before[name]
        a = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if a in tensors:
            want = want + 2 * tensors[a.replace("lora_A", "lora_B")] @ tensors[a]
            np.testing.assert_allclose(after[name], want, rtol=1e-5, atol=1e-5)
        else:
            assert after[name].tobytes() == want.tobytes()


def test_kept_beside_the_weights_they_come_out_bit_for_bit(tmp_path, base, adapters):
    folder, tensors = adapters
    kept, arguments = tmp_path / "kept", ["--base", base, "--from", folder, "--keep-adapters"]
    assert run("import", "--model", "lora", *arguments, "--to", kept) == 0
    assert "language/layers/mlp/down_proj/lora_a" in flatten(load_params(kept).params)
    assert run("export", "--layout", "peft", "--from", kept, "--to", tmp_path / "out") == 0
    again = TensorFiles(tmp_path / "out" / "adapter_model.safetensors")
    assert set(again) == set(tensors)
    assert all(again[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (3, 6)
    # As a whole model it goes out merged.
    assert run("export", "--from", kept, "--to", tmp_path / "whole") == 0
    assert set(TensorFiles(tmp_path / "whole")) == set(TensorFiles(tmp_path / "public"))


def test_mistakes(tmp_path, base, adapters, capsys):
    folder, _ = adapters
    target = tmp_path / "x"
    for arguments, message in (
        (["import", "--model", "lora", "--from", folder, "--to", target], "needs --base"),
        (["import", "--model", "lora", "--base", base, "--from", base, "--to", target], "give the folder that peft"),
        (["import", "--model", "qwen2", "--base", base, "--from", folder, "--to", target], "belong to --model lora"),
        (["export", "--layout", "peft", "--from", base, "--to", target], "has no adapters"),
    ):
        assert run(*arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
    assert run("import", "--model", "lora", "--base", base, "--from", folder, "--to", target, "--dry-run") == 0
    assert not target.exists()
