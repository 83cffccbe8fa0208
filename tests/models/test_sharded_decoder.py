"""The decoder and its loss on eight devices: the same numbers as on one, and what the TPU compiler makes of them."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from vita_jax.errors import UserError
from vita_jax.models.language.decoder import Decoder, DecoderConfig
from vita_jax.ops.attention import segment_attention
from vita_jax.ops.embedding import lookup
from vita_jax.ops.losses import next_token_scores
from vita_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from vita_jax.parallel.rules import LOGICAL_RULES, param_shardings, unbox, use_mesh
from vita_jax.training.objectives.language import loss_axes

ROOT = Path(__file__).parents[2]
# Without the bias of keys, whose gradient is zero but for rounding.
CONFIG = DecoderConfig(
    vocab_size=62,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    intermediate_size=24,
    qkv_bias=False,
)
ROWS, LENGTH = 8, 48
# Sizes in the order of MESH_AXES.
MESHES = ((8, 1, 1, 1, 1), (1, 8, 1, 1, 1), (2, 2, 1, 2, 1), (1, 2, 1, 1, 4), (1, 1, 1, 2, 4))
TOLERANCE = 1e-5  # of the largest entry of each array


def make_batch(rows: int = ROWS, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Packed rows of three segments with padding at the end of some; about a third of the tokens has a label."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(3, length - 3, (rows, 2)), axis=1)
    place = np.arange(length)
    segments = 1 + (place >= cuts[:, :1]).astype(np.int32) + (place >= cuts[:, 1:])
    starts = np.where(segments == 3, cuts[:, 1:], np.where(segments == 2, cuts[:, :1], 0))
    segments = np.where(place < rng.integers(length - 6, length + 1, (rows, 1)), segments, 0).astype(np.int32)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    labels = np.where((segments > 0) & (rng.random((rows, length)) < 0.35), tokens, -100)
    positions = (place - starts).astype(np.int32)
    return {"tokens": tokens, "labels": labels.astype(np.int32), "positions": positions, "segment_ids": segments}


def loss(
    params: dict[str, Any], batch: dict[str, jax.Array], config: DecoderConfig = CONFIG, dtype=jnp.float32, chunk=5
) -> jax.Array:
    """Mean next-token loss of a decoder alone."""
    decoder, variables = Decoder(config, dtype=dtype), {"params": params}
    embeds = decoder.apply(variables, batch["tokens"], method="embed")
    hidden, _ = decoder.apply(variables, embeds, batch["positions"], batch["segment_ids"])
    kernel = params["lm_head"]["kernel"]
    total, count, _ = next_token_scores(
        hidden, kernel, batch["labels"], batch["segment_ids"], chunk_size=chunk, **loss_axes()
    )
    return total / count


def boxed_params(config: DecoderConfig) -> Any:
    """Abstract parameters in Linen's boxes."""
    row = jnp.zeros((1, 2), jnp.int32)
    embeds = jnp.zeros((1, 2, config.hidden_size))
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), embeds, row, row)["params"]


def assert_close(got: Any, want: Any, name: str) -> float:
    """The largest difference relative to the largest entry of its array."""

    def difference(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a), np.asarray(b)
        return float(np.abs(a - b).max() / np.abs(b).max())

    worst = max(jax.tree.leaves(jax.tree.map(difference, got, want)))
    assert worst <= TOLERANCE, f"{name}: {worst}"
    return worst


def compare_meshes() -> None:
    """Runs in a process with eight devices."""
    row = jnp.zeros((1, 2), jnp.int32)
    drawn = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2, CONFIG.hidden_size)), row, row)
    # Larger than at initialisation, so that attention is not uniform, but not by so much that rounding grows.
    params = jax.tree.map(lambda x: np.asarray(x) * (3 if x.ndim > 1 else 1), nn.unbox(drawn)["params"])
    batch = make_batch()
    want = jax.jit(jax.value_and_grad(loss))(params, batch)
    for sizes in MESHES:
        mesh = make_mesh(MeshConfig(*sizes))
        with use_mesh(mesh):
            placed = jax.tree.map(jax.device_put, params, param_shardings(boxed_params(CONFIG), mesh))
            rows = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
            got = jax.jit(jax.value_and_grad(loss))(placed, rows)
        print(f"{sizes} ok {assert_close(got, want, str(sizes)):.1e}")


def compare_kernel() -> None:
    """The TPU kernel, as ordinary operations, on devices that each have some rows, some heads and part of a row."""
    keys, length = jax.random.split(jax.random.key(0), 3), 320
    shapes = ((2, length, 4, 16), (2, length, 2, 16), (2, length, 2, 16))
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.asarray(np.stack([np.repeat([1, 2, 5, 0], [70, 130, 90, 30]), np.repeat([0, 4], [20, 300])]))

    def values(implementation: str, interpret: bool, axes: Any) -> Any:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = segment_attention(q, k, v, segments, implementation=implementation, axes=axes, interpret=interpret)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    want = values("xla", False, (None, None, None))
    axes = tuple(LOGICAL_RULES[name] for name in ("batch", "length", "kv_heads"))
    with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))):
        print(f"splash ok {assert_close(values('splash', True, axes), want, 'splash'):.1e}")
    with use_mesh(make_mesh(MeshConfig(data=4, tensor=2))), pytest.raises(UserError, match="2 rows cannot be cut in 4"):
        values("splash", True, axes)


def compare_lookup() -> None:
    """Rows of a table that is cut both ways, for rows of tokens that the devices do and do not divide."""
    table = jax.random.normal(jax.random.key(0), (12, 8))
    axes = {"table_axes": ("tensor", "fsdp"), "token_axes": (("data", "fsdp"), "context")}
    for rows, exchanged in ((4, True), (3, False)):
        tokens = jax.random.randint(jax.random.key(rows), (rows, 6), 0, 12)
        with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))):
            found = jax.jit(partial(lookup, dtype=jnp.float32, **axes))
            np.testing.assert_array_equal(found(table, tokens), table[tokens])
            assert ("all_to_all" in found.lower(table, tokens).as_text()) == exchanged
    print("lookup ok")


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for TPUs, which needs none
# ---------------------------------------------------------------------------------------------------------------------

TPU_CONFIG = replace(
    CONFIG, vocab_size=4096, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=384
)
SHAPE = re.compile(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]")


def compile_for_tpu(sizes: tuple[int, ...], rows: int, length: int, config: DecoderConfig = TPU_CONFIG) -> Any:
    """The compiled bfloat16 loss and gradients for eight chips."""
    boxed, mesh = boxed_params(config), make_mesh(MeshConfig(*sizes), tpu_devices())
    layout, place = param_shardings(boxed, mesh), batch_sharding(mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), unbox(boxed), layout)
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place) for name in make_batch()}

    def half(params: Any, batch: Any) -> jax.Array:
        return loss(params, batch, config, jnp.bfloat16, chunk=128)

    with use_mesh(mesh):
        return jax.jit(jax.value_and_grad(half), out_shardings=(None, layout)).lower(params, batch).compile()


@functools.cache
def tpu_devices() -> list[Any]:
    return topologies.get_topology_desc("v5e:2x4", platform="tpu").devices


def forward_runs(text: str) -> float:
    """How often a program runs the forward kernel for each backward one; it may have unrolled the layers."""
    forward, dkv, dq = (
        len(re.findall(rf"%splash_mha_{kind}_\S+ = .*tpu_custom_call", text)) for kind in ("fwd", "dkv", "dq")
    )
    assert dkv == dq > 0
    return forward / dq


def check_compiled_for_tpu() -> None:
    """Runs in a process that may load the TPU compiler: what exists in memory, and what travels."""
    length = 1280  # 640 on a device, which the kernel makes 1024, and 1536 keys
    compiled = compile_for_tpu((1, 2, 1, 2, 2), 4, length, replace(TPU_CONFIG, remat="full"))
    text = compiled.as_text()
    assert forward_runs(text) == 2, "forward, and again for the backward pass"
    shapes = [[int(size) for size in found.split(",")] for found in SHAPE.findall(text)]
    positions, vocabulary = {640, 1024, 1280, 1536}, {2048, 4096}
    scores = [shape for shape in shapes if sum(size in positions for size in shape) > 1]
    assert not scores, f"scores of a row exist: {scores[0]}"
    logits = [shape for shape in shapes if positions & set(shape) and vocabulary & set(shape)]
    assert not logits, f"logits of a row exist: {logits[0]}"
    full = re.findall(r"= f32\[[\d,]+\]\S* all-gather(?:-start)?\(.*", text)
    assert not full, f"gathered in float32: {full[0]}"
    print("memory ok")
    for remat in ("attention", "offload"):
        compiled = compile_for_tpu((1, 1, 1, 1, 8), 1, 8 * 1024, replace(TPU_CONFIG, remat=remat))
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert forward_runs(text) == 1, "what attention made is kept"
        assert (memory.host_temp_size_in_bytes > 0) == (remat == "offload")
        print(f"{remat} ok")


def run_with_devices(function: str, **environment: str) -> str:
    """Runs a function of this file in a process of its own; returns what it printed."""
    code = f"from tests.models.test_sharded_decoder import {function}; {function}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


EIGHT = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"}


@pytest.mark.slow
def test_every_mesh_gives_the_numbers_of_one_device():
    assert run_with_devices("compare_meshes", **EIGHT).count(" ok ") == len(MESHES)


@pytest.mark.slow
def test_the_tpu_compiler_finds_neither_scores_nor_logits():
    shared = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    assert run_with_devices("check_compiled_for_tpu", **shared).count(" ok") == 3


@pytest.mark.slow
def test_the_kernel_on_parts_of_rows_gives_the_numbers_of_whole_rows():
    assert "splash ok" in run_with_devices("compare_kernel", **EIGHT)


@pytest.mark.slow
def test_lookup_in_a_table_that_is_cut():
    assert "lookup ok" in run_with_devices("compare_lookup", **EIGHT)
