"""Losses against their definitions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.tiny import VOCAB, make_batch, model_config
from vita_jax.errors import UserError
from vita_jax.models.vita import Vita
from vita_jax.parallel.rules import unbox
from vita_jax.training.objectives import OBJECTIVES, init_params, model_inputs, multi_hot_loss

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model_and_params():
    model = Vita(model_config())
    return model, unbox(jax.jit(lambda key: init_params(model, OBJECTIVES["cell_naming"], key))(KEY))


def dense_multi_hot(logits, names):
    """The definition, with explicit targets."""
    total, correct, cells = 0.0, 0, 0
    for row, words in zip(np.asarray(logits, np.float64), np.asarray(names), strict=True):
        words = sorted({int(w) for w in words if w >= 0})
        if not words:
            continue
        target = np.zeros_like(row)
        target[words] = 1
        total += (np.logaddexp(0, row) - target * row).sum()
        correct += sorted(np.argsort(-row)[: len(words)].tolist()) == words
        cells += 1
    return total, correct, cells


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 4))
def test_multi_hot_loss_is_its_definition(seed, width):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(12, 6)).astype(np.float32) * 3
    names = rng.integers(-1, 6, (12, width)).astype(np.int32)
    # Half of the rows name exactly the most likely words, so that the metric is not always zero.
    names[::2] = np.argsort(-logits[::2], axis=-1)[:, :width]
    sums = multi_hot_loss(jnp.asarray(logits), jnp.asarray(names))
    total, correct, cells = dense_multi_hot(logits, names)
    assert float(sums.loss) == pytest.approx(total, rel=1e-5)
    assert float(sums.count) == cells
    assert [float(x) for x in sums.metrics["accuracy"]] == [correct, cells]


def test_multi_hot_gradient_is_sigmoid_minus_target():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    names = jnp.array([[1, 1, -1], [4, 0, -1], [-1, -1, -1]], jnp.int32)
    target = jnp.zeros((3, 5)).at[0, 1].set(1).at[1, jnp.array([0, 4])].set(1)
    expected = (jax.nn.sigmoid(logits) - target).at[2].set(0.0)
    np.testing.assert_allclose(jax.grad(lambda x: multi_hot_loss(x, names).loss)(logits), expected, atol=1e-6)


def test_cell_naming_starts_with_an_unlikely_vocabulary(model_and_params):
    model, params = model_and_params
    sums = OBJECTIVES["cell_naming"].loss(model, params, make_batch(0), KEY)
    # Every word absent at probability 1/(v+1) costs about 1 nat in all, each present word about log v.
    words = (make_batch(0)["cell_names"] >= 0).sum() / float(sums.count)
    assert float(sums.loss / sums.count) == pytest.approx(1 + words * np.log(VOCAB), rel=0.25)


def test_cell_naming_does_not_touch_language_or_projector(model_and_params):
    model, params = model_and_params
    grads = jax.grad(lambda p: OBJECTIVES["cell_naming"].loss(model, p, make_batch(0), KEY).loss)(params)
    assert all(float(jnp.abs(g).max()) == 0 for name in ("language", "projector") for g in jax.tree.leaves(grads[name]))
    assert float(jnp.abs(grads["naming_head"]["kernel"]).max()) > 0


def test_cell_naming_refuses_rows_without_pictures_and_wrong_widths(model_and_params):
    model, params = model_and_params
    batch = make_batch(0)
    with pytest.raises(UserError, match="row_tiles"):
        OBJECTIVES["cell_naming"].loss(model, params, {**batch, "tiles": batch["tiles"][:, :0]}, KEY)
    with pytest.raises(UserError, match="cells per row"):
        OBJECTIVES["cell_naming"].loss(model, params, {**batch, "cell_names": batch["cell_names"][:, :3]}, KEY)


def test_language_loss_and_accuracy_from_full_logits(model_and_params):
    model, params = model_and_params
    batch = make_batch(3)
    sums = OBJECTIVES["language_modeling"].loss(model, params, batch, KEY)
    model_params = {name: tree for name, tree in params.items() if name != "naming_head"}
    hidden = model.apply({"params": model_params}, model_inputs(batch))
    logits = np.asarray(model.apply({"params": model_params}, hidden, method="logits"), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss, count, correct = 0.0, 0, 0
    for row in range(len(batch["tokens"])):
        for at in range(batch["tokens"].shape[1] - 1):
            label = batch["labels"][row, at + 1]
            if label >= 0 and batch["segment_ids"][row, at] == batch["segment_ids"][row, at + 1]:
                loss -= logp[row, at, label]
                correct += int(logits[row, at].argmax() == label)
                count += 1
    assert float(sums.loss) == pytest.approx(loss, rel=1e-4)
    assert [float(x) for x in sums.metrics["accuracy"]] == [correct, count]


def test_text_only_rows_train(model_and_params):
    model, params = model_and_params
    batch = make_batch(0)
    batch = {**batch, "tiles": batch["tiles"][:, :0], "feature_index": np.full_like(batch["feature_index"], -1)}
    sums = OBJECTIVES["language_modeling"].loss(model, params, batch, KEY)
    assert np.isfinite(float(sums.loss)) and float(sums.count) > 0


@pytest.mark.slow
def test_model_parameters_do_not_depend_on_the_objective(model_and_params):
    model, params = model_and_params
    plain = unbox(jax.jit(lambda key: init_params(model, OBJECTIVES["language_modeling"], key))(KEY))
    assert "naming_head" not in plain
    for name in plain:
        jax.tree.map(np.testing.assert_array_equal, plain[name], params[name])


@pytest.mark.slow
def test_load_balancing_loss_is_added_with_its_weight():
    """The released models leave it out; what the router does is reported in any case, and what bounded buffers drop."""
    config = model_config()
    language = dataclasses.replace(config.language, num_experts=4, remat="full", expert_buffer_factor=1.0)
    batch = make_batch(0, rows=2)
    models = [
        Vita(dataclasses.replace(config, language=dataclasses.replace(language, router_aux_loss_coef=weight)))
        for weight in (0.0, 0.5)
    ]
    params = unbox(jax.jit(lambda key: init_params(models[0], OBJECTIVES["language_modeling"], key))(KEY))

    def loss(params, model):
        sums = OBJECTIVES["language_modeling"].loss(model, params, batch, KEY)
        return sums.loss / sums.count, sums

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((plain, sums), plain_grads), ((total, _), grads) = (run(params, model) for model in models)
    metrics = {name: float(value / count) for name, (value, count) in sums.metrics.items()}
    assert float(total) == pytest.approx(float(plain) + 0.5 * metrics["router_balance"], rel=1e-5)
    assert sum(metrics[f"expert_load_{i}"] for i in range(4)) == pytest.approx(1.0, rel=1e-5)
    assert metrics["dropped"] == 0  # nothing is sent on one device
    router, plain_router = (g["language"]["layers"]["moe"]["router"]["kernel"] for g in (grads, plain_grads))
    assert float(jnp.abs(router - plain_router).max()) > 1e-6
