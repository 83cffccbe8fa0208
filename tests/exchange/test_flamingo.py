"""open_flamingo's checkpoints in and out, by the commands: every bit, sizes from tensors alone, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.exchange.public import TOKENIZERS, random_tensors, tokenizer_rows
from tests.training.flamingo import flamingo_config
from vita_jax import convert
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import TensorFiles, write_tensors
from vita_jax.conversion.views import joined
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.exchange.exporting import export_checkpoint, open_checkpoint
from vita_jax.exchange.importing import import_released
from vita_jax.exchange.inspecting import open_and_verify
from vita_jax.exchange.released import FLAMINGO, guess_model, read_released
from vita_jax.models.flamingo import FlamingoConfig, flamingo_3b, flamingo_4b, flamingo_llama_7b
from vita_jax.models.flamingo_weights import config_of_tensors, stacks, trained_table, weight_table
from vita_jax.models.language import decoder_weights
from vita_jax.training.checkpoint import load_params

TOKENIZER = TOKENIZERS / "mixtral"


def public_flamingo(folder: Path, table=weight_table, dtype: str = "float32") -> FlamingoConfig:
    """Writes a checkpoint as an export does: with our sizes in its `config.json`."""
    config = flamingo_config(tokenizer_rows(TOKENIZER))
    tensors = dict(joined(random_tensors(table(config), dtype).items(), stacks(config)))
    write_tensors(folder, tensors.items())
    from vita_jax import config as config_lib

    fields = {**decoder_weights.config_to_hf(config.language), FLAMINGO: config_lib.to_dict(config)}
    (folder / "config.json").write_text(json.dumps(fields))
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    return config


def bits_of(folder: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(folder)
    return {name: np.asarray(files[name]).view(np.uint8) for name in files}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_of_every_bit(tmp_path, dtype):
    source, run, back = tmp_path / "public", tmp_path / "run", tmp_path / "back"
    config = public_flamingo(source, dtype=dtype)
    assert guess_model(source) == "flamingo"
    assert import_released(read_released("flamingo", source), run) == []
    stored = open_checkpoint(run)
    assert stored.config.model == config and stored.config.image.image_size == config.vision.image_size
    assert open_and_verify(run, "flamingo", source, lambda *_: None) > 0
    export_checkpoint(stored, back)
    want, got = bits_of(source), bits_of(back)
    assert set(got) == set(want) and any("in_proj_weight" in name for name in want)
    for name, bits in want.items():
        np.testing.assert_array_equal(got[name], bits, err_msg=name)


def test_by_the_commands(tmp_path, capsys):
    source, run, back = (str(tmp_path / name) for name in ("public", "run", "back"))
    public_flamingo(Path(source))
    assert convert.main(["import", "--model", "flamingo", "--from", source, "--to", run]) == 0
    assert convert.main(["verify", "--model", "flamingo", "--from", run, "--against", source]) == 0
    assert convert.main(["export", "--from", run, "--to", back]) == 0
    assert convert.main(["inspect", source]) == 0
    assert "complete: every tensor has its place" in capsys.readouterr().out
    assert convert.main(["export", "--from", run, "--to", back + "2", "--layout", "hf"]) == 2
    assert "layout 'hf' is one of LLaVA's checkpoints" in capsys.readouterr().err


def test_what_training_saves_becomes_a_part(tmp_path):
    """Resampler, blocks and embeddings: a stage starts from them beside the other parts."""
    config = public_flamingo(tmp_path / "public", trained_table)
    released = read_released("flamingo", tmp_path / "public")
    assert released.config == config and "what trained alone" in released.notes[0]
    import_released(released, tmp_path / "run")
    params = load_params(tmp_path / "run").params
    assert set(params) == {"resampler", "cross_attention", "language"}
    assert set(flatten(params["language"])) == {"embed_tokens/embedding"}
    with pytest.raises(UserError, match="together are no open_flamingo checkpoint"):
        export_checkpoint(open_checkpoint(tmp_path / "run"), tmp_path / "back")


@pytest.mark.parametrize("preset", [flamingo_3b, flamingo_4b, flamingo_llama_7b])
def test_sizes_are_those_of_the_tensors(preset):
    """Published files say nothing but shapes; rows of the vocabulary are those of the table."""
    config = preset()
    shapes = {name: rule.torch_shape for rule in weight_table(config).rules for name in rule.names}
    base = dataclasses.replace(config.language, vocab_size=32_000)
    assert config_of_tensors(shapes, base) == config
    partial = {name: shape for name, shape in shapes.items() if not name.startswith("vision_encoder.")}
    assert config_of_tensors(partial, base, config.vision) == config
    with pytest.raises(UserError, match="there is no tensor vision_encoder.conv1.weight"):
        config_of_tensors(partial, base)
    without = {name: shape for name, shape in shapes.items() if "gated" not in name}
    with pytest.raises(UserError, match="no gated cross-attention in it"):
        config_of_tensors(without, base)


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["transformer.wte.weight", "transformer.blocks.0.decoder_layer.norm_1.weight"], "MPT"),
        # What training saves: the table, and blocks by either name.
        (["gated_cross_attn_layers.0.attn_gate", "transformer.wte.weight"], "MPT or GPT-J"),
        (["gpt_neox.embed_in.weight", "gated_cross_attn_layers.1.ff_gate"], "GPT-NeoX"),
        (["model.decoder.embed_tokens.weight"], "OPT"),
        # Layers by their second names.
        (["old_decoder_blocks.0.norm_1.weight", "old_decoder_blocks.0.attn.Wqkv.weight"], "MPT"),
        (["old_decoder_blocks.0.attention.query_key_value.bias"], "GPT-NeoX"),
    ],
)
def test_other_language_models_are_refused_by_name(tmp_path, capsys, names, model):
    """Before anything else is asked for: their folders may have no config.json."""
    tensors = {"perceiver.latents": np.zeros((2, 4), np.float32)}
    tensors |= {f"module.lang_encoder.{name}": np.zeros(4, np.float32) for name in names}
    write_tensors(tmp_path, tensors.items())
    assert guess_model(tmp_path) == "flamingo"
    with pytest.raises(UnsupportedOption, match=rf"model is {model} \(.* only Flamingo around a LLaMA is offered"):
        read_released("flamingo", tmp_path)
    arguments = ["import", "--model", "flamingo", "--from", str(tmp_path), "--to", str(tmp_path / "run")]
    assert convert.main(arguments) == 2
    assert model in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
def test_a_download_that_was_interrupted(tmp_path, capsys, name):
    public_flamingo(tmp_path / "public")
    file = tmp_path / "public" / "model.safetensors"
    if name == "checkpoint.pt":
        tensors = {key: torch.from_numpy(np.array(array)) for key, array in dict(TensorFiles(file)).items()}
        file.unlink()
        file = file.with_name(name)
        torch.save({"model_state_dict": tensors}, file)
    whole = file.read_bytes()
    for size in (len(whole) - 10, len(whole) // 2, 5):
        file.write_bytes(whole[:size])
        arguments = ["import", "--model", "flamingo", "--from", str(tmp_path / "public"), "--to", str(tmp_path / "run")]
        assert convert.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(file) in error and not (tmp_path / "run").exists()


def test_a_folder_without_the_language_models_config(tmp_path):
    public_flamingo(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        read_released("flamingo", tmp_path)
