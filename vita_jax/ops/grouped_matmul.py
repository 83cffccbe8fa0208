"""Rows that are sorted by group, each times the matrix of its group.

`jax.lax.ragged_dot` has kernels for it on TPUs and GPUs. Where it has none, on CPUs, XLA multiplies every row by every
matrix and selects. There the rows are walked in tiles instead, each of one group:

    rows  | 0 0 0 0 | 0 1 1 1 | 1 1 1 1 |      tiles of four rows: 0 0 0 0, 0 1 1 1 (the last three are not its own),
                                               1 1 1 1, 1 1 1 1 (behind the end: what is there is dropped)

A tile that reaches into the next group writes what is wrong there, and the next group's tiles, which come later, write
over it. Work is that of the rows, up to half a tile for each group.

Axes: m rows, g groups, i and o inputs and outputs of a matrix, t tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Rows of a tile. Every tile reads a whole matrix, so few rows are slow; many are wasted where groups are small.
SMALLEST_TILE, LARGEST_TILE = 8, 256


def grouped_matmul(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows of group 0 times the first matrix, then those of group 1 times the second, and so on.

    Args:
      rows: (m i), sorted by group.
      kernel: (g i o) in the dtype of `rows`.
      sizes: (g) int32, rows of each group; they sum to at most m.

    Returns:
      (m o) in the dtype of `rows`. Rows behind the last group are undefined, in the result as in the gradient; they
      change nothing else as long as they and their gradients are finite.
    """
    # Inside of shard_map all three must vary over the same mesh axes; the gradient of what did not is summed over them.
    return _grouped_matmul(*(_varying(x, rows, kernel, sizes) for x in (rows, kernel, sizes)))


@jax.custom_vjp
def _grouped_matmul(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(rows, kernel, sizes, cpu=_tiled, default=jax.lax.ragged_dot)


Kept = tuple[jax.Array, jax.Array, jax.Array]


def _forward(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Kept]:
    return _grouped_matmul(rows, kernel, sizes), (rows, kernel, sizes)


def _backward(kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    # One choice of platform per pass: were the choice differentiated, each side would keep what the other needs.
    to_rows, to_kernel = jax.lax.platform_dependent(
        *kept, gradient, cpu=_tiled_gradients, default=_gradients_of_ragged_dot
    )
    return to_rows, to_kernel, None


_grouped_matmul.defvjp(_forward, _backward)


def _gradients_of_ragged_dot(
    rows: jax.Array, kernel: jax.Array, sizes: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(lambda rows, kernel: jax.lax.ragged_dot(rows, kernel, sizes), rows, kernel)[1](gradient)


class Tiles(NamedTuple):
    """Tiles of one group each, in the order of the rows.

    Attributes:
      rows: of a tile.
      group: (t) int32, whose each tile is.
      start: (t) int32, its first row.
      end: (t) int32, the first row behind its group.
      number: () int32, how many there are; t is the most that there can be.
    """

    rows: int
    group: jax.Array
    start: jax.Array
    end: jax.Array
    number: jax.Array


def make_tiles(sizes: jax.Array, num_rows: int) -> Tiles:
    """Cuts `num_rows` rows, of which the groups have `sizes` (g), into tiles."""
    groups = sizes.shape[0]
    per_group = max(num_rows // groups, 1)
    # Half of an even share or less: a quarter of the work is wasted at most if groups are even.
    rows = min(max(1 << max(per_group.bit_length() - 2, 0), SMALLEST_TILE), LARGEST_TILE)
    tiles, ends = -(-sizes // rows), jnp.cumsum(sizes)
    last = jnp.cumsum(tiles)
    number = jnp.arange(num_rows // rows + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= last, axis=1, dtype=jnp.int32), groups - 1)
    start = (ends - sizes)[group] + (number - (last - tiles)[group]) * rows
    return Tiles(rows, group, start, ends[group], last[-1])


def _tiled(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    return _walk(rows, sizes, kernel.shape[2], lambda tile, group: tile @ kernel[group])


def _tiled_gradients(
    rows: jax.Array, kernel: jax.Array, sizes: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    contract = partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    to_rows = _walk(gradient, sizes, kernel.shape[1], lambda tile, group: contract(tile, kernel[group]))
    tiles = make_tiles(sizes, rows.shape[0])
    rows, gradient = (jnp.pad(x, ((0, tiles.rows), (0, 0))) for x in (rows, gradient))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        group, start = tiles.group[number], tiles.start[number]
        own = (start + jnp.arange(tiles.rows) < tiles.end[number])[:, None]
        x, y = (jax.lax.dynamic_slice_in_dim(each, start, tiles.rows) for each in (rows, gradient))
        product = jax.lax.dot_general(
            x, jnp.where(own, y, 0), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_index_in_dim(total, total[group] + product, group, 0)

    total = _varying(jnp.zeros(kernel.shape, jnp.float32), rows)
    return to_rows, jax.lax.fori_loop(0, tiles.number, add, total).astype(kernel.dtype)


def _walk(
    rows: jax.Array, sizes: jax.Array, outputs: int, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """(m, outputs): `product` of every tile and its group, at the place of the tile."""
    num_rows = rows.shape[0]
    tiles = make_tiles(sizes, num_rows)
    rows = jnp.pad(rows, ((0, tiles.rows), (0, 0)))

    def step(number: jax.Array, result: jax.Array) -> jax.Array:
        start = tiles.start[number]
        tile = jax.lax.dynamic_slice_in_dim(rows, start, tiles.rows)
        return jax.lax.dynamic_update_slice_in_dim(result, product(tile, tiles.group[number]), start, 0)

    result = _varying(jnp.zeros((rows.shape[0], outputs), rows.dtype), rows)
    return jax.lax.fori_loop(0, tiles.number, step, result)[:num_rows]


def _varying(x: jax.Array, *others: jax.Array) -> jax.Array:
    """x as it is, but inside of shard_map a value of its own on every device on which one of the others has one."""
    for other in others:
        x = jnp.where(False, jnp.sum(other[:0], dtype=x.dtype), x)
    return x
