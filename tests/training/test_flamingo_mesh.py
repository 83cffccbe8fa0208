"""Flamingo's step on eight devices: the same numbers as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.flamingo import LOOKING, SIDE, data_sets, flamingo_config, flamingo_experiment, mixture_stage
from vita_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, put_replicated
from vita_jax.parallel.rules import unbox, use_mesh
from vita_jax.planning.batches import SHAPES
from vita_jax.training.experiment import build_model
from vita_jax.training.objectives import init_model
from vita_jax.training.plan import compiled_step, plan_stage
from vita_jax.training.stages import flatten
from vita_jax.training.step import TrainState

ROOT = Path(__file__).parents[2]
MESHES = {"fsdp": MeshConfig(fsdp=8), "mixed": MeshConfig(data=2, fsdp=2, tensor=2)}


def make_batch(config, stage) -> dict[str, np.ndarray]:
    """Rows of two documents, a tag at the start of each."""
    rng, batch = np.random.default_rng(0), {}
    for name, (shape, dtype) in SHAPES["flamingo"](config, stage).items():
        batch[name] = np.zeros(shape, dtype)
    for data in stage.sets:
        rows, length = data.batch_size, data.row_length
        place = np.arange(length)
        segments = np.where(place < length // 2, 1, np.where(place < length - 3, 2, 0))
        tokens = rng.integers(0, 32, (rows, length)).astype(np.int32)
        batch |= {
            f"{data.name}/tokens": tokens,
            f"{data.name}/labels": np.where(segments > 0, tokens, -100).astype(np.int32),
            f"{data.name}/positions": np.broadcast_to(place % (length // 2), (rows, length)).astype(np.int32),
            f"{data.name}/segment_ids": np.broadcast_to(segments, (rows, length)).astype(np.int32),
            f"{data.name}/media_times": np.broadcast_to(segments, (rows, length)).astype(np.int32),
            f"{data.name}/images": rng.integers(
                0, 256, (rows, data.row_images, data.frames, SIDE, SIDE, 3), dtype=np.uint8
            ),
        }
    return batch


def run_step(mesh_config: MeshConfig, devices: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Trainable parameters and metrics after two steps of random weights with open gates."""
    stage = mixture_stage("seeing", data_sets(rows=16), trainable=LOOKING, accumulation=2)
    config = flamingo_experiment("none", model=flamingo_config(), stages=(stage,), mesh=mesh_config)
    model, mesh = build_model(config), make_mesh(mesh_config, jax.devices()[:devices])
    with use_mesh(mesh):
        plan = plan_stage(config, model, stage, mesh)
        drawn = flatten(unbox(jax.jit(partial(init_model, model))(jax.random.key(0))))
        drawn = {path: leaf + 0.5 if path.endswith("_gate") else leaf for path, leaf in drawn.items()}
        placed = {path: jax.device_put(leaf, plan.shardings[path]) for path, leaf in drawn.items()}
        trainable, frozen = plan.split(placed)
        step, rng = put_replicated((np.int32(0), np.asarray(plan.rng)), mesh)
        state = TrainState(step, trainable, jax.jit(plan.optimizer.init)(trainable), rng, None)
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state(mesh)))
        batch, run = put_batch(make_batch(config, stage), mesh), compiled_step(model, plan, mesh)
        for _ in range(2):
            state, metrics = run(state, frozen, batch)
    return jax.device_get(state.trainable), {name: float(jnp.asarray(value)) for name, value in metrics.items()}


def compare() -> None:
    """Runs in a process with 8 devices."""
    expected, values = run_step(MeshConfig(), 1)
    assert values["grad_norm"] > 0.1
    for name, mesh in MESHES.items():
        got, found = run_step(mesh, 8)
        for key, value in values.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
        # Adam's first steps are as large as the rate, 1e-2 at most, however small a gradient is.
        worst = max(float(np.abs(got[path] - expected[path]).max()) for path in expected)
        assert worst <= 1e-4, f"{name}: parameters differ by {worst}"
        print(f"{name} ok {worst:.1e}")


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_flamingo_mesh"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") == len(MESHES)


if __name__ == "__main__":
    compare()
