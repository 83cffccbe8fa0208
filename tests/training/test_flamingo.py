"""Flamingo's stages: what trains and what stays, bit for bit; mixtures, going on, larger pictures, and its figures."""

from __future__ import annotations

import dataclasses
import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.flamingo import (
    LOOKING,
    SIDE,
    data_sets,
    flamingo_config,
    flamingo_experiment,
    mixture_stage,
    prepare_documents,
)
from vita_jax import config as config_lib
from vita_jax.data.images import ImageConfig
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.inference.session import Session
from vita_jax.models.vision.clip import resize_positions
from vita_jax.parallel.mesh import make_mesh
from vita_jax.parallel.rules import unbox, use_mesh
from vita_jax.planning.batches import SHAPES
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import ExperimentConfig, build_model, tokenizer_folder, validate
from vita_jax.training.families import make_model
from vita_jax.training.flops import stage_flops
from vita_jax.training.metrics import read_metrics
from vita_jax.training.objectives import init_model, objective_of
from vita_jax.training.plan import learning_rate, plan_stage
from vita_jax.training.stages import flatten
from vita_jax.training.step import init_state, train_step


def run(config: ExperimentConfig) -> str:
    stream = io.StringIO()
    loop.run(config, stream=stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> ExperimentConfig:
    config = prepare_documents(flamingo_experiment(tmp_path_factory.mktemp("flamingo")))
    run(config)
    return config


def saved(config: ExperimentConfig, stage: str) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(load_params(checkpoint_folder(config.run_dir, stage)).params))


def test_the_language_model_stays_but_for_its_new_tokens(finished):
    before, after = saved(finished, "language"), saved(finished, "seeing")
    new = finished.stage("seeing").trained_tokens
    for path, leaf in after.items():
        if path == "language/embed_tokens/embedding":
            rows = np.flatnonzero((leaf != before[path]).any(axis=1))
            assert rows.tolist() == sorted(new)
        else:
            changed = not np.array_equal(leaf, before[path])
            assert changed == path.startswith(("resampler/", "cross_attention/")), path
    gates = after["cross_attention/attn_gate"]
    assert gates.shape == (2,) and np.all(gates != 0)
    losses = {"seeing": {"pages_loss", "pairs_loss", "clips_loss"}, "language": {"texts_loss"}}
    for stage, names in losses.items():
        steps = [line for line in read_metrics(finished.run_dir) if line["stage"] == stage and line["event"] == "step"]
        assert names <= set(steps[-1]) and all(np.isfinite(step["loss"]) for step in steps)


def test_the_loss_is_the_weighted_sum_of_means(finished):
    stage = finished.stage("seeing")
    batches = loop.record_batches(finished, stage, tokenizer=load_tokenizer(tokenizer_folder(finished)))
    batch = next(batches)
    batches.close()
    params = load_params(checkpoint_folder(finished.run_dir, "seeing")).params
    objective = objective_of(stage)
    sums = jax.jit(partial(objective.loss, build_model(finished)))(params, batch, None)
    means = {name: float(total / count) for name, (total, count) in sums.metrics.items() if name.endswith("_loss")}
    assert set(means) == {"pages_loss", "pairs_loss", "clips_loss"} and float(sums.count) == 1
    want = means["pages_loss"] + 0.2 * means["pairs_loss"] + 0.1 * means["clips_loss"]
    np.testing.assert_allclose(float(sums.loss), want, rtol=1e-6)
    labels = sum(int(np.sum(batch[f"{name}/labels"] != -100)) for name in ("pages", "pairs", "clips"))
    assert objective.num_tokens(batch) == labels
    assert objective_of(stage) is objective


def test_micro_batches_add_up(finished):
    """Two micro-batches of one row each give the mean of what either gives."""
    stage = finished.stage("seeing")
    batches = loop.record_batches(finished, stage, tokenizer=load_tokenizer(tokenizer_folder(finished)))
    batch = next(batches)
    batches.close()
    model = build_model(finished)
    with use_mesh(make_mesh(finished.mesh)) as _:
        plan = plan_stage(finished, model, stage, make_mesh(finished.mesh))
        params = flatten(load_params(checkpoint_folder(finished.run_dir, "language")).params)
        trainable, frozen = plan.split({path: jnp.asarray(leaf) for path, leaf in params.items()})
        state = init_state(trainable, plan.optimizer, jnp.asarray(plan.rng))
        step = partial(
            train_step,
            loss_fn=partial(plan.objective.loss, model),
            optimizer=plan.optimizer,
            schedule=lambda _: jnp.asarray(0.1),
        )
        _, both = jax.jit(partial(step, accumulation=2))(state, frozen, batch)
        halves = [
            jax.jit(step)(state, frozen, {name: array[i : i + 1] for name, array in batch.items()})[1]["loss"]
            for i in range(2)
        ]
    np.testing.assert_allclose(both["loss"], np.mean(halves), rtol=1e-5)


def test_a_run_goes_on_bit_for_bit(finished, tmp_path):
    """Stopped in the middle of the second stage and started again."""
    config = dataclasses.replace(finished, run_dir=str(tmp_path / "again"))
    config = dataclasses.replace(
        config, tokenizer=dataclasses.replace(config.tokenizer, folder=str(tokenizer_folder(finished)))
    )

    class Stop(Exception):
        pass

    def broken(config, stage):
        batches = loop.record_batches(config, stage, tokenizer=load_tokenizer(tokenizer_folder(config)))
        if stage.name != "seeing":
            return batches
        inner = type(batches).__next__

        class Breaking(type(batches)):
            taken = 0

            def __next__(self):
                Breaking.taken += 1
                if Breaking.taken > 5:
                    raise Stop
                return inner(self)

        batches.__class__ = Breaking
        return batches

    with pytest.raises(Stop):
        loop.run(config, make_batches=broken, stream=io.StringIO())
    assert "going on from step 4 of 6" in run(config)
    want, got = saved(finished, "seeing"), saved(config, "seeing")
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def test_larger_pictures_resize_the_towers_positions(finished, tmp_path):
    """A stage with the tower unfrozen, from a run with fewer patches."""
    model = dataclasses.replace(finished.model, vision=dataclasses.replace(finished.model.vision, image_size=2 * SIDE))
    stage = dataclasses.replace(
        finished.stage("seeing"), name="tuning", trainable=("^vision/", *LOOKING), start_from=finished.run_dir, steps=2
    )
    config = dataclasses.replace(
        finished,
        run_dir=str(tmp_path),
        model=model,
        image=ImageConfig.clip(2 * SIDE),
        stages=(stage,),
        tokenizer=dataclasses.replace(finished.tokenizer, folder=str(tokenizer_folder(finished))),
    )
    assert f"positions of 4 patches of {finished.run_dir} are resized to 16" in run(config)
    before, after = saved(finished, "seeing"), saved(config, "tuning")
    path = "vision/embeddings/position_embedding"
    assert before[path].shape == (5, 8) and after[path].shape == (17, 8)
    assert not np.array_equal(
        before["vision/encoder/layers/mlp/fc1/kernel"], after["vision/encoder/layers/mlp/fc1/kernel"]
    )


def test_resized_positions():
    """A grid that rises by its rows does so afterwards; the class token's is kept."""
    rows = jnp.repeat(jnp.arange(4.0), 4)[:, None]
    table = jnp.concatenate([jnp.full((1, 1), 9.0), rows])
    larger = resize_positions(table, 64)
    assert larger.shape == (65, 1) and larger[0, 0] == 9
    grid = np.asarray(larger[1:, 0]).reshape(8, 8)
    assert np.ptp(grid, axis=1).max() < 1e-6 and np.all(np.diff(grid[1:-1, 0]) > 0)
    np.testing.assert_array_equal(resize_positions(table, 16), table)
    with pytest.raises(UserError, match="12 patches are no square grid"):
        resize_positions(table, 12)


def test_rates_that_stay_behind_their_warm_up(finished):
    stage = dataclasses.replace(finished.stage("seeing"), schedule="constant", steps=100, warmup_ratio=0.1)
    rates = [float(learning_rate(stage, jnp.asarray(step), 2.0)) for step in (0, 5, 10, 99)]
    np.testing.assert_allclose(rates, [0.0, 1.0, 2.0, 2.0])


def test_decay_acts_on_gated_blocks_alone(finished):
    config = config_lib.apply_overrides(finished, {"optimizer.weight_decay": "0.5"})
    model = build_model(config)
    with use_mesh(make_mesh(config.mesh)):
        plan = plan_stage(config, model, config.stage("seeing"), make_mesh(config.mesh))
    params = {path: jnp.ones(plan.shapes[path].shape) for path in plan.trainable}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = plan.optimizer.update(zeros, plan.optimizer.init(params), params)
    for path, update in updates.items():
        np.testing.assert_allclose(update, 0.5 if path.startswith("cross_attention/") else 0.0, err_msg=path)


@pytest.mark.parametrize("kind", ["perceiver", "transformer", "mlp"])
def test_model_flops_are_those_of_all_products(kind):
    """Forward passes of a frozen model: 2 for each kernel's element and position, and attention."""
    config = flamingo_config(resampler=dataclasses.replace(flamingo_config().resampler, kind=kind))
    stage = mixture_stage("a", data_sets(), trainable=("^language/norm/",))
    model = make_model(config)
    shapes = jax.eval_shape(lambda key: init_model(model, key), jax.random.key(0))
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(unbox(shapes)).items() if path.endswith("kernel")}
    parts = stage_flops(ExperimentOf(config), stage).parts

    def of(start: str, positions: float, without: str = "!") -> float:
        return sum(
            2.0 * size * positions for path, size in sizes.items() if path.startswith(start) and without not in path
        )

    tokens = sum(data.batch_size * data.row_length for data in stage.sets)
    assert parts["language"] == of("language/layers/", tokens)
    # The norm before it trains, so the head passes a gradient on.
    assert parts["lm_head"] == 2 * of("language/lm_head/", tokens)
    media = sum(data.batch_size * data.row_images * 3 for data in stage.sets)
    scores = sum(4.0 * 2 * 8 * data.batch_size * data.row_length * data.row_images * 3 for data in stage.sets)
    blocks = of("cross_attention/", tokens, "kv_proj") + of("cross_attention/kv_proj/", media)
    np.testing.assert_allclose(parts["cross attention"], blocks + scores)
    pictures = sum(data.batch_size * data.row_images for data in stage.sets)
    frames = sum(data.batch_size * data.row_images * data.frames for data in stage.sets)
    inside = {"perceiver": 3 * pictures, "transformer": 3 * pictures + 4 * frames, "mlp": 4 * frames}[kind]
    want = of("resampler/layers/", inside, "kv_proj")
    want += of("resampler/layers/attention/kv_proj", 3 * pictures + 4 * frames)
    want += of("resampler/mix/", 8 * frames)
    np.testing.assert_allclose(parts["resampler"], want)


class ExperimentOf:
    """What `stage_flops` reads of an experiment."""

    def __init__(self, model) -> None:
        self.model = model


def test_batches_are_as_planned(finished):
    stage = finished.stage("seeing")
    batches = loop.record_batches(finished, stage, tokenizer=load_tokenizer(tokenizer_folder(finished)))
    batch = next(batches)
    batches.close()
    planned = SHAPES["flamingo"](finished, stage)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in planned.items()
    }
    assert set(objective_of(stage).batch_keys) == set(batch)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"stages.seeing.batch_size": "4"}, "batch_size=4, but its data sets make it 6"),
        ({"stages.seeing.row_length": "64"}, "row_length=64, but its data sets make it 48"),
        ({"stages.seeing.objective": "language_modeling"}, "no data `sets`, which are for 'flamingo'"),
        ({"stages.seeing.accumulation": "4"}, "stages.seeing.sets.pages.batch_size=2 must be a multiple of"),
        ({"data.lanes": "3"}, "sets.texts.batch_size=2 must be a multiple of data.lanes=3"),
        ({"stages.seeing.sets.pages.weight": "0"}, "data set 'pages': weight is 0.0"),
        ({"stages.seeing.sets.clips.name": "pages"}, "data set 'pages' is there 2 times"),
        ({"model.cross_attention_every": "3"}, "cross_attention_every 3 must be between 1 and the number of layers, 2"),
        ({"model.resampler.max_media": "3"}, "max_media=3: rows hold several documents"),
        ({"stages.seeing.sets.clips.frames": "4"}, "sets.clips.frames=4, but model.resampler.max_frames=3"),
        ({"model.resampler.kind": "conv"}, "kind 'conv' is unknown; use one of perceiver, transformer, mlp"),
    ],
)
def test_what_makes_no_sense_is_refused(finished, override, message):
    with pytest.raises(UserError, match=message):
        validate(config_lib.apply_overrides(finished, override))


def test_other_objectives_and_adapters_are_refused(finished):
    stage = finished.stage("seeing")
    wrong = dataclasses.replace(stage, objective="language_modeling", sets=(), sources=stage.sets[0].sources)
    with pytest.raises(UserError, match="Flamingo has no parts that this trains; use one of flamingo, cell_naming"):
        validate(dataclasses.replace(finished, stages=(wrong,)))
    adapted = config_lib.apply_overrides(finished, {"stages.seeing.lora.rank": "2"})
    with pytest.raises(UnsupportedOption, match="not for objective 'flamingo'"):
        plan_stage(adapted, build_model(adapted), adapted.stage("seeing"), make_mesh(adapted.mesh))


def test_servers_refuse_it(finished):
    with pytest.raises(UserError, match="is a Flamingo, which continues documents .* vita_jax.chat"):
        Session.load(finished.run_dir)
