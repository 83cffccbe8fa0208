"""Bootstrap intervals against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.evaluation.bootstrap import interval


def test_equal_scores_have_no_width():
    assert interval([np.ones(5), np.zeros(3)], 0) == (0.5, 0.5)


def test_the_width_is_that_of_the_normal_approximation_for_many_items():
    scores = np.array([1.0] * 300 + [0.0] * 100)
    low, high = interval([scores], 1)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    np.testing.assert_allclose((low, high), (0.75 - half, 0.75 + half), atol=0.006)


def test_kinds_are_resampled_apart_and_weigh_the_same():
    """Variance of a mean of two kinds: a quarter of the sum of theirs."""
    parts = [np.array([1.0, 0.0] * 100), np.array([1.0, 0.0] * 400)]
    low, high = interval(parts, 2, resamples=8000)
    half = 1.96 * np.sqrt(0.25 / 200 + 0.25 / 800) / 2
    np.testing.assert_allclose((low, high), (0.5 - half, 0.5 + half), atol=0.004)


def test_two_items_of_one_kind():
    """Means of two draws: 0, 1/2, 1/2, 1 alike."""
    assert interval([np.array([0.0, 1.0])], 0) == (0.0, 1.0)


def test_the_seed_decides_and_nothing_is_refused():
    scores = [np.array([0.0, 1.0, 1.0, 0.5, 0.2])]
    assert interval(scores, 3) == interval(scores, 3)
    for parts in ([], [np.array([])]):
        with pytest.raises(UserError, match="nothing to take an interval of"):
            interval(parts, 0)
