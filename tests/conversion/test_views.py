"""Tensors under other names and in parts, and back."""

from __future__ import annotations

import numpy as np
import pytest

from vita_jax.conversion.tables import Rule
from vita_jax.conversion.views import Source, View, joined
from vita_jax.errors import UserError

TENSORS = {"a": np.arange(3.0), "stacked": np.arange(12.0).reshape(6, 2), "unused": np.zeros(1)}
SOURCES = {"b": Source("a"), **{f"part{i}": Source("stacked", i, 3) for i in range(3)}}


def test_a_view_renames_cuts_and_leaves_out():
    view = View(TENSORS, SOURCES)
    assert sorted(view) == ["b", "part0", "part1", "part2"] and len(view) == 4
    np.testing.assert_array_equal(view["b"], TENSORS["a"])
    np.testing.assert_array_equal(view["part1"], [[4, 5], [6, 7]])


def test_joined_is_the_inverse_in_any_order():
    view = View(TENSORS, SOURCES)
    back = dict(joined(((name, view[name]) for name in ("part2", "b", "part0", "part1")), SOURCES))
    assert set(back) == {"a", "stacked"}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_what_cannot_be_cut_or_joined_is_refused():
    with pytest.raises(UserError, match="tensor a: 3 rows cannot be cut in 2 equal parts"):
        View(TENSORS, {"half": Source("a", 0, 2)})["half"]
    with pytest.raises(UserError, match="parts of stacked are missing"):
        list(joined([("part0", np.zeros((2, 2)))], SOURCES))
    with pytest.raises(UserError, match="tensor other has no place"):
        list(joined([("other", np.zeros(1))], SOURCES))


def test_a_rule_may_name_some_layers_only():
    assert Rule("layers.{i}.gate", "gate", (1,), layers=2, numbers=(3, 7)).names == ["layers.3.gate", "layers.7.gate"]
    with pytest.raises(ValueError, match="1 numbers were given for 2 layers"):
        Rule("layers.{i}.gate", "gate", (1,), layers=2, numbers=(3,))
