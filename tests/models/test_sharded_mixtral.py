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

from tests.ops.test_expert_parallel import EIGHT_DEVICES
from vita_jax.conversion.tables import flatten, unflatten
from vita_jax.models import lora
from vita_jax.models.language.decoder import Decoder, DecoderConfig
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.models.language.experts import ROUTER, dropped_assignments, router_logits
from vita_jax.ops.experts import balance, dropped_share
from vita_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from vita_jax.parallel.rules import param_shardings, unbox, use_mesh
from vita_jax.planning.collectives import collectives
from vita_jax.planning.topology import open_topology

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
TPU_BATCH = (16, 160)


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


@jax.default_matmul_precision("highest")
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
                placed = {
                    path: jax.device_put(x, layout.get(path, replicated(mesh))) for path, x in flatten(params).items()
                }
                batch = jax.device_put((embeds, segments), batch_sharding(mesh))
                step = jax.jit(loss_fn(replace(CONFIG, expert_buffer_factor=factor)))
                (loss, dropped), grads = jax.device_get(step(unflatten(iter(placed.items())), *batch))
            if factor is None:
                errors = jax.tree.map(relative_error, (loss, grads), (want, want_grads))
                report["errors"][name] = max(jax.tree.leaves(errors))
            report["dropped"][f"{name}, {factor}"] = float(dropped)
    return report


def compile_for_tpus() -> list[list[Any]]:
    """Kind, runs in a step, bytes and shape of all collectives in the gradient's program for TPUs that are not here."""
    config = replace(CONFIG, hidden_size=256, head_dim=128, intermediate_size=512)
    boxed = boxed_params(config)  # its key is an array, which the devices of a topology could not hold
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4), open_topology("v5e:2x4").devices)
    with use_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            unbox(boxed),
            param_shardings(boxed, mesh),
        )
        embeds = jax.ShapeDtypeStruct((*TPU_BATCH, 256), jnp.bfloat16, sharding=batch_sharding(mesh))
        segments = jax.ShapeDtypeStruct(TPU_BATCH, jnp.int32, sharding=batch_sharding(mesh))
        text = jax.jit(loss_fn(config, jnp.bfloat16)).lower(params, embeds, segments).compile().as_text()
    return [[one.kind, one.times, one.bytes_sent, one.shape] for one in collectives(text, mesh.size)]


def run(part: str, **environment: str) -> Any:
    """Runs a function of this file in a process of its own, and returns what it returned."""
    command = [sys.executable, "-m", "tests.models.test_sharded_mixtral", part]
    root, environment = Path(__file__).parents[2], {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sharded_gradients_equal_those_of_one_device():
    """Loss with load balancing, and gradients of all parameters and adapters, with padding behind most rows."""
    report = run("compare", **EIGHT_DEVICES)
    assert set(report["errors"]) == set(MESHES)
    assert max(report["errors"].values()) < 1e-5, report["errors"]
    for name in MESHES:
        assert report["dropped"][f"{name}, None"] == 0 < report["dropped"][f"{name}, 1.0"] < 0.5


@pytest.mark.slow
def test_tpus_exchange_rows_and_gather_no_tokens():
    found = run("compile_for_tpus", JAX_ENABLE_COMPILATION_CACHE="false")
    rows = TPU_BATCH[0] * TPU_BATCH[1] // 8 * CONFIG.experts_per_token
    exchanges = [(times, sent) for kind, times, sent, _ in found if kind == "ragged-all-to-all"]
    # There and back, forward, again for the gradient, and the gradient; 512 bytes a row, of which 3 of 4 parts leave.
    assert sum(times for times, _ in exchanges) == 6 * CONFIG.num_layers
    assert {sent for _, sent in exchanges} == {rows * 512 * 3 / 4}
    gathered = [
        [int(size) for size in re.findall(r"\d+", re.findall(r"\[([\d,]*)\]", shape)[-1])]
        for kind, _, _, shape in found
        if kind == "all-gather"
    ]
    # The length of a row has a factor that no dimension of a parameter has.
    assert gathered and [shape for shape in gathered if math.prod(shape) % 5 == 0] == []
    kernels = [shape for kind, _, _, shape in found if kind == "all-gather" and "256,512]" in shape]
    assert kernels and all("bf16" in shape and "f32" not in shape for shape in kernels)


if __name__ == "__main__":
    print(json.dumps({"compare": compare, "compile_for_tpus": compile_for_tpus}[sys.argv[1]]()))
