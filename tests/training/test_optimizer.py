"""Schedule, multipliers and AdamW against hand-written arithmetic; the golden schedule is in tests/parity."""

from __future__ import annotations

import jax
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
    round_at_random,
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


def directions(optimizer, params, grads_by_step):
    """What the optimiser makes of every gradient, and its last state."""
    state, update, given = optimizer.init(params), jax.jit(optimizer.update), []
    for grads in grads_by_step:
        direction, state = update(grads, state, params)
        given.append(direction)
    return given, state


def test_random_rounding_is_right_on_average_and_to_a_neighbour():
    x = jnp.asarray(np.random.default_rng(0).uniform(1.0, 2.0, 50), jnp.float32)
    draws = jax.vmap(lambda key: round_at_random(x, key))(jax.random.split(jax.random.key(0), 4000))
    spacing = 2.0**-7  # of bfloat16 between 1 and 2
    draws = np.asarray(draws, np.float64)
    assert np.abs(draws - np.asarray(x)).max() < spacing
    # Four standard deviations of a mean of 4000 draws, at most.
    np.testing.assert_allclose(draws.mean(axis=0), x, atol=4 * 0.5 * spacing / 4000**0.5)
    exact = jnp.asarray([0.0, 1.0, -3.5], jnp.float32)
    np.testing.assert_array_equal(round_at_random(exact, jax.random.key(1)).astype(jnp.float32), exact)


def test_moments_in_bfloat16_follow_those_in_float32():
    """The directions differ by a few percent, at random and without a bias; the moments take half the bytes."""
    rng = np.random.default_rng(0)
    params = {"a/kernel": jnp.zeros((40, 50)), "a/bias": jnp.zeros((50,))}
    signal = {path: rng.normal(size=leaf.shape) for path, leaf in params.items()}
    grads = [
        {path: jnp.asarray(x + 0.5 * rng.normal(size=x.shape), jnp.float32) for path, x in signal.items()}
        for _ in range(400)
    ]
    exact, half = (OptimizerConfig(clip_norm=None, moments=moments) for moments in ("float32", "bfloat16"))
    multipliers = dict.fromkeys(params, 1.0)
    want, state = directions(make_optimizer(exact, multipliers), params, grads)
    got, half_state = directions(make_optimizer(half, multipliers), params, grads)
    for step in (0, 99, 399):
        a, b = (np.asarray(x[step]["a/kernel"], np.float64) for x in (want, got))
        assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 0.05
        assert abs(np.mean(b / a, where=np.abs(a) > 0.1) - 1) < 0.005
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(s) if leaf.ndim) for s in (state, half_state)]
    assert sizes == [2 * 4 * 2050, 2 * 2 * 2050]


def test_second_moments_in_bfloat16_fall_as_they_should():
    """Of gradients that stop: rounded to the nearest, 0.999 times a moment would be that moment again."""
    params = {"a/kernel": jnp.zeros((64, 64))}
    one, none = {"a/kernel": jnp.ones((64, 64))}, {"a/kernel": jnp.zeros((64, 64))}
    config = OptimizerConfig(clip_norm=None, moments="bfloat16")
    _, state = directions(make_optimizer(config, {"a/kernel": 1.0}), params, [one] * 5 + [none] * 1000)
    (moment,) = (leaf for leaf in jax.tree.leaves(state[0].nu))
    assert moment.dtype == jnp.bfloat16
    mean = float(moment.astype(jnp.float32).mean())
    assert mean == pytest.approx((1 - 0.999**5) * 0.999**1000, rel=0.01)
    assert jnp.bfloat16(0.999 * jnp.bfloat16(1.01)) == jnp.bfloat16(1.01)


def test_muon_keeps_its_momentum_in_bfloat16():
    params = {"a/kernel": jnp.ones((16, 32)), "a/bias": jnp.ones((32,))}
    config = OptimizerConfig(moments="bfloat16")
    optimizer = make_optimizer(config, dict.fromkeys(params, 1.0), muon_matrices(params))
    state = jax.eval_shape(optimizer.init, params)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape != (3,)}
    assert kinds == {jnp.dtype(jnp.bfloat16)}


def test_adafactor_divides_by_rows_and_columns_and_keeps_next_to_nothing():
    rng = np.random.default_rng(0)
    params = {"a/kernel": jnp.zeros((3, 130, 140)), "a/bias": jnp.zeros((140,))}
    multipliers, config = {"a/kernel": 0.5, "a/bias": 1.0}, OptimizerConfig(clip_norm=None)
    grads = [
        {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in params.items()} for _ in range(2)
    ]
    optimizer = make_optimizer(config, multipliers, factored=True)
    got, state = directions(optimizer, params, grads)
    squares = [np.asarray(g["a/kernel"], np.float64) ** 2 for g in grads]
    decay = 1 - 2**-0.8  # of the second step; the first one's is 0
    mean = decay * squares[0] + (1 - decay) * squares[1]
    rows, columns = mean.mean(axis=2, keepdims=True), mean.mean(axis=1, keepdims=True)
    want = np.asarray(grads[1]["a/kernel"]) / np.sqrt(rows * columns / rows.mean(axis=1, keepdims=True))
    want = 0.5 * want / max(1.0, np.sqrt(np.mean(want**2)))
    np.testing.assert_allclose(got[1]["a/kernel"], want, rtol=1e-4, atol=1e-6)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    adam = jax.eval_shape(make_optimizer(config, multipliers).init, params)
    assert size < sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(adam)) / 50


@pytest.mark.parametrize(("config", "factored"), [({"moments": "bfloat16"}, False), ({}, True)])
def test_memory_saving_optimisers_find_the_same_minimum(config, factored):
    """Least squares: the loss falls by as many orders of magnitude as with float32 Adam."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(256, 130)), jnp.float32)
    targets = inputs @ jnp.asarray(rng.normal(size=(130, 132)), jnp.float32)

    def final_loss(optimizer):
        def loss(params):
            return jnp.mean((inputs @ params["a/kernel"] - targets) ** 2)

        @jax.jit
        def step(carry, number):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            direction, state = optimizer.update(grads, state, params)
            rate = warmup_cosine(number, 400, 0.05, 0.05)
            return (jax.tree.map(lambda p, d: p - rate * d, params, direction), state), value

        params = {"a/kernel": jnp.zeros((130, 132))}
        return float(jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(400))[1][-1])

    multipliers = {"a/kernel": 1.0}
    exact = final_loss(make_optimizer(OptimizerConfig(clip_norm=None), multipliers))
    saving = final_loss(make_optimizer(OptimizerConfig(clip_norm=None, **config), multipliers, factored=factored))
    assert exact < 0.01 * float(jnp.mean(targets**2))
    assert saving < 2 * exact
