"""Parts of models: bare towers, files of one stage, codec and speech decoders, adapters, and our own small models."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from tests.exchange.public import TOKENIZERS, random_tensors, tiny_vita
from tests.exchange.test_vita import assert_same_tensors, quiet
from tests.training.everything import everything_run
from tests.training.voice import CODEC, SPEECH
from vita_jax import convert
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import TensorFiles, write_tensors
from vita_jax.errors import UserError
from vita_jax.exchange.exporting import export_checkpoint, open_checkpoint, parts_of
from vita_jax.exchange.importing import fitting_table, import_released
from vita_jax.exchange.inspecting import open_and_verify
from vita_jax.exchange.released import guess_model, read_released
from vita_jax.models.audio import tower_weights
from vita_jax.models.codec import codec_weights
from vita_jax.models.codec.config import config_to_published as codec_json
from vita_jax.models.language import decoder_weights
from vita_jax.models.speech import speech_decoder_weights
from vita_jax.models.speech.config import config_to_published as speech_json
from vita_jax.models.vision import internvit_weights
from vita_jax.training.checkpoint import load_params
from vita_jax.training.portable import PortableModel, write_portable

LANGUAGE, SPARSE = tiny_vita().language, tiny_vita(sparse=True).language
LLAMA = replace(LANGUAGE, qkv_bias=False)
AUDIO, VISION = tiny_vita().audio, tiny_vita().vision
VOICE = replace(SPEECH, contiguous_positions=False, initial_head=False, nar_layers=None)


def write_public(folder, model):
    """A public folder of one part. Returns the component its parameters belong to."""
    name, table, file, text = {
        "qwen2": lambda: (
            "language",
            decoder_weights.weight_table(LANGUAGE),
            "config.json",
            decoder_weights.config_to_hf(LANGUAGE),
        ),
        "mixtral": lambda: (
            "language",
            decoder_weights.weight_table(SPARSE),
            "config.json",
            decoder_weights.config_to_hf(SPARSE),
        ),
        "llama": lambda: (
            "language",
            decoder_weights.weight_table(LLAMA),
            "config.json",
            decoder_weights.config_to_hf(LLAMA),
        ),
        "internvit": lambda: (
            "vision",
            internvit_weights.weight_table(VISION),
            "config.json",
            internvit_weights.config_to_hf(VISION),
        ),
        "whale": lambda: (
            "audio",
            tower_weights.weight_table(AUDIO),
            "train.yaml",
            tower_weights.config_to_train(AUDIO),
        ),
        "codec": lambda: ("codec", codec_weights.weight_table(CODEC), "model.json", codec_json(CODEC)),
        "speech_decoder": lambda: (
            "speech",
            speech_decoder_weights.weight_table(VOICE),
            "model.json",
            speech_json(VOICE),
        ),
    }[model]()
    write_tensors(folder, random_tensors(table).items(), max_shard_bytes=5000)
    dump = yaml.safe_dump if file.endswith("yaml") else json.dumps
    (folder / file).write_text(dump(text))
    return name


@pytest.mark.parametrize("model", ["qwen2", "mixtral", "llama", "internvit", "whale", "codec", "speech_decoder"])
def test_round_trip_of_a_part(tmp_path, model, capsys):
    source, run = tmp_path / "public", tmp_path / "run"
    component = write_public(source, model)
    assert guess_model(source) == model
    assert convert.main(["import", "--model", model, "--from", str(source), "--to", str(run)]) == 0
    assert "no tokenizer" in capsys.readouterr().out
    loaded = load_params(run)
    assert list(loaded.params) == [component]
    config = getattr(loaded.config.model, component)
    want = {"qwen2": LANGUAGE, "mixtral": SPARSE, "llama": LLAMA, "internvit": VISION, "whale": AUDIO, "codec": CODEC}
    assert config == want.get(model, VOICE)
    export_checkpoint(open_checkpoint(run), tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    assert open_and_verify(run, model, source, quiet) == len(TensorFiles(source))


def test_a_codec_without_weight_norm_is_told_by_its_names(tmp_path):
    folded = replace(CODEC, weight_norm=False)
    write_tensors(tmp_path / "codec", random_tensors(codec_weights.weight_table(folded)).items())
    (tmp_path / "codec" / "model.json").write_text(json.dumps(codec_json(CODEC) | {"global_tokens": [1, 2]}))
    assert read_released("codec", tmp_path / "codec").config.codec == folded


def test_the_speech_encoders_own_file_may_have_other_heads(tmp_path):
    write_public(tmp_path / "audio", "whale")
    tensors = dict(TensorFiles(tmp_path / "audio"))
    write_tensors(tmp_path / "more", {**tensors, "ctc.ctc_lo.weight": np.ones((2, 2), np.float32)}.items())
    (tmp_path / "more" / "train.yaml").write_bytes((tmp_path / "audio" / "train.yaml").read_bytes())
    import_released(read_released("whale", tmp_path / "more"), tmp_path / "run")
    write_tensors(tmp_path / "stray", {**tensors, "encoder.stray": np.ones((2, 2), np.float32)}.items())
    (tmp_path / "stray" / "train.yaml").write_bytes((tmp_path / "audio" / "train.yaml").read_bytes())
    with pytest.raises(UserError, match="1 tensors that nothing uses: encoder.stray"):
        import_released(read_released("whale", tmp_path / "stray"), tmp_path / "run2")


def test_files_of_one_stage(tmp_path):
    zero = np.zeros((), np.int8)
    tensors = {"mm_projector.0.weight": (3584, 4096), "mm_projector.0.bias": (3584,)}
    tensors |= {"mm_projector.2.weight": (3584, 3584), "mm_projector.2.bias": (3584,)}
    full = {f"base_model.model.{name}": np.broadcast_to(zero, shape) for name, shape in tensors.items()}
    (file,) = write_tensors(tmp_path / "stage", full.items())
    assert guess_model(file) == "projector"
    released = read_released("projector", file)
    table, notes = fitting_table(released)
    assert notes == [] and {rule.path: rule.param_shape for rule in table.rules} == {
        "projector/layers_0/kernel": (4096, 3584),
        "projector/layers_0/bias": (3584,),
        "projector/layers_2/kernel": (3584, 3584),
        "projector/layers_2/bias": (3584,),
    }


def test_our_own_model_with_every_part(tmp_path):
    run_dir = tmp_path / "run"
    config, params = everything_run(run_dir)
    write_portable(tmp_path / "kept", PortableModel(params, config, "joint", 6), run_dir)
    stored = open_checkpoint(tmp_path / "kept")
    assert {part.place for part in parts_of(stored)} == {"", "audio_encoder", "codec", "decoder"}
    files = {str(file) for file in export_checkpoint(stored, tmp_path / "torch")}
    assert {"codec/model.json", "decoder/model.json", "audio_encoder/train.yaml", "tokenizer.model"} <= files
    generation = json.loads((tmp_path / "torch" / "generation_config.json").read_text())
    assert set(generation) == {"eos_token_id", "pad_token_id", "do_sample"}
    # Every part can come in again, and has the same bits.
    for model, place in (("codec", "codec"), ("speech_decoder", "decoder")):
        released = read_released(model, tmp_path / "torch" / place)
        import_released(released, tmp_path / f"{model}_run")
        component = {"codec": "codec", "speech_decoder": "speech"}[model]
        again = flatten(load_params(tmp_path / f"{model}_run").params[component])
        for path, leaf in flatten(params[component]).items():
            assert np.asarray(again[path]).tobytes() == leaf.tobytes()
    assert "model.audio_encoder.ctc_lo.weight" not in TensorFiles(tmp_path / "torch")
    assert TensorFiles(tmp_path / "torch" / "audio_encoder")["ctc_lo.weight"].shape == (7, 8)


def test_vocabulary_and_merges_make_a_tokenizer(tmp_path):
    golden = json.loads((TOKENIZERS / "qwen" / "tokenizer.json").read_text())
    assert golden["model"]["type"] == "BPE"
    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.exchange.tokenizers import make_tokenizer

    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(golden["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in golden["model"]["merges"]]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {str(token["id"]): token for token in golden["added_tokens"]}
    config = json.loads((TOKENIZERS / "qwen" / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    assert make_tokenizer(source, tmp_path / "made") == []
    made, known = load_tokenizer(tmp_path / "made"), load_tokenizer(TOKENIZERS / "qwen")
    for text in ("a b  c\n\nd", "<|im_start|>user\nWhat's 12?<|im_end|>", "数字 7"):
        assert made.encode(text) == known.encode(text)
    (source / "merges.txt").write_text("zz qq")
    with pytest.raises(UserError, match="'zz qq' is no merge"):
        make_tokenizer(source, tmp_path / "made")
