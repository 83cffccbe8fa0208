"""The small LLaVA of the quickstart: what its tower is taught, its stages, and a run of a few steps by the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.quickstart.build import cell_record
from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.scenes import INKS, PAPERS, SHEETS, Scene, draw_sheet, sample_scene
from experiments.llava.quickstart import GRID, PATCH, SIDE, get_config, patch_names
from tests.test_smoke import command
from vita_jax.data.examples import NAME_SEPARATOR, NO_NAME
from vita_jax.data.images import image_tiles
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.training import loop
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import tokenizer_folder, validate
from vita_jax.training.families import family_of

FILE = "experiments/llava/quickstart.py"
STAGES = ("language", "tower", "alignment", "tuning")


@pytest.mark.parametrize("size", ["smoke", "small"])
def test_stages(size):
    config = get_config(size)
    validate(config, num_devices=1)
    assert tuple(stage.name for stage in config.stages) == STAGES
    assert family_of(config.model).layout(config.model).tokens_per_tile == GRID**2 == 36
    alignment, tuning = config.stages[2:]
    assert alignment.trainable == ("^projector/",) and tuning.trainable == ("^projector/", "^language/")
    # The tower is trained before LLaVA's two stages and stays as it is.
    assert [stage.name for stage in config.stages if "^vision/" in stage.trainable] == ["tower"]


def names_of(scene: Scene, cell_pixels: int = 16) -> list[str]:
    answer = cell_record(0, scene, "")["conversations"][1]["value"]
    return patch_names(answer.split(NAME_SEPARATOR), scene.columns * cell_pixels, scene.rows * cell_pixels)


def test_patches_of_the_five_sheets():
    """By hand: a digit in the last cell of each."""
    full, blank = "7 black white", "□ white"
    for (columns, rows), count in zip(SHEETS, (9, 1, 1, 1, 1), strict=True):
        scene = Scene(columns, rows, (7,), (columns * rows - 1,), ink=0, paper=0)
        names = np.array(names_of(scene)).reshape(GRID, GRID)
        assert (names == full).sum() == count
        assert set(names.ravel()) == {full, blank} | ({NO_NAME} if columns * rows > 4 else set())
    wide = np.array(names_of(Scene(6, 2, (7,), (11,), 0, 0))).reshape(GRID, GRID)
    assert wide[3, 5] == full and (wide[[0, 1, 4, 5]] == NO_NAME).all() and (wide[2] == blank).all()
    # Four cells a side: every third patch lies across two of them.
    middle = np.array(names_of(Scene(4, 2, (7,), (0,), 0, 0))).reshape(GRID, GRID)
    assert middle[2, 0] == full and (middle[:, [1, 4]] == NO_NAME).all() and (middle[[0, 1, 4, 5]] == NO_NAME).all()
    assert (middle[2, [2, 3, 5]] == blank).all() and (middle[3, [0, 2, 3, 5]] == blank).all()


def test_named_patches_show_their_paper_and_ink():
    """Pixels of a padded sheet, patch by patch: the paper's colour is there, a digit's ink where one is named."""
    config, scans = get_config("small"), load_scan_splits(0)["train"]
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = sample_scene(rng)
        pixels, _ = draw_sheet(scene, scans, rng, cell_pixels=int(rng.integers(16, 23)))
        answer = cell_record(0, scene, "")["conversations"][1]["value"].split(NAME_SEPARATOR)
        names = patch_names(answer, pixels.shape[1], pixels.shape[0])
        (tile,) = image_tiles(Image.fromarray(pixels), config.image)
        patches = tile.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(GRID**2, -1, 3)
        for patch, name in zip(patches.astype(int), names, strict=True):
            if name == NO_NAME:
                continue
            paper = np.abs(patch - PAPERS[scene.paper][2]).max(-1)
            assert (paper <= 24).sum() >= (100 if name[0] == "□" else 5), (scene, name)
            if name[0] != "□" and max(scene.columns, scene.rows) == GRID:  # the whole digit is in one patch
                assert (np.abs(patch - INKS[scene.ink][2]).max(-1) < paper).sum() > 5, (scene, name)
        assert tile.shape == (SIDE, SIDE, 3)


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
    assert "<img" in (run_dir / "report.html").read_text(encoding="utf-8")
    final = json.loads((run_dir / "evaluation" / "final.json").read_text(encoding="utf-8"))
    assert set(final["groups"]) == {"typed", "typed_unseen_writers", "text"}


@pytest.mark.slow
def test_the_tower_is_that_of_its_own_stage(run_dir):
    tower, final = (load_params(run_dir / "stages" / name / "checkpoints").params for name in ("tower", "tuning"))
    jax.tree.map(np.testing.assert_array_equal, tower["vision"], final["vision"])


@pytest.mark.slow
def test_every_answer_ends_with_the_marker(run_dir):
    config = dataclasses.replace(get_config("smoke"), run_dir=str(run_dir))
    tokenizer = load_tokenizer(tokenizer_folder(config))
    assert tokenizer.vocab_size <= config.tokenizer.vocab_size
    batches = loop.record_batches(config, config.stage("tuning"), tokenizer=tokenizer)
    batch = next(batches)
    batches.close()
    labels, tokens = np.ravel(batch["labels"]), np.ravel(batch["tokens"])
    end = tokenizer.special_tokens["</s>"]
    assert np.count_nonzero(labels == end) == np.count_nonzero(tokens == end) > 4
    assert tokenizer.decode(labels[labels >= 0].tolist()).endswith("</s>")


@pytest.mark.slow
def test_evaluate_and_chat(run_dir):
    assert "typed" in command("vita_jax.evaluate", "--checkpoint", run_dir, "--limit", "2").lower()
    picture = next((run_dir / "data/benchmarks/quickstart/media").glob("*.png"))
    command("vita_jax.chat", "--checkpoint", run_dir, "--image", picture, "--text", "How many digits are there?")
    output = command("vita_jax.chat", "--checkpoint", run_dir, "--audio", picture, status=2)
    assert "does not hear" in output and "Traceback" not in output
    output = command("vita_jax.chat", "--checkpoint", run_dir, "--text", "?", "--speak", run_dir / "a.wav", status=2)
    assert "does not speak" in output and "Traceback" not in output
