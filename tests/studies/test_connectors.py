"""The study of connectors: equal parameters, equal conversations, a run of a few steps with its table, and going on."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.studies.arms import RESULT, Arm
from experiments.studies.connectors import __main__ as connectors
from experiments.studies.connectors.conversations import as_flamingo, flamingo_answers, one_position
from experiments.studies.connectors.models import (
    SET,
    SIZES,
    STAGE,
    TAG,
    arm_models,
    base_model,
    connector_parameters,
    gated_model,
    make_arms,
    shared_config,
)
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import answer_items
from vita_jax.evaluation.items import ITEMS, read_items, stratified
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.parallel.rules import unbox
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import example_context, tokenizer_folder, validate
from vita_jax.training.families import make_model
from vita_jax.training.objectives import OBJECTIVES, init_model, objective_of
from vita_jax.training.stages import flatten

SMOKE, SMALL = SIZES["smoke"], SIZES["small"]


def drawn(model, seed: int) -> dict:
    """Newly drawn parameters."""
    network = make_model(model)
    return unbox(jax.jit(lambda key: init_model(network, key))(jax.random.key(seed)))


# ---- what is compared -----------------------------------------------------------------------------------------------


def test_connectors_have_as_many_parameters_as_the_gated_one():
    models = arm_models(SMALL)
    assert tuple(models) == connectors.ARMS
    counts = {name: connector_parameters(model) for name, (_, model) in models.items()}
    # By hand: four blocks of 129,794, a resampler of 59,520, the embedding of the tag.
    assert counts["gated"] == 4 * 129_794 + 59_520 + 192
    assert counts.pop("linear") == 96 * 192 + 192
    for name, count in counts.items():
        assert abs(count / counts["gated"] - 1) < 0.02, name
    tokens = {name: model.tokens_per_tile for name, (_, model) in models.items() if name != "gated"}
    assert tokens == {"linear": 36, "two_matrices": 36, "mlp": 36, "perceiver": 36, "perceiver_few": 9}
    assert models["gated"][1].resampler.num_latents == 36


@pytest.mark.parametrize("language", ["frozen", "tuned"])
@pytest.mark.parametrize("size", ["smoke", "small"])
def test_arms_differ_in_nothing_but_the_connector(size, language, tmp_path):
    arms = make_arms(size, str(tmp_path), str(tmp_path), language)
    assert tuple(arm.name for arm in arms) == connectors.ARMS
    shared = shared_config(size, str(tmp_path))
    common = {
        "steps",
        "learning_rate",
        "batch_size",
        "row_tiles",
        "optimizer",
        "schedule",
        "warmup_ratio",
        "start_from",
    }
    for arm in arms:
        validate(arm.config, num_devices=1)
        (stage,) = arm.config.stages
        assert {field: getattr(stage, field) for field in common} == {
            field: getattr(arms[0].config.stages[0], field) for field in common
        }
        room = stage.row_length - (arm.config.model.tokens_per_tile if arm.name != "gated" else 1)
        assert room == SIZES[size].room
        for part in ("vision", "language"):
            assert getattr(arm.config.model, part) == getattr(shared.model, part)
        assert ("^language/" in stage.trainable) == (language == "tuned") and "^vision/" not in stage.trainable
        for field in ("seed", "optimizer", "image", "data", "tokenizer"):
            assert getattr(arm.config, field) == getattr(arms[0].config, field), field
    assert arms[-1].config.stages[0].trained_tokens == ((TAG,) if language == "frozen" else ())


# ---- a run ----------------------------------------------------------------------------------------------------------


def asked(run_dir: Path, *options: str) -> argparse.Namespace:
    return connectors.make_parser().parse_args(["--run_dir", str(run_dir), "--size", "smoke", *options])


def arms_of(run_dir: Path) -> dict[str, Arm]:
    start = run_dir / "shared" / "start"
    return {arm.name: arm for arm in make_arms("smoke", str(run_dir), str(start), "frozen")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("connectors")
    options = ["--run_dir", str(folder), "--size", "smoke", "--language", "frozen", "--only", "mlp", "gated"]
    assert connectors.main(options) == 0
    return folder


@pytest.mark.slow
def test_a_run_leaves_a_table_a_plot_and_the_figures(run_dir):
    page = (run_dir / "frozen.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == [
        "connector",
        "---",
        "MLP",
        "gated cross-attention",
        "(constant answers)",
    ]
    assert {len(row) for row in rows} == {15}
    assert [cell.strip() for cell in rows[2][2:4]] == ["36", "36"] and rows[2][5].strip() == "-"
    assert [cell.strip() for cell in rows[3][2:4]] == ["36", "1"] and " to " in rows[3][5]
    assert (run_dir / "frozen.png").read_bytes().startswith(b"\x89PNG") and "frozen.png" in page
    content = json.loads((run_dir / "frozen.json").read_text(encoding="utf-8"))
    assert content["settings"]["typed questions"] == 6 * SMOKE.per_kind
    for name, found in content["arms"].items():
        typed = found["groups"]["typed"]
        assert 0 <= typed["low"] <= typed["accuracy"] <= typed["high"] <= 1 and len(typed["by_kind"]) == 6
        assert [step for step, _ in found["losses"]] == [1, 2, 3] and found["step_seconds"] > 0
        assert np.isfinite(found["last_loss"]) and found["last_loss"] == found["losses"][-1][1], name
        assert "outcomes" not in typed


@pytest.mark.slow
def test_only_connectors_were_trained(run_dir):
    start = flatten(load_params(run_dir / "shared" / "start").params)
    assert {path.split("/")[0] for path in start} == {"vision", "language"}
    table = "language/embed_tokens/embedding"
    for arm, own in (("mlp", {"projector"}), ("gated", {"resampler", "cross_attention"})):
        after = flatten(load_params(checkpoint_folder(run_dir / "frozen" / arm, STAGE)).params)
        assert {path.split("/")[0] for path in set(after) - set(start)} == own
        for path in set(start) - {table}:
            np.testing.assert_array_equal(start[path], after[path], err_msg=path)
        rows = np.flatnonzero(np.any(np.asarray(start[table]) != np.asarray(after[table]), axis=1))
        assert rows.tolist() == ([TAG] if arm == "gated" else [])


@pytest.mark.slow
def test_finished_arms_are_neither_trained_nor_asked_again(run_dir, capsys, monkeypatch):
    arms = [run_dir / "frozen" / name for name in ("mlp", "gated")]
    before = [(arm / RESULT).read_bytes() for arm in arms]
    page = (run_dir / "frozen.md").read_text(encoding="utf-8")
    trained = []
    original = loop.run
    monkeypatch.setattr(loop, "run", lambda config, **more: (trained.append(config.name), original(config, **more)))
    capsys.readouterr()
    connectors.study(asked(run_dir, "--only", "gated"))
    assert trained == ["connectors"]  # whose stages are finished
    assert capsys.readouterr().out.count("already finished") == 2
    assert [(arm / RESULT).read_bytes() for arm in arms] == before
    lines = (run_dir / "frozen.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")] == [x for x in page.splitlines() if x.startswith("|")]
    with pytest.raises(UserError, match="another configuration .*steps: 3 there, 4 now"):
        connectors.study(asked(run_dir, "--steps", "4", "--only", "gated"))
    with pytest.raises(UserError, match="has 2 questions of each kind, and 1 are asked for"):
        connectors.study(asked(run_dir, "--per_kind", "1", "--only", "gated"))


# ---- what is equal --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_arm_reads_the_same_conversations(run_dir):
    arms, batches = arms_of(run_dir), {}
    for name in ("mlp", "perceiver_few", "gated"):
        config, (stage,) = arms[name].config, arms[name].config.stages
        tokenizer = load_tokenizer(tokenizer_folder(config))
        make = arms[name].make_batches or (lambda *args, tok=tokenizer: loop.record_batches(*args, tokenizer=tok))
        own = make(config, stage)
        batches[name] = [{key.rpartition("/")[2]: array for key, array in next(own).items()} for _ in range(2)]
        state = own.get_state()
        batches[name].append(next(own))
        own.set_state(state)
        for key, array in next(own).items():
            np.testing.assert_array_equal(array, batches[name][-1][key])
        own.close()
    for mlp, few, gated in zip(*(batches[name][:2] for name in batches), strict=True):
        for row in range(SMOKE.rows):
            texts = []
            for batch in (mlp, few, gated):
                features = batch.get("feature_index", np.where(batch["tokens"] == TAG, 0, -1))[row]
                kept = (batch["segment_ids"][row] == 1) & (features < 0)
                texts.append(np.stack([batch["tokens"][row][kept], batch["labels"][row][kept]]))
                assert batch["segment_ids"][row].max() == 1
                number = np.count_nonzero((features >= 0) & (batch["segment_ids"][row] > 0))
                assert number == (36 if batch is mlp else 9 if batch is few else 1)
            np.testing.assert_array_equal(texts[0], texts[1])
            np.testing.assert_array_equal(texts[0], texts[2])
            np.testing.assert_array_equal(mlp["tiles"][row], gated["images"][row][:, 0])
            used = gated["segment_ids"][row] > 0
            seen, place = gated["media_times"][row], np.argmax(gated["tokens"][row] == TAG)
            assert np.all(seen[:place] == 0) and np.all(seen[place:] == used[place:])


@pytest.mark.slow
def test_a_fresh_flamingo_is_a_llava_that_sees_the_tag(run_dir):
    """With closed gates it reads the tag and nothing of the picture; so does a LLaVA whose one visual token always is
    the embedding of the tag. Losses and answers of both are those of the same text.
    """
    shared = shared_config("smoke", str(run_dir))
    base = base_model(SMOKE)
    gated, written = gated_model(base, SMOKE), one_position(shared)
    assert isinstance(gated, FlamingoConfig) and written.model.tokens_per_tile == 1
    flamingo, llava = drawn(gated, 0), drawn(written.model, 1)
    llava = {**llava, "language": flamingo["language"], "vision": flamingo["vision"]}
    tag = flamingo["language"]["embed_tokens"]["embedding"][TAG]
    kernel = llava["projector"]["linear"]["kernel"]
    llava["projector"] = {"linear": {"kernel": np.zeros_like(kernel), "bias": tag}}
    (stage,), (seeing,) = (arms_of(run_dir)[name].config.stages for name in ("linear", "gated"))
    stage = dataclasses.replace(stage, row_length=SMOKE.room + 1)
    tokenizer, written = load_tokenizer(tokenizer_folder(shared)), dataclasses.replace(written, stages=(stage,))
    loader = loop.record_batches(written, stage, tokenizer=tokenizer)
    batch = next(loader)
    loader.close()
    key = jax.random.key(0)
    fields = {**as_flamingo(batch, TAG), "labels": batch["labels"]}
    same = {f"{SET}/{name}": array for name, array in fields.items()}
    ours, theirs = (
        jax.jit(functools.partial(objective.loss, make_model(model)))(params, inputs, key)
        for objective, model, params, inputs in (
            (OBJECTIVES["language_modeling"], written.model, llava, batch),
            (objective_of(seeing), gated, flamingo, same),
        )
    )
    np.testing.assert_allclose(float(ours.loss / ours.count), float(theirs.loss), rtol=1e-5)
    root, context = benchmark_folder(shared), example_context(written, tokenizer)
    items = [item for item in stratified(read_items(root / ITEMS), 1) if item.group in ("typed", "text")]
    limits = {"batch_size": 8, "max_new_tokens": 6}
    want = answer_items(make_model(written.model), llava, context, items, root, **limits)
    got = flamingo_answers(make_model(gated), flamingo, context, items, root, TAG, **limits)
    assert got == want and len(set(want)) > 1


def test_llava_and_flamingo_see_the_same_features():
    base = base_model(SMOKE)
    gated, params = gated_model(base, SMOKE), drawn(base, 0)
    side = base.vision.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    vision = {"params": {"vision": params["vision"]}}
    seen = [make_model(model).apply(vision, images, method="tower_features") for model in (base, gated)]
    assert seen[0].shape == (2, 36, SMOKE.tower_width)
    np.testing.assert_array_equal(*seen)


def test_bad_arguments_are_refused(capsys):
    for options, message in (
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--rate", "0"], "--rate 0.0 must be above 0"),
        (["--only", "qformer"], "invalid choice: 'qformer'"),
    ):
        assert connectors.run_command(connectors.run, connectors.make_parser(), options) == 2
        assert message in capsys.readouterr().err
