"""Vectors as integers and back, and products with kernels of integers: errors against their bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.ops.experts import ExpertLinear, Experts, apply_experts, route
from vita_jax.ops.int8 import LARGEST, from_int8, scaled_product, to_int8

EPSILON = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def vectors(dtype: jnp.dtype) -> np.ndarray:
    """(7 5 64): ordinary ones, one with a large value, tiny ones, huge ones, zeros, subnormal ones, constant ones."""
    x = np.random.default_rng(0).normal(size=(7, 5, 64)).astype(np.float32)
    x[1, :, 3] = 1000
    x[2] *= 1e-30
    x[3] *= 1e30
    x[4] = 0
    x[5] = 1e-40
    x[6] = -0.1
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_vector_comes_back_within_half_a_scale(dtype):
    """The quotient is rounded once (127 eps / 2 of a step at most) before it becomes an integer, the product once."""
    x = vectors(dtype)
    values, scale = jax.jit(to_int8)(jnp.asarray(x, dtype))
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == x.shape[:-1]
    back = np.asarray(from_int8(values, scale, jnp.float32), np.float64)
    step = np.asarray(scale, np.float64)[..., None]
    bound = step * (0.5 + LARGEST * EPSILON) + np.abs(x) * EPSILON
    ordinary = [0, 1, 2, 3, 4, 6]
    assert (np.abs(back - x) <= bound)[ordinary].all()
    largest = np.abs(x).max(axis=-1)
    np.testing.assert_allclose(np.asarray(scale)[[0, 1, 2, 3, 6]], largest[[0, 1, 2, 3, 6]] / 127, rtol=1e-6)
    assert np.abs(np.asarray(values))[[0, 1, 2, 3, 6]].max(axis=-1).min() == LARGEST
    assert not np.asarray(values)[4:6].any() and not back[4:6].any()
    assert (np.asarray(values) > -128).all()
    np.testing.assert_array_equal(to_int8(-jnp.asarray(x, dtype))[0], -np.asarray(values))


@pytest.mark.parametrize("num_input_axes", [1, 2])
def test_a_product_is_that_with_the_floats_within_half_a_scale_of_each_weight(num_input_axes):
    rng = np.random.default_rng(1)
    inputs, outputs = ((48,), (3, 10)) if num_input_axes == 1 else ((6, 8), (30,))
    kernel, x = rng.normal(size=(*inputs, *outputs)), rng.normal(size=(4, 5, *inputs)).astype(np.float32)
    columns = kernel.reshape(48, -1).T.astype(np.float32)
    values, scale = to_int8(jnp.asarray(columns))
    packed = jnp.asarray(np.asarray(values).T.reshape(kernel.shape))
    scale = scale.reshape(outputs)
    got = np.asarray(scaled_product(x, packed, scale, num_input_axes, jnp.float32), np.float64)
    want = np.tensordot(x.astype(np.float64), columns.T.astype(np.float64).reshape(kernel.shape), num_input_axes)
    axes = tuple(range(2, 2 + num_input_axes))
    size = np.abs(x).sum(axis=axes).reshape(4, 5, *(1 for _ in outputs))
    # Half a scale for every |x|, and 48 sums of float32.
    bound = size * np.asarray(scale, np.float64) * (0.5 + LARGEST * 50 * EPSILON)
    error = np.abs(got - want)
    assert (error <= bound).all() and error.max() > 1e-4  # integers were used
    # The integers are exact in bfloat16, too: what is rounded there is x alone, and the result.
    half = jnp.asarray(x, jnp.bfloat16)
    low = scaled_product(half, packed, scale, num_input_axes, jnp.bfloat16).astype(jnp.float32)
    exact = scaled_product(half.astype(jnp.float32), packed, scale, num_input_axes, jnp.float32)
    np.testing.assert_allclose(low, exact, rtol=2**-8, atol=1e-6)


def test_experts_with_scales_are_experts_with_floats():
    """Groups of any size, an expert without tokens included; both ways to compute them."""
    rng = np.random.default_rng(2)
    experts, width, hidden = 4, 6, 5
    integers, floats = [], []
    for inputs, outputs in ((width, hidden), (width, hidden), (hidden, width)):
        kernel = rng.integers(-127, 128, (experts, inputs, outputs)).astype(np.float32)
        scale = rng.uniform(0.001, 0.02, (experts, outputs)).astype(np.float32)
        integers.append(ExpertLinear(jnp.asarray(kernel), scale=jnp.asarray(scale)))
        floats.append(ExpertLinear(jnp.asarray(kernel * scale[:, None])))
    x = jnp.asarray(rng.normal(size=(13, width)), jnp.float32)
    routing = route(jnp.asarray(rng.normal(size=(13, experts)) - np.array([0, 0, 50, 0]), jnp.float32), 2)
    want = apply_experts(x, routing, Experts(*floats))
    for implementation in ("ragged", "dense"):
        got = apply_experts(x, routing, Experts(*integers), implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
