"""Products group by group: tiles against one product per group, and against XLA's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.ops.grouped_matmul import LARGEST_TILE, SMALLEST_TILE, grouped_matmul, make_tiles

INPUTS, OUTPUTS = 6, 5
# Rows of each group, and how many rows there are in all.
SIZES = [
    ([3, 0, 20, 1], 24),
    ([0, 0, 0, 0], 7),
    ([0, 9, 0, 0], 9),
    ([1, 1, 1, 1], 4),
    ([8, 16, 8, 8], 48),
    ([300, 700, 5, 19], 1030),
]


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def make_arrays(groups: int, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """rows (m i), kernel (g i o), and a gradient (m o)."""
    rng = np.random.default_rng(0)
    shapes = (num_rows, INPUTS), (groups, INPUTS, OUTPUTS), (num_rows, OUTPUTS)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@jax.jit
def all_of(rows, kernel, sizes, gradient):
    result, transposed = jax.vjp(lambda rows, kernel: grouped_matmul(rows, kernel, sizes), rows, kernel)
    return result, *transposed(gradient)


@pytest.mark.parametrize(("sizes", "num_rows"), SIZES)
def test_every_group_is_multiplied_by_its_matrix(sizes, num_rows):
    rows, kernel, gradient = make_arrays(len(sizes), num_rows)
    result, to_rows, to_kernel = (np.asarray(x) for x in all_of(rows, kernel, jnp.asarray(sizes), gradient))
    start = 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        x, w, g = (np.asarray(array, np.float64) for array in (rows[own], kernel[group], gradient[own]))
        np.testing.assert_allclose(result[own], x @ w, atol=1e-5)
        np.testing.assert_allclose(to_rows[own], g @ w.T, atol=1e-5)
        np.testing.assert_allclose(to_kernel[group], x.T @ g, atol=1e-4)
        start += size
    assert result.shape == gradient.shape and to_rows.shape == rows.shape


def test_as_the_products_of_xla():
    sizes, (rows, kernel, gradient) = jnp.asarray([5, 11, 0, 8]), make_arrays(4, 24)
    want, transposed = jax.vjp(lambda rows, kernel: jax.lax.ragged_dot(rows, kernel, sizes), rows, kernel)
    got = all_of(rows, kernel, sizes, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, (want, *transposed(gradient)))


def test_sums_of_half_precision_are_float32():
    """A thousand products of 1 and 1 + 2^-7, which bfloat16 could not add up."""
    rows, gradient = jnp.ones((1000, 2), jnp.bfloat16), jnp.full((1000, 3), 1 + 2.0**-7, jnp.bfloat16)
    *_, to_kernel = all_of(rows, jnp.ones((2, 2, 3), jnp.bfloat16), jnp.asarray([1000, 0]), gradient)
    assert to_kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(to_kernel[0].astype(jnp.float32), np.float32(jnp.bfloat16(1000 * (1 + 2.0**-7))))
    assert not np.any(to_kernel[1])


@pytest.mark.parametrize(("sizes", "num_rows"), SIZES)
def test_tiles_cover_every_row_once(sizes, num_rows):
    tiles = make_tiles(jnp.asarray(sizes), num_rows)
    assert SMALLEST_TILE <= tiles.rows <= LARGEST_TILE
    number = int(tiles.number)
    assert number == sum(-(-size // tiles.rows) for size in sizes) <= len(tiles.group)
    covered = [
        (int(group), row)
        for group, start, end in zip(*(np.asarray(x[:number]) for x in tiles[1:4]), strict=True)
        for row in range(start, min(start + tiles.rows, end))
    ]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    assert covered == [(int(group), row) for row, group in enumerate(groups)]


def test_a_cpu_does_the_work_of_the_rows_alone():
    """No operation of the program multiplies all rows by all matrices."""
    rows, kernel, gradient = make_arrays(16, 1024)
    text = jax.jit(all_of).lower(rows, kernel, jnp.full(16, 64), gradient).as_text()
    assert "chlo.ragged_dot" not in text and "stablehlo.while" in text
    assert "tensor<16x1024x" not in text and "tensor<1024x16x" not in text
