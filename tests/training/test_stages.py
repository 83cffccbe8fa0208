"""What trains, how it is counted, and the checks made before a run."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from tests.training.tiny import experiment, model_config, stage
from tests.training.voice import voice_config
from vita_jax import config as config_lib
from vita_jax.errors import UserError
from vita_jax.models.codec.codebook_training import CodebookTraining
from vita_jax.models.codec.losses import CodecTraining
from vita_jax.parallel.mesh import MeshConfig, make_mesh
from vita_jax.training.experiment import ExperimentConfig, build_model, validate
from vita_jax.training.loop import describe
from vita_jax.training.plan import plan_stage
from vita_jax.training.stages import flatten, parameter_counts, trainable_paths, trained_so_far, unflatten

SHAPES = {
    "vision/layers/fc1/kernel": jax.ShapeDtypeStruct((2, 3), "float32"),
    "vision/layers/fc1/bias": jax.ShapeDtypeStruct((3,), "float32"),
    "projector/layers_0/kernel": jax.ShapeDtypeStruct((4, 4), "float32"),
    "language/norm/scale": jax.ShapeDtypeStruct((5,), "float32"),
}


def test_trainable_paths_keep_tree_order_and_patterns_must_match():
    chosen = trainable_paths(stage("a", trainable=("^language/", "fc1")), list(SHAPES))
    assert chosen == ["vision/layers/fc1/kernel", "vision/layers/fc1/bias", "language/norm/scale"]
    with pytest.raises(UserError, match="audio.*components are vision, projector, language"):
        trainable_paths(stage("a", trainable=("^audio/",)), list(SHAPES))
    with pytest.raises(UserError, match="regular expression"):
        trainable_paths(stage("a", trainable=("(",)), list(SHAPES))
    with pytest.raises(UserError, match="trains nothing"):
        trainable_paths(stage("a", trainable=()), list(SHAPES))


def test_counts_and_flattening():
    counts = parameter_counts(SHAPES, trainable_paths(stage("a", trainable=("kernel",)), list(SHAPES)))
    assert counts == {"vision": (6, 3), "projector": (16, 0), "language": (0, 5)}
    assert flatten(unflatten(SHAPES)) == SHAPES


def test_trained_so_far_follows_the_starts():
    first = stage("first", trainable=("^vision/",))
    second = stage("second", trainable=("^projector/",), start_from="first")
    third = stage("third", trainable=("^language/",), start_from="/some/checkpoint")
    stages = (first, second, third)
    assert trained_so_far(second, stages, list(SHAPES)) == {p for p in SHAPES if not p.startswith("language")}
    assert trained_so_far(third, stages, list(SHAPES)) == set(SHAPES)


def test_table_shows_counts_that_add_up(tmp_path):
    config = experiment(tmp_path)
    model, mesh = build_model(config), make_mesh(MeshConfig())
    plans = [plan_stage(config, model, s, mesh) for s in config.stages]
    table = describe(config, plans)
    assert "stage naming" in table and "naming_head" in table and "stage joint" in table
    head = next(line.split() for line in table.splitlines() if "naming_head" in line)
    assert head[1:] == [f"{33 * 32:,}", "0"], "what the objective adds is trained"
    joint = plans[1]
    assert not any(path.startswith("vision/") for path in joint.trainable)
    assert not any(path.startswith("naming_head") for path in joint.shapes)
    rate = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.125))
    assert "0.125" in describe(rate, plans)


def test_two_starts_that_trained_the_same_parameter_are_refused(tmp_path):
    stages = (
        stage("a", trainable=("^language/",)),
        stage("b", trainable=("^language/norm",)),
        stage("c", start_from=("a", "b")),
    )
    config = experiment(tmp_path, stages=stages)
    with pytest.raises(UserError, match="'a' and 'b' have both trained language/norm/scale"):
        plan_stage(config, build_model(config), stages[2], make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"stages.joint.steps": "0"}, "stages.joint.steps=0"),
        ({"stages.joint.name": "naming"}, "used 2 times"),
        ({"stages.joint.name": "1"}, "no valid name"),
        ({"stages.joint.start_from": "namin"}, "nearest is 'naming'"),
        ({"stages.joint.objective": "language_modelling"}, "nearest is 'language_modeling'"),
        ({"stages.joint.accumulation": "3"}, "multiple of accumulation"),
        ({"stages.joint.warmup_ratio": "2"}, "warmup_ratio"),
        ({"mesh.data": "3"}, "3 devices"),
        ({"mesh.fsdp": "0"}, "mesh.fsdp=0"),
        ({"template": "qwen2p5"}, "qwen2p5_instruct"),
        ({"image.image_size": "16"}, "image_size=16"),
        ({"tokenizer.vocab_size": "1000"}, "vocab_size=1000"),
        ({"checkpoint.keep": "0"}, "checkpoint.keep=0"),
        ({"optimizer.learning_rate": "-1"}, "optimizer.learning_rate"),
    ],
)
def test_validation_names_the_field(tmp_path, override, message):
    config = experiment(tmp_path)
    validate(config)
    with pytest.raises(UserError, match=message):
        validate(config_lib.apply_overrides(config, override))


def test_validation_of_what_only_a_file_can_say(tmp_path):
    config = experiment(tmp_path)
    wrong = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], optimizer="Muon"),))
    with pytest.raises(UserError, match="stages.naming.optimizer='Muon' is unknown; the nearest is 'muon'"):
        validate(wrong)
    norms = stage("norms", trainable=("^language/norm/",), optimizer="muon")
    config = experiment(tmp_path, stages=(norms,))
    with pytest.raises(UserError, match="stages.norms.optimizer.*trains no matrix"):
        plan_stage(config, build_model(config), norms, make_mesh(MeshConfig()))


def test_a_codec_that_is_never_whole_is_refused(tmp_path):
    training = CodecTraining(codebooks=CodebookTraining(ease_in=10))
    model = dataclasses.replace(voice_config(), codec_training=training)
    own = stage("codec", trainable=("^codec/",), objective="codec", codec_frames=8, row_tiles=0)
    for steps, fits in ((10, False), (11, True)):
        config = experiment(tmp_path, model=model, stages=(dataclasses.replace(own, steps=steps),))
        if fits:
            validate(config)
            continue
        with pytest.raises(UserError, match="stages.codec.steps=10, but .*ease_in=10"):
            validate(config)


def test_batch_must_divide_over_the_data_axes(tmp_path):
    config = config_lib.apply_overrides(experiment(tmp_path), {"mesh.data": "2", "mesh.fsdp": "4"})
    with pytest.raises(UserError, match="8 devices the batch is divided over"):
        validate(config, num_devices=8)


def test_the_whole_configuration_survives_json(tmp_path):
    config = experiment(tmp_path, model=model_config())
    path = tmp_path / "config.json"
    config_lib.save_json(config, path)
    assert config_lib.load_json(ExperimentConfig, path) == config
