"""Properties of the train step: accumulation, frozen parameters, one compilation, sharded == unsharded."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import experiment, make_batch, model_config, stage
from vita_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from vita_jax.parallel.rules import use_mesh
from vita_jax.training.experiment import build_model
from vita_jax.training.objectives import LossSums
from vita_jax.training.optimizer import OptimizerConfig, make_optimizer
from vita_jax.training.plan import initial_params, plan_stage
from vita_jax.training.step import init_state, train_step

ROWS = 8
STEPS = 4
# Adam divides by the size of the gradient, so a gradient that is zero but for rounding (that of a key bias) moves its
# parameter by a full step in a random direction. With this epsilon such parameters stay, and the comparisons below can
# be tight.
OPTIMIZER = OptimizerConfig(epsilon=1e-3)


@functools.cache
def first_params(objective: str) -> dict[str, np.ndarray]:
    """Drawing costs a compilation, and its result does not depend on the mesh."""
    own = stage("only", objective=objective)
    config = experiment("unused", stages=(own,), model=model_config())
    model = build_model(config)
    plan = plan_stage(config, model, own, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    return jax.device_get(initial_params(config, model, plan))


@functools.cache
def run_steps(*, mesh_config=None, trainable=(".",), objective="language_modeling", accumulation=1, optimizer="adamw"):
    """Parameters before and after a few steps, metrics, state, and number of compilations. One device unless a mesh
    is given.
    """
    shape = {"accumulation": accumulation, "batch_size": ROWS, "steps": 10}
    own = stage("only", trainable=trainable, objective=objective, optimizer=optimizer, **shape)
    config = experiment("unused", stages=(own,), model=model_config(), optimizer=OPTIMIZER)
    mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
    model = build_model(config)
    before = first_params(objective)
    with use_mesh(mesh):
        plan = plan_stage(config, model, own, mesh)
        params = {path: jax.device_put(value.copy(), plan.shardings[path]) for path, value in before.items()}
        trainable_params, frozen = plan.split(params)
        layout = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state(mesh))
        state = jax.device_put(init_state(trainable_params, plan.optimizer, plan.rng), layout)
        step_fn = jax.jit(
            functools.partial(
                train_step,
                loss_fn=functools.partial(plan.objective.loss, model),
                optimizer=plan.optimizer,
                schedule=plan.schedule,
                accumulation=accumulation,
            ),
            donate_argnums=0,
            out_shardings=(layout, None),
        )
        history = []
        batch = {name: x for name, x in make_batch(0, ROWS).items() if name in plan.objective.batch_keys}
        for _ in range(STEPS):
            state, metrics = step_fn(state, frozen, put_batch(batch, mesh))
            history.append({name: float(value) for name, value in metrics.items()})
        after = jax.device_get({**frozen, **state.trainable})
    return before, after, history, state, step_fn._cache_size()


@pytest.mark.slow
def test_loss_falls_and_there_is_one_compilation():
    before, after, history, state, compilations = run_steps()
    assert compilations == 1 and int(state.step) == STEPS
    assert history[-1]["loss"] < history[0]["loss"]
    for name in ("loss", "accuracy", "grad_norm", "param_norm", "update_norm", "lr", "tokens"):
        assert np.isfinite(history[0][name])
    labelled = make_batch(0, ROWS)
    assert 0 < history[0]["tokens"] <= (labelled["labels"] >= 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["language_modeling", "cell_naming"])
def test_frozen_parameters_keep_their_bytes_and_have_no_optimiser_state(objective):
    trainable = ("^vision/layers/mlp/",)
    before, after, _, state, _ = run_steps(trainable=trainable, objective=objective)
    trains = {path for path in before if path.startswith(("vision/layers/mlp/", "naming_head/"))}
    for path in before:
        same = before[path].tobytes() == after[path].tobytes()
        assert same == (path not in trains), path
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(before[path].size for path in trains)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["language_modeling", "cell_naming"])
def test_accumulation_is_one_large_batch(objective):
    _, whole, whole_history, _, _ = run_steps(objective=objective)
    _, parts, parts_history, _, _ = run_steps(objective=objective, accumulation=4)
    for a, b in zip(whole_history, parts_history, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for path in whole:
        np.testing.assert_allclose(whole[path], parts[path], atol=1e-6, err_msg=path)


def test_accumulation_weighs_by_tokens():
    """Micro-batches with unequal token counts: the sum of gradients over the total count, not a mean of means."""

    def loss_fn(params, batch, key):
        weights = batch["w"]
        loss = (weights * (params["p"]["kernel"] - batch["x"]) ** 2).sum()
        return LossSums(loss, weights.sum(), {})

    optimizer = make_optimizer(OptimizerConfig(clip_norm=None), {"p/kernel": 1.0})
    batch = {"x": jnp.array([1.0, 2.0, 3.0, 4.0]), "w": jnp.array([1.0, 0.0, 5.0, 2.0])}
    norms = []
    for accumulation in (1, 2, 4):
        state = init_state({"p/kernel": jnp.zeros(())}, optimizer, jnp.zeros((2,), jnp.uint32))
        _, metrics = train_step(
            state,
            {},
            batch,
            loss_fn=loss_fn,
            optimizer=optimizer,
            schedule=lambda s: jnp.float32(1),
            accumulation=accumulation,
        )
        norms.append(float(metrics["grad_norm"]))
    expected = abs(2 * (0.0 - np.average([1.0, 2.0, 3.0, 4.0], weights=[1.0, 0.0, 5.0, 2.0])))
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


MESHES = {
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=2, expert=2, context=2),
}

MUON = ("muon", MeshConfig(fsdp=4, tensor=2), "muon")


def compare_sharded() -> None:
    """Runs in a process with 8 devices: every mesh against one device, and Muon on one of them."""
    for name, mesh_config, optimizer in [*((n, m, "adamw") for n, m in MESHES.items()), MUON]:
        _, expected, expected_history, _, _ = run_steps(optimizer=optimizer)
        _, got, history, state, _ = run_steps(mesh_config=mesh_config, optimizer=optimizer)
        for a, b in zip(history, expected_history, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5), name
        worst = max(float(np.abs(got[path] - expected[path]).max()) for path in expected)
        assert worst <= 1e-5, f"{name}: parameters differ by {worst}"
        if mesh_config.fsdp > 1:
            kernel = state.trainable["language/layers/mlp/up_proj/kernel"]
            moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
            assert kernel.addressable_shards[0].data.size == kernel.size // (mesh_config.fsdp * mesh_config.tensor)
            assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)
        print(f"{name} ok {worst:.1e}")


@pytest.mark.slow
def test_sharded_step_equals_unsharded():
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_step"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") == len(MESHES) + 1


if __name__ == "__main__":
    compare_sharded()
