"""Schedule, multipliers and AdamW against hand-written arithmetic; the golden schedule is in tests/parity."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vita_jax.errors import UserError
from vita_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_multipliers,
    make_optimizer,
    muon_matrices,
    warmup_cosine,
    warmup_steps,
)


@given(total=st.integers(1, 400), ratio=st.floats(0, 1), peak=st.floats(1e-7, 1.0))
def test_schedule_rises_to_its_peak_and_falls_to_almost_zero(total, ratio, peak):
    rates = warmup_cosine(np.arange(total), total, ratio, peak, xp=np)
    warmup = warmup_steps(total, ratio)
    assert rates.shape == (total,) and (rates >= 0).all() and (rates <= peak * (1 + 1e-12)).all()
    assert (np.diff(rates[: warmup + 1]) > 0).all() and (np.diff(rates[warmup:]) < 0).all()
    if warmup < total:
        assert rates[warmup] == pytest.approx(peak)


def test_compiled_schedule_is_the_same_in_float32():
    steps = np.arange(37)
    double = warmup_cosine(steps, 37, 0.03, 1e-5, xp=np)
    np.testing.assert_allclose(warmup_cosine(jnp.asarray(steps), 37, 0.03, 1e-5), double, rtol=2e-4, atol=1e-12)


def test_multipliers_first_match_wins_and_unused_patterns_are_errors():
    paths = ["vision/layers/norm1/scale", "vision/embeddings/kernel", "language/norm/scale"]
    scales = (("^vision/embed", 0.5), ("^vision/", 0.1))
    assert learning_rate_multipliers(scales, paths) == dict(zip(paths, (0.1, 0.5, 1.0), strict=True))
    with pytest.raises(UserError, match="audio"):
        learning_rate_multipliers((("^audio/", 0.1),), paths)
    with pytest.raises(UserError, match="regular expression"):
        learning_rate_multipliers((("(", 0.1),), paths)


def adamw(params, grads_by_step, config, multipliers, rates):
    """AdamW written out, in double precision."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t, (grads, rate) in enumerate(zip(grads_by_step, rates, strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        for k, p in params.items():
            g = grads[k] * scale
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * g**2
            direction = m[k] / (1 - config.beta1**t) / (np.sqrt(v[k] / (1 - config.beta2**t)) + config.epsilon)
            if k.endswith("kernel"):
                direction = direction + config.weight_decay * p
            params = {**params, k: p - rate * multipliers[k] * direction}
    return params


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_matches_its_definition(clip_norm):
    rng = np.random.default_rng(0)
    config = OptimizerConfig(weight_decay=0.1, clip_norm=clip_norm)
    params = {"a/kernel": rng.normal(size=(3, 4)), "a/bias": rng.normal(size=(4,))}
    multipliers = {"a/kernel": 0.1, "a/bias": 1.0}
    grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(4)]
    rates = [1e-2, 2e-2, 1e-2, 5e-3]
    optimizer = make_optimizer(config, multipliers)
    current = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = optimizer.init(current)
    for step_grads, rate in zip(grads, rates, strict=True):
        step_grads = {k: jnp.asarray(v, jnp.float32) for k, v in step_grads.items()}
        direction, state = optimizer.update(step_grads, state, current)
        current = {k: current[k] - rate * direction[k] for k in current}
    expected = adamw(params, grads, config, multipliers, rates)
    for k in params:
        np.testing.assert_allclose(current[k], expected[k], atol=2e-6)


def test_muon_takes_the_matrices_inside_of_a_model():
    shapes = {
        "language/embed_tokens/embedding": (50, 8),
        "language/lm_head/kernel": (8, 50),
        "language/layers/attention/q_proj/kernel": (4, 8, 2, 4),
        "language/layers/attention/q_proj/bias": (4, 2, 4),
        "language/layers/attention/o_proj/kernel": (4, 2, 4, 8),
        "language/layers/mlp/up_proj/kernel": (4, 8, 16),
        "vision/embeddings/patch_embed/kernel": (4, 4, 3, 8),
        "codec/generator/conv_pre/kernel_v": (7, 8, 8),
        "codec/generator/conv_pre/kernel_g": (1, 1, 8),
        "codec/generator/conv_post/kernel_v": (7, 8, 1),
        "ctc_head/ctc_lo/kernel": (8, 50),
        "projector/layers_0/kernel": (16, 8),
        "language/layers/moe/gate_proj/kernel": (4, 3, 8, 16),
        "language/layers/moe/router/kernel": (4, 8, 3),
        "language/layers/attention/k_proj/kernel": (4, 8, 1, 4),
    }
    matrices = muon_matrices({path: jnp.zeros(shape) for path, shape in shapes.items()})
    assert {path: tuple(axes) for path, axes in matrices.items()} == {
        "language/layers/attention/q_proj/kernel": ((1,), (2, 3)),
        "language/layers/attention/o_proj/kernel": ((1, 2), (3,)),
        "language/layers/mlp/up_proj/kernel": ((1,), (2,)),
        "vision/embeddings/patch_embed/kernel": ((0, 1, 2), (3,)),
        "codec/generator/conv_pre/kernel_v": ((0, 1), (2,)),
        "projector/layers_0/kernel": ((0,), (1,)),
        "language/layers/moe/gate_proj/kernel": ((2,), (3,)),
        "language/layers/attention/k_proj/kernel": ((1,), (2, 3)),
    }


def test_muon_turns_every_direction_of_a_matrix_alike_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {
        "m/layers/fc/kernel": jnp.asarray(rng.normal(size=(3, 24, 8)), jnp.float32),
        "m/conv/kernel_v": jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32),
        "m/conv/bias": jnp.asarray(rng.normal(size=(6,)), jnp.float32),
    }
    config, multipliers = OptimizerConfig(clip_norm=None), dict.fromkeys(params, 1.0) | {"m/conv/kernel_v": 0.5}
    muon, adam = make_optimizer(config, multipliers, muon_matrices(params)), make_optimizer(config, multipliers)
    state, adam_state = muon.init(params), adam.init(params)
    for _ in range(3):
        grads = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in params.items()}
        update, state = muon.update(grads, state, params)
        adam_update, adam_state = adam.update(grads, adam_state, params)
    np.testing.assert_array_equal(update["m/conv/bias"], adam_update["m/conv/bias"])
    # All singular values within the range that the Newton-Schulz iteration leaves, times 0.2 of the root of the longer
    # side, times the multiplier.
    stacked = np.asarray(update["m/layers/fc/kernel"]) / (0.2 * np.sqrt(24))
    for matrix in (*stacked, np.asarray(update["m/conv/kernel_v"]).reshape(12, 6) / (0.2 * np.sqrt(12) * 0.5)):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() > 0.4 and values.max() < 1.3
