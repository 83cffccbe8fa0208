"""The decoder with its experts on many devices: the same numbers as on one, and what its program for TPUs exchanges."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from vita_jax.conversion.tables import flatten, unflatten
from vita_jax.models import lora
from vita_jax.models.language.decoder import Decoder, DecoderConfig
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.models.language.experts import ROUTER, dropped_assignments, router_logits
from vita_jax.ops.experts import balance, dropped_share
from vita_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from vita_jax.parallel.rules import param_shardings, unbox, use_mesh

CONFIG = DecoderConfig(
    vocab_size=16,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=6,
    qkv_bias=False,
    num_experts=8,
    remat="full",
)
ROWS, LENGTH = 8, 8
MESHES = {
    "expert": MeshConfig(expert=8),
    "all but context": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "expert and context": MeshConfig(data=1, expert=4, context=2),
}
TOPOLOGY = "v5e:2x4"


def loss_fn(config: DecoderConfig, dtype: jnp.dtype = jnp.float32) -> Any:
    """(params, embeds, segments) -> loss with that of load balancing, and the share of dropped assignments."""

    def loss(params: Any, embeds: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), segments.shape)
        model = Decoder(config, dtype=dtype)
        (hidden, _), kept = model.apply({"params": params}, embeds, positions, segments, mutable=[ROUTER])
        dropped = dropped_assignments(kept)
        share = jnp.zeros(()) if dropped is None else dropped_share(dropped, config.experts_per_token, segments)
        used = balance(router_logits(kept), config.experts_per_token, segments)
        masked = jnp.sin(hidden.astype(jnp.float32)) * (segments != 0)[..., None]
        return jnp.sum(masked) + 10 * used.loss, share

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def inputs() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    segments = np.where(np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (ROWS, 1)), 1, 0)
    return jnp.asarray(rng.normal(size=(ROWS, LENGTH, CONFIG.hidden_size)), jnp.float32), jnp.asarray(segments)


def boxed_params(config: DecoderConfig = CONFIG) -> Any:
    row = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    embeds = jax.ShapeDtypeStruct((1, 2, config.hidden_size), jnp.float32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), embeds, row, row)["params"]


def drawn_params() -> dict[str, Any]:
    """With adapters at the experts and all other linear layers."""
    rng = np.random.default_rng(0)
    shapes = flatten(unbox(boxed_params()))
    shapes |= flatten(lora.init_adapters(weight_table(CONFIG), lora.LoraConfig(rank=2), jax.random.key(0)))
    drawn = {path: rng.normal(size=leaf.shape) * 0.3 for path, leaf in shapes.items()}
    return unflatten((path, jnp.asarray(leaf, jnp.float32)) for path, leaf in drawn.items())


def relative_error(got: Any, want: Any) -> float:
    """Largest difference in parts of the largest number; arrays that should be zero have to be."""
    error = float(np.abs(got - want).max() / (np.abs(want).max() or 1e-30))
    return error if math.isfinite(error) else math.inf


def compare() -> dict[str, Any]:
    """Differences to one device with the dense oracle, and shares of dropped assignments."""
    params, (embeds, segments) = drawn_params(), inputs()
    (want, _), want_grads = jax.jit(loss_fn(replace(CONFIG, expert_implementation="dense")))(params, embeds, segments)
    report: dict[str, Any] = {"errors": {}, "dropped": {}}
    for name, mesh_config in MESHES.items():
        for factor in (None, 1.0):
            mesh = make_mesh(mesh_config)
            with use_mesh(mesh):
                layout = flatten(param_shardings(boxed_params(), mesh))
                whole = NamedSharding(mesh, PartitionSpec())
                placed = {path: jax.device_put(x, layout.get(path, whole)) for path, x in flatten(params).items()}
                batch = jax.device_put((embeds, segments), NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
                step = jax.jit(loss_fn(replace(CONFIG, expert_buffer_factor=factor)))
                (loss, dropped), grads = jax.device_get(step(unflatten(iter(placed.items())), *batch))
            if factor is None:
                errors = jax.tree.map(relative_error, (loss, grads), (want, want_grads))
                report["errors"][name] = max(jax.tree.leaves(errors))
            report["dropped"][f"{name}, {factor}"] = float(dropped)
    return report


def compile_for_tpus() -> dict[str, Any]:
    """Dtype, shape and name of every collective in the gradient's program for eight TPUs that need not be there."""
    config = replace(CONFIG, hidden_size=256, head_dim=128, intermediate_size=512, expert_buffer_factor=2.0)
    rows, length = 16, 128
    boxed = boxed_params(config)  # its key is an array, which the devices of a topology could not hold
    devices = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4), devices)
    with use_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            unbox(boxed),
            param_shardings(boxed, mesh),
        )
        spread = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        embeds = jax.ShapeDtypeStruct((rows, length, config.hidden_size), jnp.bfloat16, sharding=spread)
        segments = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=spread)
        text = jax.jit(loss_fn(config, jnp.bfloat16)).lower(params, embeds, segments).compile().as_text()
    return {"tokens": rows * length, "collectives": collectives(text)}


def collectives(text: str) -> list[list[Any]]:
    """[name, dtype, shape] of every array that a collective of a compiled program makes."""
    names = r"all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    found = []
    for types, name in re.findall(rf"= (\S.*?) ({names})(?:-start)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            found.append([name, dtype, [int(size) for size in shape.split(",") if size]])
    return found


def run(part: str, **environment: str) -> dict[str, Any]:
    """Runs a function of this file in a process of its own."""
    command = [sys.executable, "-m", "tests.models.test_sharded_mixtral", part]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sharded_gradients_equal_those_of_one_device():
    """Loss with load balancing, and gradients of all parameters and adapters, with padding in every second row."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    report = run("compare", XLA_FLAGS=flags)
    assert set(report["errors"]) == set(MESHES)
    assert max(report["errors"].values()) < 1e-5, report["errors"]
    for name in MESHES:
        assert report["dropped"][f"{name}, None"] == 0 < report["dropped"][f"{name}, 1.0"] < 0.5


@pytest.mark.slow
def test_tpus_exchange_rows_and_gather_no_tokens():
    report = run("compile_for_tpus", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    kinds = {name for name, _, _ in report["collectives"]}
    assert "ragged-all-to-all" in kinds


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        print(json.dumps({"compare": compare, "compile_for_tpus": compile_for_tpus}[sys.argv[1]]()))
