"""Which picture text sees, and attention to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.ops.media import media_attention, media_mask, media_times

TAGS = np.array([[0, 1, 0, 1, 0, 0]], bool)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def times(tags: np.ndarray, *args, **kwargs) -> list[list[int]]:
    return np.asarray(media_times(jnp.asarray(tags), *args, **kwargs)).tolist()


def test_text_belongs_to_the_picture_before_or_after_it():
    assert times(TAGS) == [[0, 1, 1, 2, 2, 2]]
    assert times(TAGS, attend_next=True) == [[1, 1, 2, 2, 0, 0]]
    both = times(np.repeat(TAGS, 2, 0), attend_next=jnp.array([[True], [False]]))
    assert both == [[1, 1, 2, 2, 0, 0], [0, 1, 1, 2, 2, 2]]


def test_pictures_of_packed_documents_are_one_list_and_no_document_sees_anothers():
    tags = np.array([[0, 1, 0, 0, 1, 1, 0, 0, 0]], bool)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3, 0]])
    assert times(tags, segments) == [[0, 1, 1, 0, 2, 3, 3, 0, 0]]
    assert times(tags, segments, attend_next=True) == [[1, 1, 0, 2, 2, 3, 0, 0, 0]]


def test_masks():
    numbers = jnp.array([[0, 1, 3]])
    np.testing.assert_array_equal(media_mask(numbers, 2)[0], [[0, 0], [1, 0], [0, 0]])
    np.testing.assert_array_equal(media_mask(numbers, 2, all_previous=True)[0], [[0, 0], [1, 0], [1, 1]])


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_every_position_attends_to_its_picture_alone():
    q, k, v = draw(0, 1, 3, 2, 4), draw(1, 1, 2, 5, 2, 4), draw(2, 1, 2, 5, 2, 4)
    got = media_attention(q, k, v, jnp.array([[0, 1, 2]]))
    np.testing.assert_array_equal(got[:, 0], 0)
    for position, picture in ((1, 0), (2, 1)):
        scores = np.einsum("nh,mnh->nm", q[0, position], k[0, picture]) / 2
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        want = np.einsum("nm,mnh->nh", weights, v[0, picture])
        np.testing.assert_allclose(got[0, position], want, atol=1e-5)
    everything = media_attention(q, k, v, None)
    seen = media_attention(q, k[:, :1], v[:, :1], jnp.ones((1, 3), jnp.int32))
    assert np.abs(everything - seen).max() > 0.01


def test_a_picture_that_is_not_there():
    """More tags than pictures: nothing, or as in open_flamingo the mean of all tokens; before any picture nothing."""
    q, k, v, late = draw(0, 1, 2, 1, 4), draw(1, 1, 2, 3, 1, 4), draw(2, 1, 2, 3, 1, 4), jnp.array([[0, 3]])
    np.testing.assert_array_equal(media_attention(q, k, v, late), np.zeros_like(q))
    uniform = media_attention(q, k, v, late, without_media="uniform")
    np.testing.assert_array_equal(uniform[:, 0], 0)
    np.testing.assert_allclose(uniform[0, 1], v.mean((0, 1, 2)), atol=1e-6)
    every = media_attention(q, k, v, late, all_previous=True, without_media="uniform")
    np.testing.assert_allclose(every[0, 0], v.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_array_equal(media_attention(q, k[:, :0], v[:, :0], late), np.zeros_like(q))
    with pytest.raises(UserError, match="without_media 'none' is unknown; use one of zero, uniform"):
        media_attention(q, k, v, late, without_media="none")
