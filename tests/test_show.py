"""`data_pipelines.show` on the stages of an experiment: every kind of batch has its text and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.show import cells_of, main
from tests.data.media import talk, tone, write_json, write_png, write_wav

pytestmark = pytest.mark.slow

CONFIG = f"--config={Path(__file__).parents[1] / 'experiments' / 'own_data.py'}"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> list[str]:
    """Arguments for an experiment with pictures, transcribed recordings and a voice."""
    root = tmp_path_factory.mktemp("mine")
    write_png(root / "a.png", 40, 40)
    write_wav(root / "a.wav", tone(1.0))
    lines = [json.dumps({"audio": "a.wav", "text": text}) for text in ("one dog", "two dogs", "no dog")]
    (root / "heard.jsonl").write_text("\n".join(lines))
    records = [{"image": "a.png", "conversations": talk(f"<image>\nHow many dogs, {i}?", "None.")} for i in range(8)]
    records += [{"audio": "a.wav", "conversations": talk("<audio>", f"Dog {i}.")} for i in range(8)]
    fields = {"json": write_json(root / "a.json", records), "root": root}
    fields |= {"asr": root / "heard.jsonl", "speech": root / "heard.jsonl"}
    run = [f"--config.data.{name}={value}" for name, value in fields.items()]
    return [CONFIG, "--config.size=smoke", f"--config.run_dir={root / 'run'}", *run]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("own_data", "«"),
        ("speech_encoder", "features: float32"),
        ("codec", "other_waves: float32"),
        ("speech_decoders", "codec frames: "),
    ],
)
def test_every_kind_of_batch(places, tmp_path, capsys, stage, said):
    picture = tmp_path / "batch.png"
    assert main([*places, f"--stage={stage}", "--rows=2", f"--picture={picture}"]) == 0
    out = capsys.readouterr().out
    assert said in out and str(picture) in out
    with Image.open(picture) as image:
        assert min(image.size) > 100 and np.asarray(image).std() > 1


def test_the_data_of_another_configuration_are_not_replaced(places, tmp_path, capsys):
    assert main([*places, f"--picture={tmp_path / 'a.png'}"]) == 0
    assert main([*places, "--config.seed=7", f"--picture={tmp_path / 'b.png'}"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main([*places, "--batch=2", f"--picture={tmp_path / 'b.png'}"]) == 0
    assert "batch 2 of" in capsys.readouterr().out


def test_empty_slots_are_left_out():
    tiles = np.zeros((1, 3, 4, 4, 3), np.uint8)
    tiles[0, 1] = 9
    audio, lengths = np.ones((1, 2, 50, 80), np.float32), np.asarray([[30, 0]], np.int32)
    cells = cells_of({"tiles": tiles, "audio": audio, "audio_lengths": lengths}, 4, 100.0, 16000)
    assert [title for title, _ in cells] == ["row 0, tile 1", "row 0, sound 0: 0.30 s"]
    assert cells[1][1].shape == (80, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE is missing"),
        ([CONFIG, "--row=2"], "--row=2"),
        ([CONFIG, "--rows=0"], "--rows=0 must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main(["--help"]) == 0
