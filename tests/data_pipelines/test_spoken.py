"""Spoken questions in place of written ones: what is rewritten, what is left, and that the result trains."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from data_pipelines import spoken
from data_pipelines.build import main
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from data_pipelines.spoken import SpeakOptions, speak_records
from tests.data.media import talk, write_json, write_png
from vita_jax.data.records import decode_record, load_manifest, read_folders
from vita_jax.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path):
    """Pictures, two rounds, text in two languages, one that cannot be said, and a broken record."""
    root = tmp_path / "media"
    for name in ("a.png", "b.png"):
        write_png(root / name)
    entries = [
        {
            "id": "two",
            "image": ["a.png", "b.png"],
            "conversations": talk("<image><image>\nSame?", "No.", "Why?", "So."),
        },
        {"id": "zh", "conversations": talk("一加一等于几？", "二")},
        {"id": "within", "image": "a.png", "conversations": talk("Is <image> red?", "No.")},
        {"id": "ru", "conversations": talk("Кто там?", "Я")},
        {"id": "long", "conversations": talk("word " * 100, "Yes.")},
        {"id": "broken", "conversations": []},
    ]
    return RecordsFile(write_json(tmp_path / "a.json", entries), root)


def test_all_that_can_be_said_is_spoken(source, tmp_path):
    options = SpeakOptions(fraction=1.0, negatives=0.4, refusal="Not me.", statements=("We went home.",))
    counts = speak_records(source, tmp_path / "out", options)
    want = {
        "questions": 6,
        "placeholders within": 1,
        "spoken": 3,
        "cannot be said": 1,
        "too long": 1,
        "unusable": 1,
        "negatives": 2,
    }
    assert counts == want
    records = {str(r.get("id")): r for r in json.loads((tmp_path / "out" / "records.json").read_text())}
    two = records["two"]
    assert [turn["value"] for turn in two["conversations"][::2]] == ["<image>\n<image>\n<audio>", "<audio>"]
    assert two["set"] == ["files", "files", "spoken", "spoken"] and len(two["audio"]) == 2
    assert records["ru"] == json.loads(source.path.read_text())[3]
    assert records["within"]["set"] == ["files"] and "audio" not in records["within"]
    assert records["negative-1"]["inserted_id"] == 1
    folders = read_folders(tmp_path / "out" / "roots.json")
    built = tmp_path / "built"
    build_records(RecordsFile(tmp_path / "out" / "records.json", folders=folders), built, max_bad_fraction=0.2)
    assert load_manifest(built).counts | {"records": 7, "images": 3, "audios": 5} == load_manifest(built).counts


def test_a_fraction_is_drawn_record_by_record(tmp_path):
    entries = [{"conversations": talk(f"Is {number} odd?", "Maybe.")} for number in range(60)]
    options = SpeakOptions(fraction=0.5, seed=3)
    first, second = tmp_path / "first", tmp_path / "second"
    count = speak_records(RecordsFile(write_json(tmp_path / "a.json", entries)), first, options)["spoken"]
    assert 20 < count < 40
    # What becomes of a record does not depend on the others.
    others = [{"conversations": talk("Another question?", "No.")}] * 10 + entries[10:20]
    speak_records(RecordsFile(write_json(tmp_path / "b.json", others)), second, options)
    whole, part = (json.loads((folder / "records.json").read_text())[10:20] for folder in (first, second))
    assert whole == part
    names = [name for record in part for name in record.get("audio", ())]
    assert all((first / "media" / name).read_bytes() == (second / "media" / name).read_bytes() for name in names)


def test_the_command_and_its_mistakes(source, tmp_path, capsys):
    json_path, root = str(source.path), str(source.root)
    arguments = ["speak", "--json", json_path, "--root", root, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--fraction", "0.3"]) == 0
    assert "6 questions" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert "was not built here" in capsys.readouterr().err
    for name in ("voices", "tests.data_pipelines.test_spoken:nothing", ":x", "no.such.module:Voice"):
        assert main([*arguments, "--synthesizer", name]) == 2
        assert f"--synthesizer {name}" in capsys.readouterr().err.replace("'", "")
    with pytest.raises(UserError, match="need a refusal"):
        SpeakOptions(negatives=0.1)
    with pytest.raises(UserError, match="fraction is 2"):
        SpeakOptions(fraction=2)
    for wrong, message in (
        ({"seed": -1}, "seed is -1"),
        ({"statements": ("Привет",)}, "cannot be said"),
        ({"refusal": "<audio>"}, "holds a placeholder"),
    ):
        with pytest.raises(UserError, match=message):
            SpeakOptions(**wrong)
    with pytest.raises(UserError, match="has a key 'spoken'"):
        speak_records(replace(source, folders={"spoken": "x"}), tmp_path / "more", SpeakOptions())
    with pytest.raises(UserError, match="is not a folder"):
        speak_records(replace(source, root=tmp_path / "nowhere"), tmp_path / "more", SpeakOptions())
    with pytest.raises(UserError, match="no record can be used; the first: .*conversations"):
        speak_records(RecordsFile(write_json(tmp_path / "none.json", [{}])), tmp_path / "more", SpeakOptions())


def test_folder_keys_of_a_table_stay_and_others_go(tmp_path):
    write_png(tmp_path / "coco" / "a.png")
    entry = {"set": "coco", "image": "a.png", "conversations": talk("<image>\nRed?", "No.")}
    file, options = write_json(tmp_path / "a.json", [entry]), SpeakOptions(fraction=1.0)
    places = {"table": (None, {"coco": str(tmp_path / "coco")}), "root": (tmp_path / "coco", None)}
    for name, (root, folders) in places.items():
        speak_records(RecordsFile(file, root, folders), tmp_path / name, options)
        record = json.loads((tmp_path / name / "records.json").read_text())[0]
        assert record["set"] == ["coco" if folders else "files", "spoken"]
        built = tmp_path / f"built-{name}"
        roots = read_folders(tmp_path / name / "roots.json")
        build_records(RecordsFile(tmp_path / name / "records.json", folders=roots), built)
        assert load_manifest(built).counts["audios"] == 1


def test_published_chats_are_spoken(tmp_path):
    entry = {"instruction": "What is one and one?", "output": "Two."}
    source = RecordsFile(write_json(tmp_path / "a.json", [entry]), layout="alpaca")
    assert speak_records(source, tmp_path / "out", SpeakOptions(fraction=1.0))["spoken"] == 1
    (record,) = json.loads((tmp_path / "out" / "records.json").read_text())
    assert [turn["value"] for turn in record["conversations"]] == ["<audio>", "Two."]


def test_stored_records_hold_the_sound(source, tmp_path):
    speak_records(source, tmp_path / "out", SpeakOptions(fraction=1.0))
    folders = read_folders(tmp_path / "out" / "roots.json")
    build_records(RecordsFile(tmp_path / "out" / "records.json", folders=folders), tmp_path / "b", max_bad_fraction=0.5)
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    shards = [str(tmp_path / "b" / shard.name) for shard in load_manifest(tmp_path / "b").shards]
    record = decode_record(ArrayRecordDataSource(shards)[0])
    assert [media.kind for media in record.media] == ["image", "image", "audio", "audio"]
    assert record.media[2].data.startswith(b"RIFF") and record.set == ("files", "files", "spoken", "spoken")


class Beeps:
    """A voice of one tone, and the texts it was asked for."""

    asked: ClassVar[list[str]] = []

    def speak(self, text, voice, **how):
        self.asked.append(text)
        return np.sin(np.arange(4000) * 0.3).astype(np.float32), 16_000


def test_another_synthesiser_can_take_its_place(source, tmp_path, monkeypatch):
    voices = types.ModuleType("voices_of_mine")
    voices.Beeps = Beeps
    monkeypatch.setitem(sys.modules, "voices_of_mine", voices)
    monkeypatch.setattr(Beeps, "asked", [])
    arguments = ["speak", "--json", str(source.path), "--root", str(source.root), "--fraction", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--synthesizer", "voices_of_mine:Beeps"]) == 0
    assert Beeps.asked == ["Same?", "Why?", "一加一等于几？"]
    assert len(list((tmp_path / "out" / "media").iterdir())) == 3


@dataclass(frozen=True)
class EnglishOnly:
    """Beeps, and for Chinese only where the file `allowed` is."""

    allowed: str

    def __call__(self):
        return self

    def speak(self, text, voice, **how):
        if not text.isascii() and not Path(self.allowed).exists():
            raise UserError(f"{text}: no voice")
        return Beeps().speak(text, voice)


def test_a_stopped_run_goes_on_with_the_parts_that_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(spoken, "PART_RECORDS", 2)
    monkeypatch.setattr(Beeps, "asked", [])
    texts = ["One?", "Two?", "Three?", "Four?", "五？"]
    source = RecordsFile(write_json(tmp_path / "a.json", [{"conversations": talk(text, "Yes.")} for text in texts]))
    options, voice = SpeakOptions(fraction=1.0), EnglishOnly(str(tmp_path / "allowed"))
    with pytest.raises(UserError, match="no voice"):
        speak_records(source, tmp_path / "out", options, synthesizer=voice)
    assert Beeps.asked == texts[:4] and not (tmp_path / "out").exists()
    (tmp_path / "allowed").touch()
    assert speak_records(source, tmp_path / "out", options, synthesizer=voice)["spoken"] == 5
    assert Beeps.asked == texts
    assert len(list((tmp_path / "out" / "media").iterdir())) == 5
    assert not list(tmp_path.glob(".out*"))
    speak_records(source, tmp_path / "out", options, synthesizer=voice)  # and replaces what it made
    assert Beeps.asked == texts * 2
