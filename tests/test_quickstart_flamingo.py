"""The small Flamingo of the quickstart and the runs at full size: configurations, and a run of a few steps by the
commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from experiments.flamingo.curriculum import full_model
from experiments.flamingo.quickstart import Ablation
from tests.test_smoke import command
from vita_jax.config import load_config_file
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import clip_frames, validate
from vita_jax.training.stages import flatten

FILE = "experiments/flamingo/quickstart.py"
STAGES = ("lists", "language", "tower", "seeing")
ABLATIONS = get_args(Ablation)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_changes_one_thing(ablation):
    plain = load_config_file(FILE, {})
    for size in ("smoke", "small"):
        config = load_config_file(FILE, {"size": size, "ablation": ablation})
        validate(config, num_devices=1)
        assert tuple(stage.name for stage in config.stages) == STAGES
    model = config.model
    assert (model.resampler.kind, model.cross_attention.gated, model.cross_attention_every) == {
        "no_gate": ("perceiver", False, 1),
        "every_2": ("perceiver", True, 2),
        "every_4": ("perceiver", True, 4),
        "transformer": ("transformer", True, 1),
        "mlp": ("mlp", True, 1),
    }.get(ablation, ("perceiver", True, 1))
    assert ("^language/" in config.stages[-1].trainable) == (ablation == "unfrozen")
    assert (model == plain.model) == (ablation in ("none", "every_1", "unfrozen"))


def test_the_two_parts_are_trained_before_and_frozen():
    lists, language, tower, seeing = load_config_file(FILE, {}).stages
    assert lists.trainable == language.trainable and language.start_from == "lists"
    assert language.trainable == ("^language/",) and [data.kind for data in language.sets] == ["text"]
    assert "^vision/" in tower.trainable and seeing.start_from == ("language", "tower")
    assert {data.name: (data.kind, data.frames) for data in seeing.sets} == {
        "pages": ("documents", 1),
        "captions": ("pairs", 1),
        "clips": ("pairs", 8),
    }


@pytest.mark.parametrize("scale", ["3b", "4b", "9b"])
def test_full_size_runs_are_as_published(scale):
    """Rates, weights, lengths of open_flamingo's recipe."""
    for slice in ("v5e:4x8", "v6e:4x4", "v5p:2x2x2"):
        config = load_config_file("experiments/flamingo/pretrain.py", {"scale": scale, "slice": slice})
        validate(config, num_devices={"v5e:4x8": 32, "v6e:4x4": 16, "v5p:2x2x2": 8}[slice])
    (stage,) = config.stages
    pages, captions = stage.sets
    assert (pages.weight, captions.weight) == (1.0, 0.2)
    assert (pages.max_tokens, pages.max_images, captions.max_tokens) == (256, 6, 32)
    assert (pages.next_picture, pages.window, pages.drop_single, pages.flip) == (0.0, "start", 0.5, 0.5)
    assert (stage.learning_rate, stage.schedule, config.optimizer.weight_decay) == (1e-4, "constant", 0.1)
    assert round(stage.warmup_ratio * stage.steps) == 1875 and stage.trained_tokens == (32000, 32001)
    assert config.model.cross_attention_every == {"3b": 1, "4b": 2, "9b": 4}[scale]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_full_size_ablations(ablation):
    options = {"ablation": ablation, "video": "true", "next_picture": "0.5", "window": "random"}
    config = load_config_file("experiments/flamingo/pretrain.py", options)
    validate(config, num_devices=8)
    clips = config.stages[0].sets[2]
    assert (clips.weight, clips.frames, config.model.resampler.max_frames) == (0.03, 8, 8)
    assert config.stages[0].sets[0].next_picture == 0.5
    validate(load_config_file("experiments/flamingo/pretrain.py", {**options, "size": "smoke", "slice": "one"}), 1)


def test_fine_tuning_unfreezes_the_tower_on_larger_pictures():
    config = load_config_file("experiments/flamingo/finetune.py", {"start": "runs/x"})
    validate(config, num_devices=8)
    assert config.stages[0].trainable[0] == "^vision/" and "^language/" not in config.stages[0].trainable
    assert config.model.vision.image_size == config.image.image_size == 336
    assert config.stages[0].start_from == "runs/x" and config.tokenizer.folder == "runs/x/tokenizer"
    assert config.model == dataclasses.replace(full_model("9b"), vision=config.model.vision)


def test_fine_tuning_takes_up_what_the_start_was_trained_as():
    options = {"start": "runs/x", "ablation": "every_2", "video": "true", "frames": "8"}
    config = load_config_file("experiments/flamingo/finetune.py", options)
    validate(config, num_devices=8)
    trained = load_config_file("experiments/flamingo/pretrain.py", {"ablation": "every_2", "video": "true"})
    assert config.model == dataclasses.replace(trained.model, vision=config.model.vision)
    assert clip_frames(config) == config.stages[0].sets[0].frames == 8
    with pytest.raises(UserError, match="frames=8, but model.resampler.max_frames=0"):
        validate(load_config_file("experiments/flamingo/finetune.py", {**options, "video": "false"}), 8)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    command("vita_jax.train", f"--config={FILE}", "--config.size=smoke", f"--config.run_dir={folder}")
    return folder


@pytest.mark.slow
def test_smoke_run_leaves_everything(run_dir):
    assert all(any((run_dir / "stages" / stage / "checkpoints").iterdir()) for stage in STAGES)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    assert {line["stage"] for line in lines} == set(STAGES)
    assert all(np.isfinite(line["loss"]) for line in lines if line["event"] == "step")
    result = json.loads((run_dir / "evaluation" / "few_shot.json").read_text())["few_shot"]
    assert set(result) == {"typed", "video_order", "labelling", "labelling_ranked"}
    assert set(result["labelling"]["shots"]) == {"0", "4", "8"} and set(result["video_order"]["shots"]) == {"0"}
    lines = [json.loads(line) for line in (run_dir / "evaluation" / "few_shot.jsonl").open()]
    assert sum(line["shots"] == 8 for line in lines if line["task"] == "labelling") == 4


@pytest.mark.slow
def test_only_what_sees_and_two_embeddings_were_trained_last(run_dir):
    parts = {name: load_params(run_dir / "stages" / name / "checkpoints").params for name in STAGES}
    jax.tree.map(np.testing.assert_array_equal, parts["tower"]["vision"], parts["seeing"]["vision"])
    before, after = (flatten(parts[name]["language"]) for name in ("language", "seeing"))
    table = "embed_tokens/embedding"
    rows = np.flatnonzero((before[table] != after[table]).any(axis=1))
    special = load_tokenizer(run_dir / "tokenizer").special_tokens
    assert rows.tolist() == sorted(special[tag] for tag in (END_OF_CHUNK, IMAGE))
    for path in before:
        if path != table:
            np.testing.assert_array_equal(before[path], after[path], err_msg=path)


@pytest.mark.slow
def test_commands(run_dir, tmp_path):
    options = ("--shots", "0", "4", "--limit", "2", "--choice", "similar", "--output", tmp_path / "few.json")
    output = command("vita_jax.evaluate", "--checkpoint", run_dir, *options)
    assert "labelling_ranked" in output and "4 shots" in output
    assert {"few_shot", "limit", "version", "commit", "changed", "config"} == set(
        json.loads((tmp_path / "few.json").read_text())
    )
    output = command("vita_jax.evaluate", "--checkpoint", run_dir, "--benchmark", "speech", status=2)
    assert "--benchmark speech: a Flamingo is measured by its few-shot tasks" in output
    assert "is for a Flamingo" not in output
    picture = next((run_dir / "data/few_shot/media").glob("*.png"))
    clip = next((run_dir / "data/few_shot/media").glob("*.mp4"))
    command("vita_jax.chat", "--checkpoint", run_dir, "--image", picture, "--text", "How many digits are there?")
    command("vita_jax.chat", "--checkpoint", run_dir, "--video", clip, "--text", "In which order do the digits appear?")
    output = command(
        "vita_jax.chat", "--checkpoint", run_dir, "--image", picture, "--video", clip, "--text", "?", status=2
    )
    assert "pictures or clips, not both" in output and "Traceback" not in output
    shown = tmp_path / "batch.png"
    options = ("--config.size=smoke", f"--config.run_dir={run_dir}", "--stage=seeing", f"--picture={shown}")
    output = command("data_pipelines.show", f"--config={FILE}", *options)
    assert "pages, row 0" in output and "[1]<image>" in output and shown.is_file()
    tuned = tmp_path / "tuned"
    start = (f"--config.start={run_dir}", f"--config.data.folder={run_dir / 'data'}", f"--config.run_dir={tuned}")
    output = command("vita_jax.train", "--config=experiments/flamingo/finetune.py", "--config.size=smoke", *start)
    assert "positions of 4 patches" in output and "are resized to 9" in output
