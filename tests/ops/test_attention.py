"""Attention within segments: every implementation against the plain one with a mask, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.ops import attention, attention_kernels
from vita_jax.ops.attention import automatic_implementation, dot_product_attention, segment_attention
from vita_jax.ops.attention_kernels import active_tiles, pallas_gpu_attention, splash_attention
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.meshes import platform_of

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def make_inputs(length: int, head_dim: int = 16, heads: int = 4, kv_heads: int = 2, dtype=jnp.float32) -> Inputs:
    """Two rows: three segments between padding, and one segment that fills its row. Scores far from uniform."""
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(2, length, heads, head_dim), (2, length, kv_heads, head_dim), (2, length, kv_heads, head_dim)]
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    ends = [length // 8, length // 3, length // 2, length - length // 5, length]
    packed = np.repeat([0, 3, 1, 7, 0], np.diff([0, *ends]))
    return 2 * q, k, v, jnp.asarray(np.stack([packed, np.ones(length)]), jnp.int32)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return dot_product_attention(q, k, v, mask=make_attention_mask(segment_ids, segment_ids))


def whole(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel as a function of whole rows."""
    return lambda q, k, v, segment_ids: kernel(q, k, v, segment_ids, segment_ids, 0)


def values_and_gradients(function: Callable[..., jax.Array], inputs: Inputs) -> tuple[jax.Array, ...]:
    """The output, and gradients of a sum that weighs every output differently, padding included."""
    weights = jnp.cos(jnp.arange(inputs[0].size, dtype=jnp.float32)).reshape(inputs[0].shape)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(q, k, v, inputs[3])
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs[:3])
    return out, *gradients


def assert_equal_to_plain(function: Callable[..., jax.Array], inputs: Inputs, tolerance: float) -> None:
    got, want = values_and_gradients(function, inputs), values_and_gradients(plain, inputs)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == inputs[0].dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)
    np.testing.assert_array_equal(np.asarray(got[0])[np.asarray(inputs[3]) == 0], 0)


def test_short_rows_are_computed_as_with_a_mask():
    inputs = make_inputs(96)
    np.testing.assert_array_equal(segment_attention(*inputs, implementation="xla"), plain(*inputs))


@pytest.mark.parametrize("block", [128, 160])
def test_long_rows_go_block_by_block(monkeypatch, block):
    """With blocks that do and do not divide the row."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    assert_equal_to_plain(partial(segment_attention, implementation="xla"), make_inputs(512), 1e-6)


def test_scores_of_a_long_row_never_exist():
    length, heads = 4096, 4
    shapes = [(1, length, heads, 8), (1, length, 2, 8), (1, length, 2, 8)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    segment_ids = jnp.ones((1, length), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(segment_attention(q, k, v, segment_ids, implementation="xla"))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()
    # Of one block there are the scores, their gradients and what lies between, at most four arrays at a time.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * heads * length * length * 4
    assert f"{length},{length}]" not in compiled.as_text()


@pytest.mark.parametrize(("length", "head_dim"), [(200, 128), (640, 64)])
def test_splash_equals_plain(length, head_dim):
    """One tile, and two with a remainder."""
    kernel = whole(partial(splash_attention, interpret=True))
    assert_equal_to_plain(kernel, make_inputs(length, head_dim), 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_splash_passes_over_tiles(monkeypatch, kv_heads):
    """Many tiles, of which segments and padding leave few."""
    monkeypatch.setattr(attention_kernels, "TILE", 128)
    inputs = make_inputs(800, kv_heads=kv_heads)
    assert_equal_to_plain(whole(partial(splash_attention, interpret=True)), inputs, 1e-5)


def test_splash_of_bfloat16_is_close():
    inputs = make_inputs(200, 64, dtype=jnp.bfloat16)
    assert_equal_to_plain(whole(partial(splash_attention, interpret=True)), inputs, 0.02)


def test_parts_of_a_row_know_where_they_are(monkeypatch):
    """Queries of the second and third part against the keys of all: what a device with a part of the row computes."""
    monkeypatch.setattr(attention_kernels, "TILE", 128)
    q, k, v, segment_ids = make_inputs(480)
    want = plain(q, k, v, segment_ids)
    for kernel in (partial(splash_attention, interpret=True), attention._block_attention):
        for first in (160, 320):
            at = slice(first, first + 160)
            got = jax.jit(kernel)(q[:, at], k, v, segment_ids[:, at], segment_ids, jnp.int32(first))
            np.testing.assert_allclose(got, want[:, at], atol=1e-5)


def test_pallas_gpu_equals_plain():
    kernel = whole(partial(pallas_gpu_attention, interpret=True))
    assert_equal_to_plain(kernel, make_inputs(200, 32), 1e-5)


def test_active_tiles_hold_everything_that_is_seen():
    """And of a row whose segments fill whole tiles nothing else."""
    tile, first = 4, 8
    random = np.random.default_rng(0).integers(0, 4, (3, 24))
    ascending = np.repeat([1, 2, 2, 5, 5, 0], tile)[None]
    for ids, exact in ((random, False), (ascending, True)):
        ids = jnp.asarray(ids, jnp.int32)
        slots = first + jnp.arange(16, dtype=jnp.int32)
        active = np.asarray(active_tiles(ids[:, first:], ids, slots, tile, tile))
        seen = np.asarray(make_attention_mask(ids, ids))[:, 0, first:]
        tiles = seen.reshape(len(ids), 4, tile, 6, tile).any(axis=(2, 4))
        assert active.shape == tiles.shape and not np.any(tiles & ~active)
        own = np.eye(6, dtype=bool)[2:]
        assert active[:, own].all(), "every query has a key"
        if exact:
            np.testing.assert_array_equal(active, tiles | own)


def test_what_auto_stands_for():
    choose = partial(automatic_implementation, cut=False)
    assert choose("tpu", jnp.float32, 64) == "splash" == automatic_implementation("tpu", jnp.bfloat16, 128, cut=True)
    assert choose("gpu", jnp.bfloat16, 128) == "pallas_gpu"
    assert (
        choose("gpu", jnp.float32, 128) == choose("gpu", jnp.bfloat16, 256) == choose("cpu", jnp.bfloat16, 64) == "xla"
    )
    assert automatic_implementation("gpu", jnp.bfloat16, 128, cut=True) == "xla"


def test_the_platform_is_that_of_the_mesh():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    assert platform_of(AbstractMesh((2,), ("data",), abstract_device=device)) == "tpu"
    assert platform_of(jax.sharding.get_abstract_mesh()) == jax.default_backend()


def test_kernels_are_refused_where_they_cannot_run():
    inputs = make_inputs(16)
    with pytest.raises(UnsupportedOption, match="'splash' runs on tpu only, and this program is for cpu"):
        segment_attention(*inputs, implementation="splash")
    with pytest.raises(UnsupportedOption, match="'pallas_gpu' runs on gpu only"):
        segment_attention(*inputs, implementation="pallas_gpu")
    with pytest.raises(UserError, match="attention 'flash' is unknown; use one of auto, xla, splash, pallas_gpu"):
        segment_attention(*inputs, implementation="flash")
    with pytest.raises(ValueError, match="4 query heads cannot be shared evenly by 3"):
        dot_product_attention(inputs[0], *(jnp.ones((2, 16, 3, 16)),) * 2)
