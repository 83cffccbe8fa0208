"""The weight-table engine: bit-exact round trips, and errors that name what is wrong."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.conversion import tables
from vita_jax.errors import UserError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8]


@st.composite
def rules(draw: st.DrawFn) -> tables.Rule:
    split = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    flat = (math.prod(split),)
    layers, experts = draw(st.sampled_from([None, 1, 3])), draw(st.sampled_from([None, 2]))
    return tables.Rule(
        ("layer.{i}." if layers else "") + ("experts.{e}." if experts else "") + "w",
        "layers/w",
        torch_shape=draw(st.sampled_from([split, flat])),
        split=split,
        permute=draw(st.sampled_from([None, tuple(draw(st.permutations(range(len(split)))))])),
        shape=draw(st.sampled_from([None, flat])),
        layers=layers,
        experts=experts,
    )


@settings(deadline=None, max_examples=60)
@given(rules(), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_round_trip_is_bit_exact(rule: tables.Rule, dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = math.prod(rule.torch_shape) * np.dtype(dtype).itemsize
    tensors = {f"model.{name}": np.frombuffer(rng.bytes(size), dtype).reshape(rule.torch_shape) for name in rule.names}
    table = tables.Table((rule,))
    params = tables.import_params(table, tensors, prefix="model.")
    leaf = params["layers"]["w"]
    assert leaf.shape == (*rule.stack, *rule.param_shape)
    back = tables.export_params(table, params, prefix="model.")
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and back[name].flags.c_contiguous
        assert back[name].tobytes() == tensor.tobytes() and back[name].shape == tensor.shape


def test_linear_puts_inputs_first_and_splits_heads() -> None:
    weight = np.arange(24, dtype=np.float32).reshape(6, 4)  # (out, in)
    table = tables.Table(tables.linear("q", "q", (4,), (2, 3)))
    params = tables.import_params(table, {"q.weight": weight, "q.bias": np.arange(6, dtype=np.float32)})
    np.testing.assert_array_equal(params["q"]["kernel"], weight.T.reshape(4, 2, 3))
    assert params["q"]["bias"].shape == (2, 3)


def test_experts_are_stacked_behind_layers() -> None:
    table = tables.Table(tables.linear("l.{i}.experts.{e}.w", "w", (2,), (3,), bias=False, layers=2, experts=4))
    tensors = {f"l.{i}.experts.{e}.w.weight": np.full((3, 2), 10 * i + e) for i in range(2) for e in range(4)}
    kernel = tables.import_params(table, tensors)["w"]["kernel"]
    assert kernel.shape == (2, 4, 2, 3)
    np.testing.assert_array_equal(kernel[:, :, 0, 0], [[0, 1, 2, 3], [10, 11, 12, 13]])


def test_prefixed_tables_join() -> None:
    one = tables.Table(tables.norm("norm", "norm", 2, bias=False), ignore=(r".*\.position_ids",))
    both = one.prefixed(torch="a.b.", path="vision/") + one.prefixed(torch="c.", path="language/")
    tensors = {"a.b.norm.weight": np.ones(2), "c.norm.weight": np.zeros(2), "a.b.x.position_ids": np.zeros(1)}
    params = tables.import_params(both, tensors)
    assert params["vision"]["norm"]["scale"].tolist() == [1, 1]
    with pytest.raises(UserError, match="aXb.x.position_ids"):
        tables.import_params(both, tensors | {"aXb.x.position_ids": np.zeros(1)})


def test_errors_name_what_does_not_fit() -> None:
    table = tables.Table((tables.copy("layer.{i}.w", "layers/w", (2,), layers=2), tables.copy("b", "b", (1,))))
    good = {"layer.0.w": np.ones(2), "layer.1.w": np.ones(2), "b": np.ones(1)}
    with pytest.raises(UserError, match=r"1 tensors missing: layer\.1\.w"):
        tables.import_params(table, {name: good[name] for name in ("layer.0.w", "b")})
    with pytest.raises(UserError, match=r"1 tensors that nothing uses: layer\.2\.w"):
        tables.import_params(table, good | {"layer.2.w": np.ones(2)})
    with pytest.raises(UserError, match=r"tensor b: shape \(3,\), expected \(1,\)"):
        tables.import_params(table, good | {"b": np.ones(3)})
    with pytest.raises(UserError, match=r"layer\.1\.w: dtype float32, but layer 0 has float64"):
        tables.import_params(table, good | {"layer.1.w": np.ones(2, np.float32)})
    params = tables.import_params(table, good)
    with pytest.raises(UserError, match="1 parameters missing: b"):
        tables.export_params(table, {"layers": params["layers"]})
    with pytest.raises(UserError, match="1 parameters that nothing uses: c"):
        tables.export_params(table, params | {"c": np.ones(1)})
    with pytest.raises(UserError, match=r"parameter b: shape \(2,\), expected \(1,\)"):
        tables.export_params(table, params | {"b": np.ones(2)})


def test_tables_with_doubtful_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="goes together with"):
        tables.copy("layer.{i}.w", "w", (1,))
    with pytest.raises(ValueError, match="differ in size"):
        tables.copy("w", "w", (1,), (2,))
    with pytest.raises(ValueError, match="path given twice"):
        tables.Table((tables.copy("a", "w", (1,)), tables.copy("b", "w", (1,))))
