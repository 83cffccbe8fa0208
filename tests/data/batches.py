"""Batches of a loader, taken and compared."""

from __future__ import annotations

import numpy as np

from vita_jax.data.lanes import Reading

SIZES = {"batch_size": 2, "row_length": 160, "row_tiles": 6, "seed": 3, "reading": Reading(2)}


def batches_of(loader, count=None):
    """The next `count` batches, or all."""
    out = []
    for batch in loader:
        out.append(batch)
        if count is not None and len(out) == count:
            break
    return out


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert np.array_equal(a[key], b[key]), key
