"""lmms-eval asks this package's server, by its model for programs that speak OpenAI's API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from qwen_vl_utils import fetch_video

from tests.eval_libraries.local_tasks import write_tasks
from tests.evaluation.random_run import random_run
from tests.serving.server import MODEL, serving
from vita_jax.evaluation.lmms.command import RESULTS, read_samples
from vita_jax.inference.session import Session

FRAMES = 4


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Of this disk; the working directory is the folder above them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    return folder


def test_answers_by_the_server_are_the_models(tasks, tmp_path):
    """About pictures, and about clips as their frames."""
    session = Session.load(random_run(tmp_path / "run").run_dir, num_rows=4)
    names = ("tiny_clip", "tiny_mme", "tiny_pictures")
    with serving(session) as served:
        model = f"model={MODEL},base_url={served.url}/v1,max_frames_num={FRAMES},num_concurrent=2,max_retries=1"
        line = [sys.executable, "-m", "lmms_eval", "--model", "openai", "--model_args", model]
        line += ["--tasks", ",".join(names), "--include_path", str(tasks)]
        line += ["--log_samples", "--output_path", str(tmp_path / "out")]
        subprocess.run(line, check=True)

    def say(length: int, text: str, *pictures: Path) -> str:
        return "".join(session.beside(max_new_tokens=length).ask(text, pictures))

    shown, frames = _pictures(tasks), _frames(tasks)
    word = "\nAnswer the question using a single word or phrase."
    expected = {
        "tiny_clip": [say(4, text, *frames) for text in ("colour?", "number?")],
        "tiny_mme": [say(16, f"Is it {colour}?{word}", shown[0]) for colour in ("red", "blue")],
        "tiny_pictures": [say(4, "First \nsecond \ncolour?", shown[0], other) for other in shown[1:]],
    }
    [results] = (tmp_path / "out").rglob(f"*{RESULTS}")
    said = {name: [line["text"] for line in read_samples(results) if line["task"] == name] for name in names}
    assert said == expected and len({text for texts in said.values() for text in texts}) > 3


def _pictures(folder: Path) -> list[Path]:
    """The pictures of tiny_pictures, the first of which MME shows, too."""
    rows = datasets.Dataset.from_parquet(str(folder / "tiny_pictures.parquet"))
    return _saved(folder, "shown", [rows[0]["first"], rows[0]["second"], rows[1]["second"]])


def _frames(folder: Path) -> list[Path]:
    """Of the clip, as they are sent."""
    clip = fetch_video({"type": "video", "video": str(folder / "clip.mp4"), "nframes": FRAMES})
    assert len(clip) == FRAMES
    return _saved(folder, "frame", [Image.fromarray(f.permute(1, 2, 0).numpy().astype(np.uint8)) for f in clip])


def _saved(folder: Path, name: str, pictures: list[Image.Image]) -> list[Path]:
    paths = [folder / f"{name}{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths
