"""What is said to be in built records, against what was put there."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from data_pipelines.build import main
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from data_pipelines.stats import gather, script_of
from tests.data.media import talk, write_json, write_png, write_wav
from vita_jax.data.images import ImageConfig
from vita_jax.errors import UserError

RATE = 16000


@pytest.fixture
def built(tmp_path):
    """Three records: a wide picture, two sounds, and text in Chinese."""
    media = tmp_path / "media"
    write_png(media / "wide.png", 96, 32)
    for name, seconds in (("short.wav", 0.5), ("long.wav", 2.0)):
        write_wav(media / name, np.zeros(int(RATE * seconds), np.float32) + 0.1, RATE)
    entries = [
        {"image": "wide.png", "conversations": talk("<image>\nHow wide?", "Three.")},
        {"audio": ["short.wav", "long.wav"], "conversations": talk("<audio><audio>", "Hello you.")},
        {"conversations": talk("你好吗", "我很好", "1 + 1", "2")},
    ]
    build_records(RecordsFile(write_json(tmp_path / "a.json", entries), media), tmp_path / "out")
    return tmp_path / "out"


def test_every_quantity(built):
    stats = gather(built, image=ImageConfig(image_size=32, max_tiles=4))
    assert stats.records == stats.of == 3
    assert stats.numbers["rounds of a record"] == [1, 1, 2]
    assert stats.numbers["seconds of an audio"] == [0.5, 2]
    assert stats.numbers["longer side of an image in pixels"] == [96]
    assert stats.numbers["tiles of an image"] == [4]  # 3 x 1 and the overview
    assert stats.numbers["characters of a question"] == [len("How wide?"), 0, 3, 5]
    assert stats.classes["media of a record"] == Counter({"image": 1, "audio": 1, "text only": 1})
    assert stats.classes["script of an answer"] == Counter({"latin": 2, "han": 1, "no letters": 1})


def test_a_sample_is_evenly_spaced(built):
    stats = gather(built, limit=2)
    assert (stats.records, stats.of) == (2, 3) and stats.numbers["rounds of a record"] == [1, 1]
    with pytest.raises(UserError, match="limit is 0"):
        gather(built, limit=0)


def test_a_manifest_of_recordings(tmp_path):
    write_wav(tmp_path / "a.wav", np.zeros(RATE, np.float32) + 0.1, RATE)
    line = {"id": "a", "audio": "a.wav", "text": "one two"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    stats = gather(tmp_path)
    assert stats.numbers["seconds of an audio"] == [1] and stats.numbers["characters of an answer"] == [7]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UserError, match=r"line 1: audio .*a\.wav"):
        gather(tmp_path)


def test_the_command_prints_a_table_and_writes_a_page(built, tmp_path, capsys):
    page = tmp_path / "stats.html"
    assert main(["stats", str(built), "--page", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("seconds of an audio"))
    assert row.split()[4:] == ["2", "2.50", "1.25", "1.25", "1.92", "2"]
    assert "data:image/png;base64," in page.read_text() and "seconds of an audio" in page.read_text()
    assert main(["stats", str(built), "--page", str(tmp_path / "none" / "stats.html")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "media")]) == 2
    assert "holds neither manifest.json nor manifest.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "script"), [("你好呀 ok", "han"), ("ok 你", "latin"), ("Да ok, и нет", "other"), ("3.5 %", "no letters")]
)
def test_scripts(text, script):
    assert script_of(text) == script
