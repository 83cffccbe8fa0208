"""Intervals of means and of error rates by resampling items (Efron's percentile bootstrap)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vita_jax.errors import UserError

RESAMPLES = 2000
COVERED = 0.95


def interval(parts: Sequence[np.ndarray], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of the mean over kinds of the mean over their items.

    Args:
      parts: of each kind the scores of its items, (n,) float; items are drawn with replacement within a kind.
      seed: of the draws.
      resamples: how many.

    Returns:
      (low, high). Where all scores of every kind are equal, both are the mean itself.

    Raises:
      UserError: no kind, or one without items.
    """
    if not parts or any(len(part) == 0 for part in parts):
        raise UserError("there is nothing to take an interval of; every kind must have an item")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for part in parts:
        drawn = rng.integers(0, len(part), (resamples, len(part)))
        means += np.asarray(part, np.float64)[drawn].mean(axis=1)
    low, high = np.quantile(means / len(parts), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def rate_interval(errors: np.ndarray, units: np.ndarray, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of an error rate, sum of errors by sum of units; texts are drawn whole, with replacement.

    Args:
      errors, units: (n,) of every text; every text has at least one unit.
      seed, resamples: as `interval`.

    Returns:
      (low, high).

    Raises:
      UserError: no text, or one without units.
    """
    if len(errors) == 0 or np.min(units) < 1:
        raise UserError("there is nothing to take an interval of; every text must have a word or character")
    drawn = np.random.default_rng(seed).integers(0, len(errors), (resamples, len(errors)))
    rates = np.asarray(errors, np.float64)[drawn].sum(axis=1) / np.asarray(units, np.float64)[drawn].sum(axis=1)
    low, high = np.quantile(rates, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)
