"""What the original's LoRA training leaves, as one checkpoint: adapters merged, the projector and CLIP beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.exchange.test_llava import public_llava
from vita_jax import convert
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import TensorFiles, write_tensors
from vita_jax.errors import UserError
from vita_jax.exchange.released import guess_model, read_released
from vita_jax.training.checkpoint import load_params

BASE = "vicuna-tiny"
PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")


def lora_folder(folder: Path, whole: Path) -> None:
    """Takes a checkpoint apart; the projector that training left is the one that it has."""
    tensors = dict(TensorFiles(whole))
    shutil.copytree(whole, folder)
    for file in folder.glob("model*"):
        file.unlink()
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    write_tensors(folder / BASE, tensors.items())
    trained = {f"base_model.model.{name}": torch.from_numpy(array) for name, array in projector.items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    rng, adapters = np.random.default_rng(0), {}
    for name in tensors:
        if name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS)):
            layer, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", tensors[name].shape
            adapters[f"{layer}.lora_A.weight"] = rng.normal(size=(3, columns)).astype(np.float32)
            adapters[f"{layer}.lora_B.weight"] = rng.normal(size=(rows, 3)).astype(np.float32)
    (file,) = write_tensors(folder / "peft", adapters.items())
    file.rename(folder / "adapter_model.safetensors")
    fields = {"base_model_name_or_path": f"somebody/{BASE}", "r": 3, "lora_alpha": 6, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


@pytest.fixture
def folders(tmp_path):
    whole, lora = tmp_path / "whole", tmp_path / "lora"
    public_llava(whole, "original", tower=False)
    lora_folder(lora, whole)
    return whole, lora


def test_merged_as_it_comes_in(tmp_path, folders):
    whole, lora = folders
    assert guess_model(lora) == "llava"
    for folder, run in ((whole, "before"), (lora, "after")):
        assert convert.main(["import", "--model", "llava", "--from", str(folder), "--to", str(tmp_path / run)]) == 0
    before, after = (flatten(load_params(tmp_path / run).params) for run in ("before", "after"))
    assert before.keys() == after.keys()
    adapters = TensorFiles(lora / "adapter_model.safetensors")
    changed = {"q_proj": "self_attn.q_proj", "down_proj": "mlp.down_proj"}
    for path, leaf in before.items():
        name = path.split("/")[-2]
        if not path.startswith("language/") or name not in changed:
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
            continue
        for layer in range(2):
            start = f"base_model.model.model.layers.{layer}.{changed[name]}"
            update = 2 * adapters[f"{start}.lora_B.weight"] @ adapters[f"{start}.lora_A.weight"]
            want = leaf[layer] + update.T.reshape(leaf[layer].shape)
            np.testing.assert_allclose(after[path][layer], want, atol=1e-5, err_msg=path)


def test_what_does_not_fit_is_said(folders):
    _, lora = folders
    file = lora / "adapter_model.safetensors"
    adapters = dict(TensorFiles(file))
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"

    def refuse(message: str, **changes: np.ndarray | None) -> None:
        kept = {name: array for name, array in {**adapters, **changes}.items() if array is not None}
        (written,) = write_tensors(lora / "new", kept.items())
        written.rename(file)
        with pytest.raises(UserError, match=message) as error:
            read_released("llava", lora)
        assert str(lora) in str(error.value) and "\n" not in str(error.value)

    square = np.zeros((3, 3), np.float32)
    stray = "base_model.model.lm_head.lora_C.weight"
    refuse(f"adapter {stray} fits no tensor", **{stray: square})
    for wrong in (None, square):
        refuse(r"do not fit model\.layers\.0\.mlp\.down_proj\.weight", **{name: wrong})
    shutil.rmtree(lora / BASE)
    refuse(f"adapters for somebody/{BASE}; put that model's own folder, with its weights, into it as {BASE}")
    file.unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors and no adapter_model.bin beside"):
        read_released("llava", lora)
