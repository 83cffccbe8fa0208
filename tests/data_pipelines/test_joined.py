"""The original's packing as a command: records joined to long conversations, none lost."""

from __future__ import annotations

import json

import pytest

from data_pipelines import build
from data_pipelines.joined import join_file, joined_group
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from tests.data.media import talk, tone, write_png, write_wav
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(["what is this", "a red apple", "write it down"] * 9, 300, None, at_most=True)


@pytest.fixture
def source(tmp_path):
    """Twelve text records, two with a picture, one with a sound, one that cannot be joined, one broken."""
    root = tmp_path / "media"
    write_png(root / "a.png")
    write_wav(root / "a.wav", tone())
    entries = [{"id": f"t{i}", "conversations": talk("what is this", "a red apple")} for i in range(12)]
    picture = {"image": "a.png", "conversations": talk("<image>\nwhat is this", "a red apple")}
    entries += [{"id": f"p{i}", **picture} for i in range(2)]
    entries += [{"id": "s", "audio": "a.wav", "conversations": talk("<audio>", "write it down")}]
    noise = {"audio": "a.wav", "inserted_id": 1, "conversations": talk("<audio>", "no")}
    entries += [{"id": "n", **noise}, {"id": "broken", "image": "none.png", "conversations": talk("<image>", "a")}]
    (tmp_path / "my.json").write_text(json.dumps(entries), encoding="utf-8")
    return RecordsFile(tmp_path / "my.json", root)


def rounds(records):
    return sum(len(record["conversations"]) // 2 for record in records)


def test_all_usable_records_are_in_the_result(source, tokenizer, tmp_path):
    counts = join_file(source, tmp_path / "joined.json", tokenizer, max_tokens=700, max_bad_fraction=0.2)
    written = json.loads((tmp_path / "joined.json").read_text(encoding="utf-8"))
    assert counts["records"] == 17 and counts["rejected"] == 1 and counts["alone"] == 1
    assert rounds(written) == 16
    names = [
        name for record in written for name in (record["id"] if isinstance(record["id"], list) else [record["id"]])
    ]
    assert sorted(names) == sorted([f"t{i}" for i in range(12)] + ["p0", "p1", "s", "n"])
    assert counts["written"] == len(written) < 16
    (reject,) = [json.loads(line) for line in (tmp_path / "joined.json.rejects.jsonl").open(encoding="utf-8")]
    assert reject["record"] == 16 and "no such file" in reject["reason"]


def test_the_order_is_the_seeds(source, tokenizer, tmp_path):
    def joined(seed):
        join_file(source, tmp_path / f"{seed}.json", tokenizer, seed=seed, max_bad_fraction=0.2)
        return (tmp_path / f"{seed}.json").read_bytes()

    assert joined(1) == joined(1) != joined(2)


def test_a_joined_file_is_a_records_file(source, tokenizer, tmp_path):
    join_file(source, tmp_path / "joined.json", tokenizer, max_bad_fraction=0.2)
    manifest = build_records(RecordsFile(tmp_path / "joined.json", source.root), tmp_path / "built")
    assert not manifest.rejects
    assert manifest.counts["rounds"] == 16


def test_files_with_and_without_a_set_are_not_mixed():
    one = {"id": "1", "set": ["a"], "image": "x.png", "conversations": talk("<image>", "yes")}
    other = {"id": "2", "image": "y.png", "conversations": talk("<image>", "no")}
    assert joined_group([one, other]) == [one, other]
    (joined,) = joined_group([one, {**other, "set": ["b"]}])
    assert joined["set"] == ["a", "b"] and joined["image"] == ["x.png", "y.png"]


def test_too_many_bad_records_fail(source, tokenizer, tmp_path):
    with pytest.raises(UserError, match="1 of 17 records rejected"):
        join_file(source, tmp_path / "joined.json", tokenizer, max_bad_fraction=0.01)
    assert not (tmp_path / "joined.json").exists()


def test_the_command(source, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    command = ["join", "--json", str(source.path), "--root", str(source.root), "--max-bad-fraction", "0.2"]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "joined.json")]
    assert build.main(command) == 0
    assert "17 records" in capsys.readouterr().out
