"""The FLOPs of a stage against the products that its gradient really consists of, and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from tests.training.everything import everything_config
from tests.training.tiny import VOCAB, experiment, make_batch, model_config, stage
from tests.training.voice import SPEECH, crops, pairs, voice_config
from vita_jax.models.audio.ctc_head import CtcTraining
from vita_jax.models.language.decoder import mixtral_8x7b
from vita_jax.models.vita import vita_1_5
from vita_jax.parallel.chips import CHIPS, chip_of_kind
from vita_jax.parallel.rules import unbox
from vita_jax.training.experiment import build_model
from vita_jax.training.flops import stage_flops
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.stages import flatten, trainable_paths, unflatten

ROWS, LENGTH = 4, 16


def products(jaxpr: Any) -> float:
    """FLOPs of all products with kernels (those without a batch axis) in a program, loops by their length."""
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [value for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)]
        programs = [getattr(value, "jaxpr", value) for value in inner if is_program(value)]
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            if not batched:
                total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size / outputs
        elif name == "cond":
            total += max(products(program) for program in programs)
        else:
            total += equation.params.get("length", 1) * sum(products(program) for program in programs)
    return total


def is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def gradient_products(config: Any, own: Any, batch: dict[str, np.ndarray]) -> float:
    """FLOPs of the products with kernels in the gradient of a stage."""
    model, objective = build_model(config), OBJECTIVES[own.objective]
    shapes = flatten(unbox(jax.eval_shape(lambda key: init_params(model, objective, key), jax.random.key(0))))
    chosen = set(trainable_paths(own, list(shapes)))
    chosen.update(path for path in shapes if path.split("/")[0] in objective.extra_names)

    def loss(trainable: dict[str, Any], frozen: dict[str, Any], batch: Any, key: jax.Array) -> jax.Array:
        return objective.loss(model, unflatten({**frozen, **trainable}), batch, key).loss

    trainable, frozen = ({p: x for p, x in shapes.items() if (p in chosen) == side} for side in (True, False))
    return products(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, batch, jax.random.key(0)).jaxpr)


def of_kernels(parts: dict[str, float]) -> float:
    return sum(value for name, value in parts.items() if not name.endswith("attention"))


@pytest.mark.parametrize(
    "trainable",
    [
        (".",),
        ("^projector/",),
        ("^language/norm/",),
        ("^language/",),
        ("^vision/embeddings/",),
        ("^vision/layers/mlp/fc1/bias",),
        ("^projector/layers_2/", "^language/lm_head/"),
    ],
)
def test_language_modeling_counts_the_products_of_its_gradient(trainable):
    own = stage("s", trainable=trainable, batch_size=ROWS, row_length=LENGTH)
    config = experiment("unused", stages=(own,), model=model_config())
    parts = stage_flops(config, own).parts
    # The head is computed again in the backward pass, which is no model FLOPs.
    again = 2 * config.model.language.hidden_size * VOCAB * ROWS * LENGTH
    assert of_kernels(parts) + again == gradient_products(config, own, make_batch(0, ROWS, LENGTH))


def test_hearing_counts_the_products_of_its_gradient():
    own = stage("s", batch_size=ROWS, row_length=LENGTH, row_tiles=0, row_clips=2, clip_frames=40)
    config = experiment("unused", stages=(own,), model=everything_config())
    batch = make_batch(0, ROWS, LENGTH, 0) | {
        "audio": np.zeros((ROWS, 2, 40, 80), np.float32),
        "audio_lengths": np.full((ROWS, 2), 40, np.int32),
    }
    language = config.model.language
    again = 2 * language.hidden_size * language.vocab_size * ROWS * LENGTH
    assert of_kernels(stage_flops(config, own).parts) + again == gradient_products(config, own, batch)


def test_cell_naming_counts_the_products_of_its_gradient():
    own = stage("s", objective="cell_naming", trainable=("^vision/",), batch_size=ROWS)
    config = experiment("unused", stages=(own,), model=model_config())
    assert of_kernels(stage_flops(config, own).parts) == gradient_products(config, own, make_batch(0, ROWS))


@pytest.mark.parametrize("token_weight", [0.0, 1.0])
def test_recognition_counts_the_products_of_its_gradient(token_weight):
    patterns = ("^audio/", "^ctc_head/") if token_weight else ("^audio/encoder/", "^ctc_head/")
    own = stage("s", objective="ctc", trainable=patterns, batch_size=ROWS, clip_frames=60)
    model = dataclasses.replace(everything_config(), ctc_training=CtcTraining(token_weight=token_weight))
    config = experiment("unused", stages=(own,), model=model)
    ones = np.ones((ROWS,), np.int32)
    batch = {
        "features": np.zeros((ROWS, 60, 80), np.float32),
        "lengths": 60 * ones,
        "targets": np.ones((ROWS, 3), np.int32),
        "target_lengths": 3 * ones,
        "frame_targets": np.ones((ROWS, 14), np.int32),
        "token_targets": np.ones((ROWS, 2), np.int32),
        "token_lengths": 2 * ones,
    }
    language, tokens = model.language, model.audio.adapter.num_tokens(14)
    # The gradient of the blank's row is computed along with that of the whole table, which is not used.
    unused = 2 * language.hidden_size * (language.vocab_size + 1) * ROWS * tokens * (token_weight > 0)
    assert of_kernels(stage_flops(config, own).parts) + unused == gradient_products(config, own, batch)


def test_the_speech_decoder_counts_the_products_of_its_gradient():
    model = dataclasses.replace(voice_config(), speech=dataclasses.replace(SPEECH, initial_head=False))
    own = stage("s", objective="speech_decoder", trainable=("^speech/",), batch_size=ROWS, row_length=5, codec_frames=8)
    config = experiment("unused", stages=(own,), model=model)
    batch = {name: x for name, x in pairs(0, ROWS).items() if name != "waves"}
    batch["codes"] = np.zeros((ROWS, 8), np.int32)
    assert of_kernels(stage_flops(config, own).parts) == gradient_products(config, own, batch)


@pytest.mark.slow
def test_the_codec_counts_about_the_products_of_its_gradient():
    """About: the direct sums of its convolutions leave out what the implementation adds at the edges."""
    own = stage("s", objective="codec", trainable=("^codec/",), batch_size=ROWS, codec_frames=64, steps=10)
    for start, share in ((0, 1.0), (5, 0.5), (10, 0.0)):
        config = experiment("unused", stages=(own,), model=voice_config(start))
        parts = stage_flops(config, own).parts
        if start == 0:
            whole = parts["discriminators"]
            counted = gradient_products(config, own, crops(0, ROWS, 64))
            assert sum(parts.values()) == pytest.approx(counted, rel=0.2)
        assert parts["discriminators"] == pytest.approx(share * whole)


def test_attention_and_experts_by_hand():
    language = dataclasses.replace(
        model_config().language, num_experts=4, experts_per_token=2, num_heads=4, num_kv_heads=2
    )
    own = stage("s", trainable=("^language/",), batch_size=ROWS, row_length=LENGTH, row_tiles=0)
    config = experiment("unused", stages=(own,), model=dataclasses.replace(model_config(), language=language))
    parts, tokens = stage_flops(config, own).parts, ROWS * LENGTH
    layers, d, f = language.num_layers, language.hidden_size, language.intermediate_size
    assert parts["language attention"] == 12 * layers * 4 * language.head_dim * LENGTH * tokens / 2
    assert parts["language experts"] == 6 * layers * 2 * 3 * d * f * tokens
    heads = 2 * 4 + 2 * 2
    assert parts["language"] == 6 * layers * (d * heads * language.head_dim + d * 4) * tokens
    assert parts["lm_head"] == 6 * d * VOCAB * tokens
    assert "vision" not in parts
    frozen = stage_flops(config, dataclasses.replace(own, trainable=("^language/norm/",))).parts
    assert frozen["language attention"] == parts["language attention"] / 3
    assert frozen["language"] == parts["language"] / 3 and frozen["lm_head"] == parts["lm_head"] * 2 / 3


@pytest.mark.slow
def test_full_size_models_come_to_about_six_per_parameter_and_token():
    """Qwen2-7B has 7.07e9 parameters beside its embeddings; of Mixtral-8x7B 12.9e9 are active, 12.7e9 of them here."""
    own = stage("s", trainable=("^language/",), batch_size=8, row_length=4096, row_tiles=0)
    vita = experiment("unused").image
    model = vita_1_5()
    for language, active in ((model.language, 7.07e9), (mixtral_8x7b(), 12.75e9)):
        projector = dataclasses.replace(model.projector, output_size=language.hidden_size)
        whole = dataclasses.replace(model, language=language, projector=projector, audio=None)
        image = dataclasses.replace(vita, image_size=whole.vision.image_size)
        config = experiment("unused", stages=(own,), model=whole, image=image)
        parts = stage_flops(config, own).parts
        assert of_kernels(parts) == pytest.approx(6 * active * 8 * 4096, rel=0.01)


def test_chips():
    assert chip_of_kind("TPU v5 lite") is CHIPS["v5e"] and chip_of_kind("TPU v5") is CHIPS["v5p"]
    assert chip_of_kind("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    chip = CHIPS["tpu7x"]
    assert chip.device_flops_bf16 * 2 == chip.peak_flops_bf16 and chip.device_hbm_bytes * 2 == chip.hbm_bytes
