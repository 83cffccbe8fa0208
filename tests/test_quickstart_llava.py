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
from vita_jax.data.examples import NAME_SEPARATOR
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
    """By hand: where the patches lie that say what the cells show."""
    rest, blank = "△ black white", "□ white"
    middles = {
        (2, 2): ((1, 4), (1, 4)),
        (4, 2): ((2, 3), (0, 2, 3, 5)),
        (2, 4): ((0, 2, 3, 5), (2, 3)),
        (6, 2): ((2, 3), (0, 1, 2, 3, 4, 5)),
        (2, 6): ((0, 1, 2, 3, 4, 5), (2, 3)),
    }
    assert set(middles) == set(SHEETS)
    for (columns, rows), (lines, places) in middles.items():
        digits = (7, 3)  # in the first cell and in the last one
        names = np.array(names_of(Scene(columns, rows, digits, (0, columns * rows - 1), ink=0, paper=0)))
        names = names.reshape(GRID, GRID)
        cells = names[np.ix_(lines, places)]
        assert cells[0, 0] == "7 black white" and cells[-1, -1] == "3 black white"
        assert cells.shape == (rows, columns) and (cells == blank).sum() == columns * rows - 2
        assert (names == rest).sum() == GRID**2 - columns * rows


def test_digits_are_said_once_in_reading_order():
    """And the patches that say them show their ink."""
    config, scans = get_config("small"), load_scan_splits(0)["train"]
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = sample_scene(rng)
        pixels, _ = draw_sheet(scene, scans, rng, cell_pixels=int(rng.integers(16, 23)))
        answer = cell_record(0, scene, "")["conversations"][1]["value"].split(NAME_SEPARATOR)
        names = patch_names(answer, pixels.shape[1], pixels.shape[0])
        assert tuple(int(name[0]) for name in names if name[0].isdigit()) == scene.digits
        (tile,) = image_tiles(Image.fromarray(pixels), config.image)
        assert tile.shape == (SIDE, SIDE, 3)
        patches = tile.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(GRID**2, -1, 3)
        for patch, name in zip(patches.astype(int), names, strict=True):
            to_ink, to_paper = (
                np.abs(patch - np.array(colour)).max(-1) for colour in (INKS[scene.ink][2], PAPERS[scene.paper][2])
            )
            if name[0] == "□":
                assert (to_paper <= 24).mean() > 0.6, scene  # edges are blurred
            elif name[0].isdigit() and max(scene.columns, scene.rows) == GRID:  # all of the digit is in one patch
                assert (to_ink < to_paper).sum() > 5, scene


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
