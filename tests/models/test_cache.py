"""Rows of a cache that are written, taken, put and cut by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.models.language.cache import (
    Int8Stack,
    advance,
    cut_row,
    empty_cache,
    mark_written,
    put_row,
    read_layer,
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


def integers(batch: int, *, rows: bool, num_kv_heads: int = 2, head_dim: int = 8):
    sizes = {"num_layers": LAYERS, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "num_slots": SLOTS}
    cache = empty_cache(**sizes, batch=batch, dtype=jnp.int8)
    return with_row_ends(cache) if rows else cache


@pytest.mark.parametrize("rows", [False, True])
def test_integers_come_back_within_half_a_scale_of_each_head(rows):
    """Every head of every position has a scale of its own: one that is a thousand times larger spoils no other."""
    rng = np.random.default_rng(0)
    cache = integers(ROWS, rows=rows)
    block = rng.normal(size=(ROWS, 4, 2, 8)).astype(np.float32) * np.array([1, 1000])[:, None]
    stack = write_layer(cache.k, jnp.asarray(block), jnp.int32(1), cache.end + 1)
    assert isinstance(stack, Int8Stack) and stack.values.dtype == jnp.int8
    got = np.asarray(read_layer(stack, jnp.int32(1), jnp.float32))[:, 1:5]
    bound = np.abs(block).max(axis=-1, keepdims=True) / 254
    assert (np.abs(got - block) <= bound * (1 + 1e-4)).all() and np.abs(got - block).max() > 0
    np.testing.assert_allclose(stack.scales[1, :, 1:5], bound[..., 0] * 2, rtol=1e-6)
    assert not np.asarray(stack.values[0]).any() and not np.asarray(stack.values[1, :, [0, 5]]).any()
    assert read_layer(stack, jnp.int32(1), jnp.bfloat16).dtype == jnp.bfloat16


def test_rows_of_integers_are_taken_put_and_cut_with_their_scales():
    cache = integers(ROWS, rows=True, num_kv_heads=1, head_dim=2)
    cache = write(cache, [[1, 1, 0], [1, 1, 1], [0, 0, 0]], [[1, 2, 9], [3, 4, 5], [9, 9, 9]])
    moved = put_row(cache, jnp.int32(2), take_row(cache, jnp.int32(1)))

    def keys(cache) -> np.ndarray:
        """Of the second layer, 0 where a slot holds nothing."""
        read = np.asarray(read_layer(cache.k, jnp.int32(1), jnp.float32))[..., 0, 0]
        return np.where(cache.segment_ids > 0, read, 0)[:, :4]

    np.testing.assert_allclose(keys(moved), [[1, 2, 0, 0], [3, 4, 5, 0], [3, 4, 5, 0]], rtol=1e-6)
    cut = cut_row(moved, jnp.int32(1), jnp.int32(1), jnp.int32(1))
    again = write(cut, [[0], [1], [1]], [[9], [7], [6]])
    np.testing.assert_allclose(keys(again), [[1, 2, 0, 0], [3, 7, 0, 0], [3, 4, 5, 6]], rtol=1e-6)
    assert again.segment_ids.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_bytes_of_keys_and_values():
    one = LAYERS * ROWS * SLOTS * 2  # vectors of keys, and as many of values
    for dtype, per_vector in ((jnp.float32, 32), (jnp.bfloat16, 16), (jnp.int8, 8 + 4)):
        sizes = {"num_layers": LAYERS, "num_kv_heads": 2, "head_dim": 8, "batch": ROWS, "num_slots": SLOTS}
        cache = jax.eval_shape(lambda sizes=sizes, dtype=dtype: empty_cache(**sizes, dtype=dtype))
        assert cache.num_bytes == 2 * one * per_vector and cache.num_slots == SLOTS
