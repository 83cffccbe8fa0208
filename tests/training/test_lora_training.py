"""Stages that train adapters: what trains and what does not, going on, merging, and the way to peft and back."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.training.everything import everything_config, random_params
from tests.training.records import prepare_records, records_experiment
from tests.training.test_loop import Killed, assert_same_run, interrupted, read_arrays, run
from tests.training.tiny import Batches, experiment, make_batch, model_config, stage
from vita_jax import convert
from vita_jax.config import apply_overrides
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.exchange.exporting import open_checkpoint
from vita_jax.inference.session import Session
from vita_jax.models import lora
from vita_jax.models.lora import LoraConfig
from vita_jax.models.vita import Vita, VitaConfig
from vita_jax.models.vita_weights import weight_table
from vita_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_config, load_params
from vita_jax.training.experiment import ExperimentConfig, build_model
from vita_jax.training.flops import stage_flops
from vita_jax.training.loop import describe
from vita_jax.training.metrics import read_metrics
from vita_jax.training.objectives import OBJECTIVES, model_inputs
from vita_jax.training.plan import initial_params, plan_stage
from vita_jax.training.stages import flatten, trained_so_far, unflatten

KINDS = ("dense", "experts")
STAGES = ("base", "tuned", "more", "after")
LORA = LoraConfig(rank=2, alpha=4.0)


def model_of(kind: str) -> VitaConfig:
    config = model_config()
    if kind == "dense":
        return config
    return dataclasses.replace(config, language=dataclasses.replace(config.language, num_experts=4, qkv_bias=False))


def adapted_experiment(run_dir: Path | str, kind: str = "dense", **fields) -> ExperimentConfig:
    """Weights, adapters on them, the same adapters for longer, and at last the projector on the merged model."""
    tuned = stage("tuned", trainable=("^projector/",), lora=LORA, start_from="base", learning_rate=3e-2)
    stages = (
        stage("base", steps=4),
        tuned,
        dataclasses.replace(tuned, name="more", title="stage more", trainable=(), steps=2, start_from="tuned"),
        stage("after", trainable=("^projector/",), steps=2, start_from="more"),
    )
    return experiment(run_dir, **{"model": model_of(kind), "stages": stages, **fields})


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    """A run with the kind of its model, and what it printed."""
    run_dir = tmp_path_factory.mktemp(request.param)
    return request.param, run_dir, run(adapted_experiment(run_dir, request.param), after_stage=lambda s, params: None)


def params_of(run_dir: Path, name: str) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(load_params(checkpoint_folder(run_dir, name)).params))


def differing(before: dict, after: dict) -> set[str]:
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


def test_only_adapters_and_what_the_patterns_name_change(finished):
    kind, run_dir, _ = finished
    base, tuned, more = (params_of(run_dir, name) for name in STAGES[:3])
    assert differing(base, tuned) == {path for path in base if path.startswith("projector/")}
    adapters = {path for path in tuned if lora.is_adapter(path)}
    assert set(tuned) - set(base) == adapters and len(adapters) == 7 * 3
    assert not any("router" in path for path in adapters)
    assert differing(tuned, more) == {path for path in adapters if not path.endswith("lora_scale")}
    for path in adapters:
        assert tuned[path].any() and (not path.endswith("lora_scale") or (tuned[path] == 2.0).all())
    if kind == "experts":
        down = tuned["language/layers/moe/down_proj/lora_b"]
        assert down.shape == (2, 4, 2, 16) and np.abs(down).max(axis=(0, 2, 3)).all(), "every expert has its own"


def test_the_optimiser_keeps_moments_of_adapters_only(finished):
    _, run_dir, _ = finished
    folder = checkpoint_folder(run_dir, "more")
    arrays = read_arrays(folder / str(complete_steps(folder)[-1]))
    moments = {path: leaf for path, leaf in arrays.items() if path.startswith("optimizer") and leaf.ndim}
    adapters = {path: leaf for path, leaf in params_of(run_dir, "more").items() if path.endswith(("lora_a", "lora_b"))}
    assert sum(leaf.size for leaf in moments.values()) == 2 * sum(leaf.size for leaf in adapters.values())


def test_what_is_printed(finished):
    kind, run_dir, printed = finished
    assert "stage more: goes on with the adapters of tuned\n" in printed
    assert "stage after: the adapters of more are merged into 7 kernels\n" in printed
    config = adapted_experiment(run_dir, kind)
    planned = plan_stage(config, build_model(config), config.stages[2], make_mesh(MeshConfig()))
    number = sum(leaf.size for path, leaf in planned.shapes.items() if path.endswith(("lora_a", "lora_b")))
    (line,) = [line for line in describe(config, [planned]).splitlines() if " language " in line]
    assert f"{number:,}" in line.split()


@pytest.mark.parametrize(("stage_name", "at"), [("tuned", 1), ("tuned", 5), ("more", 1), ("after", 1)])
def test_killed_and_started_again_is_the_uninterrupted_run(finished, tmp_path, stage_name, at):
    def die():
        raise Killed

    kind, run_dir, _ = finished
    if kind == "experts" and stage_name != "tuned":
        return  # what is merged and gone on with has the same code
    config = adapted_experiment(tmp_path, kind)
    with pytest.raises(Killed):
        run(config, interrupted(stage_name, at, die))
    printed = run(config)
    assert at < 2 or f"going on from step {at - at % 2}" in printed
    assert_same_run(tmp_path, run_dir, STAGES)


def test_the_merged_model_says_the_same(finished):
    kind, run_dir, _ = finished
    model, params = Vita(model_of(kind)), load_params(checkpoint_folder(run_dir, "tuned")).params

    @jax.jit
    def logits(params):
        hidden = model.apply({"params": params}, model_inputs(make_batch(7)))
        return model.apply({"params": params}, hidden, method="logits")

    base, adapters = lora.detach(params)
    adapted = logits(params)
    np.testing.assert_allclose(logits(lora.merge(base, adapters)), adapted, atol=1e-5)
    assert float(np.abs(logits(base) - adapted).max()) > 1e-2


def test_a_stage_without_adapters_starts_from_the_merged_weights(finished):
    _, run_dir, _ = finished
    base, adapters = lora.detach(unflatten(params_of(run_dir, "more")))
    after, merged = params_of(run_dir, "after"), flatten(jax.device_get(lora.merge(base, adapters)))
    assert differing(merged, after) == {path for path in after if path.startswith("projector/")}
    opened = flatten(open_checkpoint(checkpoint_folder(run_dir, "more")).params)
    assert not differing(merged, {path: np.asarray(leaf) for path, leaf in opened.items()})
    assert len(differing(flatten(base), merged)) == 7


def test_to_peft_and_back(finished, tmp_path):
    kind, run_dir, _ = finished
    tuned, base = (str(checkpoint_folder(run_dir, name)) for name in ("tuned", "base"))
    assert convert.main(["export", "--layout", "peft", "--from", tuned, "--to", str(tmp_path / "peft")]) == 0
    arguments = ["import", "--model", "lora", "--base", base, "--from", str(tmp_path / "peft")]
    assert convert.main([*arguments, "--keep-adapters", "--to", str(tmp_path / "kept")]) == 0
    adapters, kept = params_of(run_dir, "tuned"), flatten(load_params(tmp_path / "kept").params)
    assert all(np.asarray(kept[path]).tobytes() == adapters[path].tobytes() for path in kept if lora.is_adapter(path))
    # Training goes on with what came from peft.
    own = stage("own", trainable=(), lora=LORA, start_from=str(tmp_path / "kept"))
    config = experiment(tmp_path / "run", model=model_of(kind), stages=(own,))
    model, lines = build_model(config), []
    first = initial_params(config, model, plan_stage(config, model, own, make_mesh(MeshConfig())), lines.append)
    assert first.keys() == kept.keys() and lines == [f"stage own: goes on with the adapters of {tmp_path / 'kept'}\n"]
    with pytest.raises(UserError, match="rank 3 and scale .* for 7 layers, but .* rank 2 and scale 2 for 7 layers"):
        other = dataclasses.replace(own, lora=LoraConfig(rank=3))
        config = dataclasses.replace(config, stages=(other,))
        initial_params(config, model, plan_stage(config, model, other, make_mesh(MeshConfig())))


def test_the_loss_falls(tmp_path):
    class Same(Batches):
        def __next__(self):
            return make_batch(3, self.rows, self.length, self.tiles)

    config = adapted_experiment(tmp_path)
    tuned = dataclasses.replace(config.stages[1], trainable=(), steps=20)
    config = dataclasses.replace(config, stages=(config.stages[0], tuned))
    run(config, lambda config, own: Same(0, own.batch_size, own.row_length, own.row_tiles))
    records = [r for r in read_metrics(tmp_path) if r["stage"] == "tuned" and r["event"] == "step"]
    losses = [record["loss"] for record in records]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_several_starts_give_merged_weights(tmp_path):
    stages = (
        stage("text", trainable=(), lora=LORA, steps=3),
        stage("tower", objective="cell_naming", trainable=("^vision/",), steps=1),
        stage("both", trainable=("^projector/",), steps=1, start_from=("text", "tower")),
    )
    run(experiment(tmp_path, stages=stages, model=model_config()))
    text, tower, both = (params_of(tmp_path, s.name) for s in stages)
    merged = flatten(jax.device_get(lora.merge(*lora.detach(unflatten(text)))))
    kernels = {path for path in merged if differing({path: merged[path]}, {path: text[path]})}
    assert len(kernels) == 7 and kernels <= trained_so_far(stages[0], stages, list(both))
    assert not differing({path: both[path] for path in kernels}, merged)
    assert not differing({path: both[path] for path in both if path.startswith("vision/")}, tower)


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------


def planned(kind: str = "dense", mesh=None, **fields):
    own = stage("own", **{"trainable": (), "lora": LORA, **fields})
    config = experiment("unused", model=model_of(kind), stages=(own,))
    return plan_stage(config, build_model(config), own, mesh or make_mesh(MeshConfig()))


def test_adapters_lie_as_their_kernels_do():
    sizes = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2, "context": 1}
    mesh = AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES)
    specs = {path: sharding.spec for path, sharding in planned("experts", mesh).shardings.items()}
    attention, experts = "language/layers/attention", "language/layers/moe"
    assert specs[f"{attention}/q_proj/lora_a"] == PartitionSpec(None, "fsdp", None)
    assert specs[f"{attention}/q_proj/lora_b"] == PartitionSpec(None, None, "tensor", None)
    assert specs[f"{attention}/o_proj/lora_a"] == PartitionSpec(None, "tensor", None, None)
    assert specs[f"{experts}/gate_proj/lora_a"] == PartitionSpec(None, "expert", "fsdp", None)
    assert specs[f"{experts}/gate_proj/lora_b"] == PartitionSpec(None, "expert", None, "tensor")
    assert specs[f"{experts}/down_proj/lora_scale"] == PartitionSpec(None, "expert")


def test_fresh_adapters_are_those_of_peft():
    own = planned()
    config = experiment("unused", model=model_of("dense"), stages=(own.stage,))
    first = initial_params(config, build_model(config), own)
    again = initial_params(config, build_model(config), own)
    for path, leaf in first.items():
        if path.endswith("lora_a"):
            bound = first[path.replace("lora_a", "kernel")][0].size / first[path.replace("lora_a", "lora_b")][0, 0].size
            assert bound**-0.5 * 0.7 < np.abs(leaf).max() <= bound**-0.5
        if path.endswith("lora_b"):
            assert not np.any(leaf)
    assert not differing(*(jax.device_get(tree) for tree in (first, again)))


def test_router_only_if_it_is_asked_for():
    assert not any("router" in path for path in planned("experts").trainable)
    asked = planned("experts", lora=dataclasses.replace(LORA, targets=(lora.LANGUAGE_MODEL, lora.ROUTER)))
    assert {"language/layers/moe/router/lora_a", "language/layers/moe/router/lora_b"} <= set(asked.trainable)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ("^language/",)}, "'^language/' trains language/layers/.*/kernel, which has an adapter"),
        (
            {"trainable": ("^projector/", ".")},
            r"leave the pattern out, as in --config.stages.own.trainable=\^projector/",
        ),
        ({"lora": LoraConfig(targets=("^speech/",))}, r"'\^speech/' matches no linear layer"),
        ({"lora": LoraConfig(targets=("lm_head",))}, "no adapter of language/lm_head is trained"),
        ({"objective": "cell_naming"}, "adapters are for stages of the language model"),
        ({"optimizer": "muon"}, "trains no matrix of the model"),
        ({"lora": None}, "trains nothing"),
        ({"trainable": ("^lanugage/",)}, "matches no parameter"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(UserError, match=message.replace("'^lang", r"'\^lang")):
        planned(**fields)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ({"rank": "0"}, UserError, "rank 0 must be at least 1"),
        ({"alpha": "0"}, UserError, "alpha 0 must be above 0"),
        ({"dropout": "0.05"}, UnsupportedOption, "dropout 0.05 is not offered"),
        ({"ranks": "8"}, UserError, r"--config.stages.joint.lora.rank \(int\)"),
    ],
)
def test_bad_overrides(override, error, message):
    changes = {f"stages.joint.lora.{name}": value for name, value in override.items()}
    with pytest.raises(error, match=message):
        apply_overrides(experiment("unused"), changes)


def test_one_override_is_enough():
    config = apply_overrides(experiment("unused"), {"stages.joint.lora.rank": "8"})
    assert [own.lora for own in config.stages] == [None, LoraConfig(rank=8)]


@pytest.mark.parametrize(("kind", "active"), [("dense", 1.0), ("experts", 0.5)])
def test_flops_are_those_of_a_frozen_kernel_and_two_trained_ones(kind, active):
    """Tiny: 64 tokens; width 16, 4 query and 2 key heads of 4, 24 in the feed-forward, 2 layers, rank 2."""
    plan = planned(kind, row_tiles=0)
    config = experiment("unused", model=model_of(kind), stages=(plan.stage,))
    parts = stage_flops(config, plan.stage).parts
    attention, feed_forward = 16 * (16 + 8 + 8 + 16), 3 * 16 * 24
    adapters, feed_forward_adapters = 2 * (32 + 24 + 24 + 32), 2 * 3 * (16 + 24)
    got = parts["language"] + parts.get("language experts", 0.0)
    experts, router = (4, 16 * 4) if kind == "experts" else (1, 0)
    frozen = 2 * (attention + router) + 2 * feed_forward * experts * active
    trained = 3 * adapters + 3 * feed_forward_adapters * experts * active
    assert got == 2 * 64 * 2 * (frozen + trained)


def test_every_layer_that_may_have_an_adapter_uses_it():
    """The gradient of a fresh B is zero only where nothing reads it."""
    config = everything_config()
    params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
    targets = ("^language/layers/", "^vision/", "^projector/", "^audio/", "^state_head/")
    adapters = lora.init_adapters(weight_table(config), LoraConfig(rank=2, targets=targets), jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = make_batch(0)
    audio = rng.normal(size=(4, 1, 40, 80)).astype(np.float32)
    index = batch["feature_index"].copy()
    index[:, 5] = 3 + config.audio.num_tokens(40)  # the last token of the clip, behind the tile's four
    batch |= {"audio": audio, "audio_lengths": np.full((4, 1), 40, np.int32), "feature_index": index}
    batch["state_labels"] = np.where(np.arange(16) == 5, -101, -100).astype(np.int32) * np.ones((4, 1), np.int32)
    loss, model = OBJECTIVES["language_modeling"].loss, Vita(config)

    @jax.jit
    def gradient(adapters):
        return jax.grad(lambda tree: loss(model, lora.attach(params, tree), batch, jax.random.key(1)).loss)(adapters)

    grads = {path: np.abs(leaf).max() for path, leaf in flatten(gradient(adapters)).items() if path.endswith("lora_b")}
    assert len(grads) > 20
    assert [path for path, largest in grads.items() if not largest > 0] == []


# ---------------------------------------------------------------------------------------------------------------------
# Many devices; use
# ---------------------------------------------------------------------------------------------------------------------


SHARDED = {"dense": MeshConfig(fsdp=4, tensor=2), "experts": MeshConfig(fsdp=2, expert=2, tensor=2)}


def train_both_kinds(folder: Path) -> None:
    """Runs in a process of its own, on one device or on eight."""
    for kind, mesh in SHARDED.items():
        optimizer = dataclasses.replace(experiment("unused").optimizer, epsilon=1e-3)
        sizes = mesh if jax.device_count() == 8 else MeshConfig()
        run(adapted_experiment(folder / kind, kind, optimizer=optimizer, mesh=sizes))


@pytest.mark.slow
def test_many_devices_are_one(tmp_path):
    """A run on eight is that on one, restored and merged where it lies."""
    for name, devices in (("one", 1), ("many", 8)):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-m", "tests.training.test_lora_training", str(tmp_path / name)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for kind in SHARDED:
        for own in STAGES:
            one, many = (params_of(tmp_path / name / kind, own) for name in ("one", "many"))
            worst = max(float(np.abs(one[path] - many[path]).max()) for path in one)
            assert one.keys() == many.keys() and worst <= 2e-5, f"{kind} {own}: parameters differ by {worst}"


@pytest.mark.slow
def test_a_checkpoint_with_adapters_answers_as_the_merged_one(tmp_path):
    config = records_experiment(tmp_path / "run")
    joint = dataclasses.replace(config.stage("joint"), trainable=("^projector/",), lora=LORA, learning_rate=0.1)
    config = dataclasses.replace(config, stages=(config.stages[0], joint))
    prepare_records(config)
    loop.run(config, stream=io.StringIO())
    kept = tmp_path / "kept"
    assert convert.main(["export", "--layout", "vita_jax", "--from", config.run_dir, "--to", str(kept)]) == 0
    assert load_config(kept)[0].stage("joint").lora == LORA and load_config(config.run_dir)[1] == tmp_path / "run"
    adapted, merged = (Session.load(path) for path in (config.run_dir, kept))
    assert any(lora.is_adapter(path) for path in flatten(adapted.params))
    assert not any(lora.is_adapter(path) for path in flatten(merged.params))
    answers = ["".join(session.ask("colour?", [], [])) for session in (adapted, merged)]
    assert answers[0] == answers[1]
    tokens = np.arange(8, dtype=np.int32)[None]
    logits = [
        session.model.decoder.apply({"params": session.params["language"]}, *text(session, tokens))
        for session in (adapted, merged)
    ]
    np.testing.assert_allclose(logits[0][0], logits[1][0], atol=1e-5)


def text(session: Session, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    embedding = np.asarray(session.params["language"]["embed_tokens"]["embedding"])
    return embedding[tokens], np.arange(tokens.shape[1])[None], np.ones_like(tokens)


if __name__ == "__main__":
    train_both_kinds(Path(sys.argv[1]))
