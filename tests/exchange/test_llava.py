"""LLaVA's public checkpoints in and out: every layout, every bit; whatever is wrong with them is one clear error."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exchange.public import TOKENIZERS, random_tensors, tokenizer_rows
from tests.exchange.test_bad_input import rewrite
from tests.exchange.test_vita import assert_same_tensors, quiet
from tests.training import tiny
from tests.training.llava import llava_config, llava_experiment
from vita_jax import convert
from vita_jax.conversion.tables import flatten, import_params
from vita_jax.conversion.torch_files import TensorFiles, write_tensors
from vita_jax.data.images import ImageConfig
from vita_jax.data.llava_prompts import LlavaPromptOptions
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.exchange.exporting import Stored, export_checkpoint, open_checkpoint
from vita_jax.exchange.importing import fitting_table, import_released
from vita_jax.exchange.inspecting import open_and_verify
from vita_jax.exchange.released import guess_model, read_released
from vita_jax.inference.session import Session
from vita_jax.models import llava_weights
from vita_jax.models.llava import LlavaConfig
from vita_jax.models.llava_weights import LAYOUTS, config_to_hf, weight_table
from vita_jax.models.vision import clip_weights
from vita_jax.training.checkpoint import load_params

TOKENIZER = TOKENIZERS / "mixtral"
CLIP = "clip-tiny"


def tiny_llava(projector: str = "mlp2x_gelu", rows: int | None = None) -> LlavaConfig:
    """As many vocabulary rows as the tokenizer has ids."""
    config = llava_config(rows or tokenizer_rows(TOKENIZER), projector)
    return dataclasses.replace(config, language=dataclasses.replace(config.language, max_positions=2048))


def public_llava(
    folder: Path, layout: str = "hf", *, projector: str = "mlp2x_gelu", dtype: str = "float32", tower: bool = True
) -> LlavaConfig:
    """Writes a released checkpoint; without `tower`, CLIP's own files are a folder of it."""
    config = tiny_llava(projector)
    tensors = random_tensors(weight_table(config, layout, tower=tower), dtype)
    write_tensors(folder, tensors.items(), max_shard_bytes=12_000)
    fields = config_to_hf(config, layout, aspect="pad")
    if not tower:
        fields = {name: value for name, value in fields.items() if name != "vision_config"}
        fields["mm_vision_tower"] = f"somebody/{CLIP}"
        clip = random_tensors(clip_weights.weight_table(config.vision), dtype, seed=1)
        text = {"text_model.final_layer_norm.bias": np.zeros(3, np.float32), "logit_scale": np.zeros((), np.float32)}
        text["visual_projection.weight"] = np.zeros((5, config.vision.hidden_size), np.float32)
        write_tensors(folder / CLIP, (clip | text).items())
        (folder / CLIP / "config.json").write_text(json.dumps(clip_weights.config_to_hf(config.vision)))
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    (folder / "preprocessor_config.json").write_text("{}")
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    return config


def trained(run_dir: Path, tokenizer: Path = TOKENIZER, rows: int | None = None, **fields: Any) -> Stored:
    """What a run of ours ends with, which no public folder was the start of."""
    model = tiny_llava(rows=rows)
    tensors = random_tensors(weight_table(model), "float32")
    shutil.copytree(tokenizer, run_dir / "tokenizer")
    config = llava_experiment(run_dir, model=model, **fields)
    return Stored(import_params(weight_table(model), tensors), config, "tuning", 1, run_dir)


@pytest.mark.parametrize(
    ("layout", "dtype", "projector"),
    [
        *((layout, "bfloat16", "mlp2x_gelu") for layout in LAYOUTS),
        ("original", "float32", "linear"),
        ("hf", "float16", "mlp2x_gelu"),
    ],
)
def test_round_trip_of_every_bit(tmp_path, layout, dtype, projector):
    source, run, back = tmp_path / "public", tmp_path / "run", tmp_path / "back"
    config = public_llava(source, layout, projector=projector, dtype=dtype)
    assert guess_model(source) == "llava"
    released = read_released("llava", source)
    assert released.config == config and released.notes == (f"layout {layout}",)
    assert import_released(released, run) == []
    stored = open_checkpoint(run)
    assert stored.config.model == config and stored.config.template == "vicuna_v1"
    assert stored.config.image.tiling == "crop" and stored.config.image.aspect == "pad"
    export_checkpoint(stored, back, layout=layout, shard_bytes=15_000)
    assert_same_tensors(source, back)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert open_and_verify(run, "llava", source, quiet) == len(TensorFiles(source))


@pytest.mark.parametrize(("layout", "other"), [("hf", "original"), ("hf_memory", "hf")])
def test_from_one_layout_to_another(tmp_path, layout, other):
    """Without the tokens that transformers needs, which an original lacks: see test_for_transformers.py."""
    config = public_llava(tmp_path / "public", layout)
    import_released(read_released("llava", tmp_path / "public"), tmp_path / "run")
    export_checkpoint(open_checkpoint(tmp_path / "run"), tmp_path / "other", layout=other)
    released = read_released("llava", tmp_path / "other")
    assert released.config == config and f"layout {other}" in released.notes
    assert open_and_verify(tmp_path / "run", "llava", tmp_path / "other", quiet) == len(released.tensors)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_what_decides_the_inputs_goes_along(tmp_path, layout):
    """How a run was shown pictures and asked is in its export, though no public folder said it before."""
    for aspect, markers in (("pad", True), ("square", False)):
        folder, run = tmp_path / f"{aspect}_out", tmp_path / f"{aspect}_run"
        image, options = ImageConfig.clip(tiny.TILE, aspect), LlavaPromptOptions(image_markers=markers)
        export_checkpoint(trained(tmp_path / aspect, image=image, prompt=options), folder, layout=layout)
        released = read_released("llava", folder)
        assert any("<im_start> and <im_end> around every picture" in note for note in released.notes) == markers
        import_released(released, run)
        config = open_checkpoint(run).config
        assert (config.image, config.prompt) == (image, options)
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["image_aspect_ratio"], fields["mm_use_im_start_end"]) == ("square", False)
    (folder / "config.json").write_text(json.dumps(fields | {"image_aspect_ratio": "anyres"}))
    with pytest.raises(UnsupportedOption, match="image_aspect_ratio 'anyres' is of v1.6"):
        read_released("llava", folder)


def test_the_command_goes_there_and_back(tmp_path, capsys):
    public_llava(tmp_path / "public", "hf")
    paths = {name: str(tmp_path / name) for name in ("public", "run", "same", "original", "kept")}
    assert convert.main(["import", "--model", "llava", "--from", paths["public"], "--to", paths["run"]]) == 0
    assert "no --system-texts: prompts will have no system text" in capsys.readouterr().out
    assert convert.main(["export", "--from", paths["run"], "--to", paths["same"]]) == 0
    assert_same_tensors(tmp_path / "public", tmp_path / "same")  # as it came
    assert convert.main(["export", "--layout", "original", "--from", paths["run"], "--to", paths["original"]]) == 0
    assert "model.mm_projector.0.weight" in TensorFiles(tmp_path / "original")
    assert json.loads((tmp_path / "original" / "config.json").read_text())["model_type"] == "llava_llama"
    assert convert.main(["verify", "--model", "llava", "--from", paths["run"], "--against", paths["original"]]) == 0
    assert convert.main(["export", "--layout", "vita_jax", "--from", paths["run"], "--to", paths["kept"]]) == 0
    kept, run = (flatten(load_params(paths[name]).params) for name in ("kept", "run"))
    assert kept.keys() == run.keys() and all(np.array_equal(kept[path], run[path]) for path in run)
    capsys.readouterr()
    assert convert.main(["inspect", paths["public"]]) == 0
    out = capsys.readouterr().out
    assert "read as llava" in out and "complete: every tensor" in out
    assert convert.main(["inspect", paths["run"]]) == 0
    assert "-> nothing" not in capsys.readouterr().out


def test_an_imported_run_answers(tmp_path):
    public_llava(tmp_path / "public", "hf_5")
    import_released(read_released("llava", tmp_path / "public"), tmp_path / "run")
    session = Session.load(tmp_path / "run")
    session.max_new_tokens = 2
    assert session.config.system_texts.lang == ""
    assert isinstance("".join(session.ask("a")), str) and len(session.turns) == 2


def test_a_tower_in_clips_own_files(tmp_path):
    config = public_llava(tmp_path / "public", "original", tower=False)
    assert guess_model(tmp_path / "public") == "llava"
    released = read_released("llava", tmp_path / "public")
    assert released.config == config and f"the vision tower is that of {CLIP}" in released.notes
    import_released(released, tmp_path / "run")
    assert open_and_verify(tmp_path / "run", "llava", tmp_path / "public", quiet) > 0
    export_checkpoint(open_checkpoint(tmp_path / "run"), tmp_path / "whole")
    assert llava_weights.has_tower(TensorFiles(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "public" / CLIP)
    fields = json.loads((tmp_path / "public" / "config.json").read_text())
    with pytest.raises(UserError, match="'somebody/clip-tiny' is not known by name"):
        read_released("llava", tmp_path / "public")
    vision = {"vision_config": clip_weights.config_to_hf(config.vision)}
    (tmp_path / "public" / "config.json").write_text(json.dumps(fields | vision))
    with pytest.raises(UserError, match="it holds no vision tower .* put CLIP's own folder, .* into it as clip-tiny"):
        read_released("llava", tmp_path / "public")


def test_clip_alone_is_where_a_llava_starts_from(tmp_path):
    config = public_llava(tmp_path / "public", "original", tower=False)
    clip = tmp_path / "public" / CLIP
    assert guess_model(clip) == "clip"
    released = read_released("clip", clip)
    assert released.notes == ("visual_projection.weight is left out: models read the tower before it",)
    assert convert.main(["import", "--model", "clip", "--from", str(clip), "--to", str(tmp_path / "run")]) == 0
    stored = open_checkpoint(tmp_path / "run")
    assert set(stored.params) == {"vision"} and stored.config.model.vision == config.vision
    export_checkpoint(stored, tmp_path / "back")
    back, there = TensorFiles(tmp_path / "back"), TensorFiles(clip)
    left_out = {"text_model.final_layer_norm.bias", "logit_scale", "visual_projection.weight"}
    assert set(there) - set(back) == left_out
    assert all(np.array_equal(back[name], there[name]) for name in back)


def test_what_the_first_stage_leaves(tmp_path):
    tensors = {"model.mm_projector.weight": np.ones((4096, 1024), np.float16)}
    tensors |= {"model.mm_projector.bias": np.zeros(4096, np.float16)}
    write_tensors(tmp_path / "linear", tensors.items())
    assert guess_model(tmp_path / "linear") == "llava_projector"
    import_released(read_released("llava_projector", tmp_path / "linear"), tmp_path / "run")
    params = flatten(load_params(tmp_path / "run").params)
    assert {path: leaf.shape for path, leaf in params.items()} == {
        "projector/linear/kernel": (1024, 4096),
        "projector/linear/bias": (4096,),
    }
    layers = {"0.weight": (5120, 1024), "0.bias": (5120,), "2.weight": (5120, 5120), "2.bias": (5120,)}
    tensors = {f"base_model.model.mm_projector.{name}": np.zeros(shape, np.int8) for name, shape in layers.items()}
    write_tensors(tmp_path / "mlp", (tensors | {"model.embed_tokens.weight": np.zeros((2, 2), np.int8)}).items())
    released = read_released("llava_projector", tmp_path / "mlp")
    assert released.config.projector.projector_type == "mlp2x_gelu" and fitting_table(released)[1] == []
    write_tensors(tmp_path / "other", [("model.mm_projector.weight", np.zeros((3, 2), np.float32))])
    with pytest.raises(UserError, match="shape .3, 2., which is neither"):
        read_released("llava_projector", tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def public(tmp_path):
    public_llava(tmp_path / "public", "hf")
    return tmp_path / "public"


def refuse(folder: Path, message: str, kind: type[UserError] = UserError) -> str:
    run = folder.parent / "run"
    with pytest.raises(kind, match=message) as error:
        import_released(read_released("llava", folder), run)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and not run.exists()
    return str(error.value)


def test_all_that_does_not_fit_is_in_one_message(public):
    wide = np.zeros((3, 3), np.float32)
    rewrite(
        public,
        **{
            "multi_modal_projector__linear_1__bias": None,
            "language_model__stray": wide,
            "language_model__lm_head__weight": wide,
        },
    )
    text = refuse(public, r"1 tensors missing: multi_modal_projector\.linear_1\.bias")
    assert "1 tensors that nothing uses: language_model.stray" in text
    assert "another shape: language_model.lm_head.weight (3, 3) instead of" in text


def test_a_download_that_was_interrupted(public):
    shards = sorted(public.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    refuse(public, f"{shards[1].name}: not a complete safetensors file")
    shards[1].write_bytes(whole[:5])
    refuse(public, f"{shards[1].name}: not a complete safetensors file")
    shards[1].unlink()
    refuse(public, f"names the shard {shards[1].name}, which is not there; the download is incomplete")
    shards[1].write_bytes(whole)
    (public / "config.json").write_text('{"model_type": "llava", "text_c')
    refuse(public, "config.json cannot be read")
    (public / "config.json").unlink()
    refuse(public, "there is no config.json")


def test_a_download_of_clip_that_was_interrupted(tmp_path):
    """Of the tower in an original's folder."""
    public_llava(tmp_path / "public", "original", tower=False)
    file = tmp_path / "public" / CLIP / "model.safetensors"
    for size in (-10, 5):
        file.write_bytes(file.read_bytes()[:size])
        refuse(tmp_path / "public", f"{CLIP}/model.safetensors: not a complete safetensors file")
    file.rename(file.with_name("pytorch_model.bin"))
    refuse(tmp_path / "public", f"{CLIP}/pytorch_model.bin .*(damaged|not a complete file of torch.save)")


def test_other_rows_of_the_vocabulary_are_taken_from_the_tensors(public):
    fields = json.loads((public / "config.json").read_text())
    fields["text_config"]["vocab_size"] = 32064
    (public / "config.json").write_text(json.dumps(fields))
    released = read_released("llava", public)
    assert released.config == tiny_llava() and any("32064 vocabulary rows" in note for note in released.notes)


def test_models_that_are_no_llava_of_ours(public):
    fields = json.loads((public / "config.json").read_text())
    for change, message in (
        ({"projector_hidden_act": "silu"}, "projector_hidden_act 'silu'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy 'cls'"),
    ):
        (public / "config.json").write_text(json.dumps(fields | change))
        refuse(public, message, UnsupportedOption)
    folder = public.parent / "original"
    public_llava(folder, "original")
    fields = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "llava_mpt"}, "only LLaVA with a LLaMA"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "is of v1.6"),
        ({"mm_projector_type": "ldp"}, "none of LLaVA's"),
    ):
        (folder / "config.json").write_text(json.dumps(fields | change))
        refuse(folder, message, UnsupportedOption)


@pytest.mark.parametrize("projector", ["transformer.mm_projector.weight", "transformer.mm_projector.0.weight"])
def test_a_llava_with_mpt_is_refused_by_name(tmp_path, capsys, projector):
    names = ["transformer.wte.weight", "transformer.blocks.0.attn.Wqkv.weight", "transformer.norm_f.weight", projector]
    write_tensors(tmp_path, [(name, np.zeros((2, 2), np.float32)) for name in names])
    (tmp_path / "config.json").write_text('{"model_type": "llava_mpt", "d_model": 2}')
    with pytest.raises(UnsupportedOption, match="its language model is MPT .* only LLaVA with a LLaMA is offered"):
        read_released("llava", tmp_path)
    assert convert.main(["inspect", str(tmp_path)]) == 2
    assert "its language model is MPT" in capsys.readouterr().err


def test_layouts_that_a_model_has_not(public, tmp_path):
    import_released(read_released("llava", public), tmp_path / "run")
    with pytest.raises(UserError, match="layout 'torch' is unknown; use one of original, hf"):
        export_checkpoint(open_checkpoint(tmp_path / "run"), tmp_path / "back", layout="torch")
    linear = tmp_path / "linear"
    public_llava(linear, "original", projector="linear")
    import_released(read_released("llava", linear), tmp_path / "run_linear")
    with pytest.raises(UnsupportedOption, match="no projector of projector_type 'linear'"):
        export_checkpoint(open_checkpoint(tmp_path / "run_linear"), tmp_path / "back", layout="hf")
    assert not (tmp_path / "back").exists()
