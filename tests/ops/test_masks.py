"""Chunk masks and their random draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.ops.masks import chunk_mask, chunked_attention_mask, padding_mask, random_chunk


@pytest.mark.parametrize(("size", "chunk", "left"), [(10, 4, -1), (11, 3, 2), (7, 1, 0), (5, 8, 1)])
def test_chunk_mask_by_its_definition(size, chunk, left):
    want = np.zeros((size, size), bool)
    for i in range(size):
        first = max((i // chunk - left) * chunk, 0) if left >= 0 else 0
        want[i, first : min((i // chunk + 1) * chunk, size)] = True
    np.testing.assert_array_equal(chunk_mask(size, chunk, left)[0, 0], want)
    np.testing.assert_array_equal(jax.jit(chunk_mask, static_argnums=0)(size, chunk, left)[0, 0], want)


def test_keys_are_masked_and_queries_are_not():
    valid = padding_mask(jnp.array([2, 4]), 4)
    np.testing.assert_array_equal(chunked_attention_mask(valid, -1, -1)[:, 0, 0], valid)
    chunked = np.asarray(chunked_attention_mask(valid, 2, 0))
    np.testing.assert_array_equal(chunked[0, 0].sum(axis=1), [2, 2, 0, 0])
    np.testing.assert_array_equal(chunked[1, 0].sum(axis=1), [2, 2, 2, 2])


@pytest.mark.parametrize("size", [1, 2, 3, 60])
def test_random_chunks_stay_in_range(size):
    draw = jax.jit(jax.vmap(lambda key: jnp.stack(random_chunk(key, size))))
    chunks, left = np.asarray(draw(jax.random.split(jax.random.key(0), 400))).T
    full = left == -1
    assert (chunks[full] == size).all() and ((chunks[~full] >= 1) & (chunks[~full] <= 25)).all()
    assert (left[~full] < np.maximum((size - 1) // chunks[~full], 1)).all()
    if size == 60:
        assert 0.35 < full.mean() < 0.65 and len(set(chunks[~full])) == 25
