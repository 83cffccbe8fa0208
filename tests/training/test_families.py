"""Families of models under one configuration: saved and read, built, and refused what they have no parts for."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.training import tiny
from tests.training.everything import everything_config
from tests.training.flamingo import flamingo_config
from tests.training.llava import llava_config, llava_experiment, resampled_config
from vita_jax import config as config_lib
from vita_jax.data.prompts import PromptOptions
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.llava import Llava, LlavaConfig
from vita_jax.models.vita import Vita, VitaConfig
from vita_jax.parallel.rules import unbox
from vita_jax.training.experiment import ExperimentConfig, build_model, example_context, validate
from vita_jax.training.families import FAMILIES, family_of, make_model, weight_table
from vita_jax.training.objectives import OBJECTIVES, init_model
from vita_jax.training.stages import flatten

MODELS = {VitaConfig: everything_config, LlavaConfig: llava_config, FlamingoConfig: flamingo_config}


def test_every_family_is_tested_here():
    assert set(FAMILIES) == set(MODELS)


@pytest.mark.parametrize("make", MODELS.values())
def test_parameters_are_those_of_the_weight_table(make):
    config = make()
    drawn = jax.eval_shape(lambda key: init_model(make_model(config), key), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(unbox(drawn)).items()}
    assert shapes == {rule.path: (*rule.stack, *rule.param_shape) for rule in weight_table(config).rules}
    assert set(family_of(config).objectives) <= set(OBJECTIVES)


@pytest.mark.parametrize(
    ("config", "network"),
    [(tiny.model_config(), Vita), (llava_config(), Llava), (resampled_config(latents=3), Llava)],
)
def test_a_picture_takes_as_many_positions_as_the_layout_says(config, network):
    side, model = config.vision.image_size, make_model(config)
    assert type(model) is network
    variables = jax.eval_shape(model.init, jax.random.key(0), family_of(config).inputs(config))
    tiles = jax.ShapeDtypeStruct((1, 3, side, side, 3), np.uint8)
    features = jax.eval_shape(functools.partial(model.apply, method="encode_tiles"), variables, tiles)
    assert features.shape[1] == 3 * family_of(config).layout(config).features_per_slot


def test_configurations_of_both_families_are_saved_and_read(tmp_path):
    vita, llava = tiny.experiment(tmp_path), llava_experiment(tmp_path)
    for config in (vita, llava):
        validate(config)
        path = tmp_path / f"{type(config.model).__name__}.json"
        config_lib.save_json(config, path)
        assert config_lib.load_json(ExperimentConfig, path) == config
        assert type(build_model(config)) is family_of(config.model).module
    assert config_lib.differences(vita, llava)
    changed = config_lib.apply_overrides(llava, {"model.select_layer": "-1", "prompt.image_order": "random"})
    assert (changed.model.select_layer, changed.prompt.image_order) == (-1, "random")
    with pytest.raises(UserError, match="no field 'pooled_grids'"):
        config_lib.apply_overrides(llava, {"model.pooled_grids": "4"})


def test_files_are_read_strictly_and_old_ones_still(tmp_path):
    path = tmp_path / "config.json"
    saved = config_lib.to_dict(tiny.experiment(tmp_path))
    # As they were before stages had templates, and pictures another tiling.
    for stage in saved["stages"]:
        del stage["template"]
    del saved["image"]["tiling"]
    path.write_text(json.dumps(saved))
    assert config_lib.load_json(ExperimentConfig, path) == tiny.experiment(tmp_path)
    saved = config_lib.to_dict(llava_experiment(tmp_path))
    saved["model"]["select_laier"] = saved["model"].pop("select_layer")
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="config.json: config.model: unknown field 'select_laier' of LlavaConfig"):
        config_lib.load_json(ExperimentConfig, path)


def test_stages_may_have_a_template_of_their_own(tmp_path):
    config = llava_experiment(tmp_path)
    alignment, tuning = config.stages
    assert example_context(config, None, alignment).template.name == "plain"
    assert example_context(config, None, tuning).template.name == "vicuna_v1"
    assert example_context(config, None).template.name == "vicuna_v1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"stages.tuning.objective": "ctc"}, "objective='ctc': LLaVA has no parts .* use one of language_modeling"),
        ({"stages.tuning.objective": "codec", "stages.tuning.codec_frames": "4"}, "tuning.objective='codec': LLaVA"),
        ({"stages.tuning.objective": "speech_decoder", "stages.tuning.codec_frames": "4"}, "'speech_decoder': LLaVA"),
        ({"stages.tuning.row_clips": "2", "stages.tuning.clip_frames": "40"}, "row_clips=2, but the model does not"),
        ({"stages.tuning.state_labels": "true"}, "state_labels: the model has no state head"),
        ({"stages.alignment.template": "plane"}, "did you mean 'plain'"),
        ({"stages.alignment.template": "nemo"}, "template 'nemo' is none of LLaVA's; use vicuna_v1"),
        ({"template": "qwen2p5_instruct"}, "template 'qwen2p5_instruct' is none of LLaVA's"),
        ({"image.tiling": "grid", "image.max_tiles": "4"}, "a picture as one tile, but tiling='grid' gives up to 5"),
        ({"image.tiling": "tiles"}, "tiling is 'tiles'"),
        ({"image.image_size": "16"}, "image_size=16"),
    ],
)
def test_what_llava_has_not_is_refused(tmp_path, override, message):
    config = llava_experiment(tmp_path)
    with pytest.raises(UserError, match=message):
        validate(config_lib.apply_overrides(config, override))


def test_a_llava_with_a_resampler_is_saved_read_and_checked(tmp_path):
    config = llava_experiment(tmp_path, model=resampled_config())
    validate(config)
    config_lib.save_json(config, tmp_path / "config.json")
    assert config_lib.load_json(ExperimentConfig, tmp_path / "config.json") == config
    with pytest.raises(UserError, match="'cell_naming' names the tower's tokens, but model.resampler makes 4 others"):
        validate(config_lib.apply_overrides(config, {"stages.tuning.objective": "cell_naming"}))
    with pytest.raises(UnsupportedOption, match="no layout of LLaVA's checkpoints has names"):
        weight_table(config.model)


def test_prompts_of_another_family_are_refused(tmp_path):
    config = dataclasses.replace(llava_experiment(tmp_path), prompt=PromptOptions())
    with pytest.raises(UserError, match="PromptOptions is not how LLaVA's .* use LlavaPromptOptions"):
        validate(config)
