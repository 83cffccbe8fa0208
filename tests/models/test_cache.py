"""Rows of a cache that are written, taken, put and cut by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.models.language.cache import (
    advance,
    cut_row,
    empty_cache,
    mark_written,
    put_row,
    take_row,
    with_row_ends,
    write_layer,
)
from vita_jax.ops.masks import make_attention_mask

LAYERS, ROWS, SLOTS = 2, 3, 6


def empty(batch: int = ROWS):
    return with_row_ends(empty_cache(num_layers=LAYERS, num_kv_heads=1, head_dim=2, batch=batch, num_slots=SLOTS))


def write(cache, real, values):
    """A block (b s): segment 1 where `real`; keys are the values, positions count from each row's own."""
    real, block = jnp.asarray(real), jnp.asarray(values, jnp.float32)[..., None, None] * jnp.ones((1, 2))
    k = v = cache.k
    for layer in range(LAYERS):
        k, v = (write_layer(stack, block, jnp.int32(layer), cache.end) for stack in (k, v))
    positions = cache.next_position[:, None] + jnp.arange(real.shape[1])
    return advance(cache, k, v, real, positions)


def held(cache) -> list[list[float]]:
    """The keys that each row holds, in order, the same in both layers."""
    k, segments = np.asarray(cache.k)[..., 0, 0], np.asarray(cache.segment_ids)
    np.testing.assert_array_equal(k[0], k[1])
    return [k[0, row, segments[row] > 0].tolist() for row in range(k.shape[1])]


def filled():
    cache = write(empty(), [[1, 1, 0], [1, 1, 1], [0, 0, 0]], [[1, 2, 9], [3, 4, 5], [9, 9, 9]])
    return write(cache, [[1], [0], [1]], [[6], [9], [7]])


def test_every_row_is_written_at_its_own_place():
    cache = filled()
    assert held(cache) == [[1, 2, 6], [3, 4, 5], [7]]
    assert cache.end.tolist() == cache.next_position.tolist() == [3, 3, 1]
    assert cache.segment.tolist() == [1, 1, 1]


def test_what_goes_beyond_a_row_is_dropped():
    cache = write(filled(), [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.arange(12).reshape(3, 4))
    assert held(cache) == [[1, 2, 6, 0, 1, 2], [3, 4, 5, 4], [7]]
    cache = write(cache, [[0, 0], [1, 1], [0, 0]], [[9, 9], [8, 8], [9, 9]])
    assert held(cache)[0] == [1, 2, 6, 0, 1, 2] and held(cache)[1] == [3, 4, 5, 4, 8, 8]


def test_a_row_is_taken_cut_and_put():
    cache = filled()
    moved = put_row(cache, jnp.int32(2), take_row(cache, jnp.int32(0)))
    assert held(moved) == [[1, 2, 6], [3, 4, 5], [1, 2, 6]] and moved.end.tolist() == [3, 3, 3]
    cut = cut_row(moved, jnp.int32(0), jnp.int32(1), jnp.int32(1))
    assert held(cut) == [[1], [3, 4, 5], [1, 2, 6]]
    again = write(cut, [[1], [0], [0]], [[8], [9], [9]])
    assert held(again)[0] == [1, 8] and again.end.tolist() == again.next_position.tolist() == [2, 3, 3]
    emptied = cut_row(cut, jnp.int32(1), jnp.int32(0), jnp.int32(0))
    assert held(emptied)[1] == [] and emptied.segment.tolist() == [1, 0, 1]


def test_the_mask_of_a_row_ends_at_its_own_slot():
    cache, block = filled(), jnp.array([[1, 1], [1, 0], [0, 0]])
    mask = make_attention_mask(block, mark_written(cache, block), first_query_slot=cache.end)
    assert mask.shape == (ROWS, 1, 2, SLOTS)
    assert mask.sum(axis=-1)[:, 0].tolist() == [[4, 5], [4, 0], [0, 0]]


def test_one_program_serves_every_row():
    cut = jax.jit(cut_row)
    cache, before = filled(), cut._cache_size()
    for row in range(ROWS):
        cache = cut(cache, np.int32(row), np.int32(1), np.int32(1))
    assert held(cache) == [[1], [3], [7]] and cut._cache_size() == before + 1
