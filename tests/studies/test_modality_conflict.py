"""The study of modality conflict: what is equal, what of a run is measured, and going on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import quickstart
from experiments.studies.modality_conflict import __main__ as study
from experiments.studies.modality_conflict.curricula import (
    JOINT,
    PARTS,
    STAGED,
    joint_config,
    joint_sources,
    milestones,
    shared_config,
    staged_config,
)
from vita_jax import config as config_lib
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.parallel.rules import unbox
from vita_jax.training.checkpoint import (
    CONFIG,
    StageCheckpoints,
    checkpoint_folder,
    complete_steps,
    load_params,
    snapshot_meta,
)
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder, validate
from vita_jax.training.families import make_model
from vita_jax.training.objectives import init_model
from vita_jax.training.stages import Stage, flatten

# What a made-up run says that its stages read: 100 records in all, 10 of them bad.
READ = dict(zip(STAGED, (10, 20, 30, 20, 20), strict=True))
# In the first parameter of the speech encoder, which no arm trains: of ten questions so many will be right.
MARKS = {**dict.fromkeys(PARTS.values(), 7), **dict(zip(STAGED, (1, 2, 3, 4, 5), strict=True))}


# ---- the arms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["smoke", "small"])
def test_the_staged_arm_is_the_quickstarts_curriculum(size, tmp_path):
    base, curriculum = shared_config(size, 0.25, str(tmp_path)), quickstart.get_config(size)
    assert [stage.name for stage in base.stages] == list(PARTS.values())
    assert base.stage("speech_encoder").start_from == "language"
    validate(base, num_devices=1)
    staged = staged_config(base, curriculum, str(tmp_path), 0.25, str(tmp_path))
    validate(staged, num_devices=1)
    for stage, before in zip(staged.stages, (str(tmp_path), *STAGED), strict=False):
        theirs = curriculum.stage(stage.name)
        assert stage.start_from == before and stage.steps == max(1, round(theirs.steps / 4))
        assert dataclasses.replace(stage, steps=theirs.steps, start_from=theirs.start_from) == theirs
    if size == "small":
        assert milestones(staged.stages) == [75, 175, 525, 1375, 1850]
        assert (base.data.amount("text"), base.data.amount("speech_asr")) == (8000, 4000)
        assert (base.data.amount("typed"), base.data.amount("speech_question_clips")) == (504, 1200)


def test_sources_have_their_share_of_all_records():
    stages = quickstart.get_config("small").stages
    stages = [stage for stage in stages if stage.name in STAGED]
    sources = {source.path: source for source in joint_sources(stages, READ)}
    # By hand, of 100 records: all of 1.1, 70 % of 1.2, 6 % of 1.3 and 4 % of 2.2; 30, 16 and 11 %; 78 and 32 %; all of
    # 2.1b and 11 %.
    by_hand = {
        "captions": 10 + 0.7 * 20 + 0.06 * 30 + 0.04 * 20,
        "text": 0.3 * 20 + 0.16 * 30 + 0.11 * 20,
        "questions": 0.78 * 30 + 0.32 * 20,
        "asr": 20 + 0.11 * 20,
        "spoken": 0.32 * 20,
        "negatives": 0.1 * 20,
    }
    assert {path: source.weight for path, source in sources.items()} == pytest.approx(
        {path: records / 100 for path, records in by_hand.items()}
    )
    assert sources["captions"].ratio == 1.0 and sources["spoken"].split_rounds and not sources["asr"].split_rounds


# ---- a run ----------------------------------------------------------------------------------------------------------


def save_stage(config: ExperimentConfig, stage: Stage, params: dict) -> None:
    """The last checkpoint of a stage that was never trained."""
    counts = {"seen": READ.get(stage.name, 0) + 2, "bad": 2}
    state = {"lanes": {"0": {"parent": {"parent": {"taken": 1}, "counts": counts}}}}
    meta = snapshot_meta(config, stage, stage.steps, [0, 0], state, 3.0)
    marked = {**params, "audio": jax.tree.map(lambda leaf: leaf, params["audio"])}
    marked["audio"]["encoder"] = jax.tree.map(
        lambda leaf: np.full_like(leaf, MARKS[stage.name]), params["audio"]["encoder"]
    )
    with StageCheckpoints(checkpoint_folder(config.run_dir, stage.name), keep=1) as checkpoints:
        checkpoints.save(stage.steps, marked, None, meta)


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory) -> Path:
    """What a finished run of the smoke size leaves, but for its training."""
    folder, curriculum = tmp_path_factory.mktemp("run"), quickstart.get_config("smoke")
    config = shared_config("smoke", 1.0, str(folder))
    stages = (*config.stages, *(curriculum.stage(name) for name in STAGED))
    config = dataclasses.replace(config, run_dir=str(folder / "run"), stages=stages)
    quickstart.prepare(config)
    network = make_model(config.model)
    params = unbox(jax.jit(lambda key: init_model(network, key))(jax.random.key(0)))
    for stage in stages:
        save_stage(config, stage, jax.device_get(params))
    config_lib.save_json(config, folder / "run" / CONFIG)
    return folder / "run"


class Asked:
    """Stands for the evaluation: of ten questions the first are right, as many as the marked parameter says."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, config: ExperimentConfig, params: dict, tokenizer: Any, **how: Any) -> dict[str, Any]:
        assert tokenizer.vocab_size == load_tokenizer(tokenizer_folder(config)).vocab_size and how["limit"] == 2
        self.calls.append(how["benchmark"])
        right = int(np.ravel(next(iter(flatten(params["audio"]["encoder"]).values())))[0])
        group = {"accuracy": right / 10, "prior": 0.1, "n": 10, "title": "a group"}
        group["outcomes"] = {"count": {f"q{number}": number < right for number in range(10)}}
        return {"groups": {name: dict(group) for name in how["groups"]}}


@pytest.mark.slow
def test_stages_of_a_run_are_measured_and_one_arm_is_trained(quickstart_run, tmp_path, monkeypatch, capsys):
    asked = Asked()
    monkeypatch.setattr(study, "evaluate_params", asked)
    arguments = ["--run_dir", str(tmp_path / "study"), "--size", "smoke", "--run", str(quickstart_run)]
    before = sorted(path.name for path in quickstart_run.iterdir())
    assert study.main(arguments) == 0
    assert len(asked.calls) == 2 * (1 + 5 + 5) and sorted(path.name for path in quickstart_run.iterdir()) == before
    content = json.loads((tmp_path / "study" / "conflict.json").read_text(encoding="utf-8"))["arms"]
    found = {arm: [point["groups"]["text"]["accuracy"] for point in content[arm]["points"]] for arm in study.ARMS}
    # The run's own checkpoints; the other arm's speech encoder stays that of 2.1a.
    assert found == {"staged": [0.1, 0.2, 0.3, 0.4, 0.5], JOINT: [0.7] * 5} and content["start"]["text"]["n"] == 10
    assert [point["step"] for point in content[JOINT]["points"]] == [3, 6, 9, 12, 15]
    # Three steps of each stage, of 4 rows of 256; 3 seconds of each are made up.
    assert content["staged"]["costs"] == {"steps": 15, "positions": 15 * 4 * 256, "records": 100, "seconds": 15}
    costs = content[JOINT]["costs"]
    assert (costs["steps"], costs["positions"]) == (15, 15 * 4 * 256) and costs["records"] > 50
    joint = config_lib.load_json(ExperimentConfig, tmp_path / "study" / JOINT / CONFIG)
    checkpoints = checkpoint_folder(joint.run_dir, JOINT)
    assert complete_steps(checkpoints) == [3, 6, 9, 12, 15] == list(joint.checkpoint.milestones)
    start, end = (flatten(load_params(path).params) for path in (tmp_path / "study" / "start", checkpoints / "15"))
    moved = {path.split("/")[0] for path in start if not np.array_equal(start[path], end[path])}
    assert {path.split("/")[0] for path in start} == set(PARTS) == moved
    assert all(np.array_equal(start[path], end[path]) for path in start if path.startswith("audio/encoder/"))

    page = (tmp_path / "study" / "conflict.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 1 + 10 + 1) + (2 + 5) + (2 + 2) + (2 + 2)
    assert [row[2] for row in rows[3:13]] == ["staged", "all at once"] * 5
    assert rows[3][3].startswith("10.0 % (") and rows[4][3].startswith("70.0 % (")
    assert rows[16][2].startswith("+60.0 (") and rows[20][2].startswith("+20.0 (")
    assert rows[23][2].startswith("+20.0 (") and rows[24][2] == "+0.0 (+0.0 to +0.0)"
    assert (tmp_path / "study" / "conflict.png").read_bytes().startswith(b"\x89PNG")

    # Once more: nothing is trained or asked, and the page is the same.
    metrics = (tmp_path / "study" / JOINT / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert study.main(arguments) == 0
    assert "already finished" in capsys.readouterr().out and len(asked.calls) == 22
    assert (tmp_path / "study" / JOINT / "metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "study" / "conflict.md").read_text(encoding="utf-8").splitlines()[:30] == page.splitlines()[:30]
    assert study.main([*arguments, "--rate", "0.1"]) == 2
    assert "holds another study (--rate None there, 0.1 now)" in capsys.readouterr().err


@pytest.mark.slow
def test_rates_and_rows_of_the_arm_at_once(quickstart_run, tmp_path):
    run = config_lib.load_json(ExperimentConfig, quickstart_run / CONFIG)
    joint = joint_config(run, str(quickstart_run), None, str(tmp_path))
    validate(joint, num_devices=1)
    (stage,) = joint.stages
    assert stage.learning_rate == pytest.approx((2e-3 + 7e-4 + 1.5e-3 + 1.5e-3 + 5e-4) / 5)
    assert stage.trainable == ("^projector/", "^vision/", "^language/", "^audio/adapter/", "^state_head/")
    assert (stage.steps, stage.batch_size, stage.row_length, stage.row_tiles, stage.row_clips) == (15, 4, 256, 12, 4)
    assert stage.state_labels and stage.optimizer == "adamw" and stage.start_from == str(quickstart_run)
    assert joint_config(run, str(quickstart_run), 3e-4, str(tmp_path)).stages[0].learning_rate == 3e-4


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    for arguments, message in (
        (["--share", "0"], "--share 0.0 must be above 0 and at most 1"),
        (["--rate", "-1"], "--rate -1.0 must be above 0"),
        (["--per_kind", "0"], "--per_kind 0 must be at least 1"),
        (["--run", str(tmp_path), "--run_dir", str(tmp_path / "study")], "is no run: it has no config.json"),
    ):
        assert study.main(arguments) == 2
        assert message in capsys.readouterr().err
