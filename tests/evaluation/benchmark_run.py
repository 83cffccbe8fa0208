"""A tiny trained run with benchmark data, shared by the tests of evaluation, chat and report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.training.records import prepare_records, records_experiment
from tests.training.tiny import TILE
from vita_jax.data.video import write_video
from vita_jax.training import loop
from vita_jax.training.experiment import ExperimentConfig, data_folder

KINDS = {"count": "3", "sum": "1+2=3", "colour": "red"}


def make_run(run_dir: Path) -> ExperimentConfig:
    """Trains `joint` for a few steps and writes benchmark data."""
    config = records_experiment(run_dir)
    prepare_records(config)
    loop.run(config, stream=io.StringIO())
    write_benchmark(data_folder(config) / "benchmarks" / "quickstart")
    return config


def write_benchmark(root: Path) -> None:
    """Two pictures with three questions each, a clip and two text questions."""
    (root / "media").mkdir(parents=True)
    rng = np.random.default_rng(0)
    items = []
    for number in range(2):
        picture = rng.integers(0, 256, (TILE, TILE * 2, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / f"media/{number}.png")
        for kind, answer in KINDS.items():
            item = {"id": f"p{number}{kind}", "group": "typed", "kind": kind, "language": ("en", "zh")[number]}
            media = {"image": f"media/{number}.png", "num_digits": number + 1}
            items.append({**item, **media, "question": "number?", "answer": answer})
    write_video(root / "media/clip.mp4", rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), 2.0)
    common = {"language": "en", "question": "colour?", "num_digits": 3}
    clip = {"id": "v", "group": "video_order", "kind": "order", "video": "media/clip.mp4", "answer": "1 2 3"}
    items.append({**common, **clip})
    for number in range(2):
        items.append({**common, "id": f"t{number}", "group": "text", "kind": "count", "answer": "<b>2</b>"})
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    (root / "items.jsonl").write_text("".join(lines), encoding="utf-8")
