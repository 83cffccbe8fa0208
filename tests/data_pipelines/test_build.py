"""JSON to ArrayRecord: what is checked, what is written, when nothing is done."""

import hashlib
import json
import os

import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from data_pipelines.build import main
from data_pipelines.records import build_records, validate_records
from data_pipelines.sources import RecordsFile
from tests.data.media import mixed_records, png_bytes, talk, tone, write_json, write_png, write_wav
from vita_jax.data.records import decode_record, load_manifest
from vita_jax.errors import UserError


def stored(folder):
    """All records of a built folder, shard by shard."""
    names = [str(folder / shard.name) for shard in load_manifest(folder).shards]
    return [decode_record(data) for data in ArrayRecordDataSource(names)]


def rejects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def good(tmp_path):
    """12 good records of all kinds."""
    return RecordsFile(write_json(tmp_path / "good.json", mixed_records(tmp_path / "media", 12)), tmp_path / "media")


def test_everything_is_stored(good, tmp_path):
    manifest = build_records(good, tmp_path / "out")
    assert manifest == load_manifest(tmp_path / "out")
    assert manifest.counts == {"records": 12, "rounds": 17, "images": 10, "videos": 2, "text_only": 2}
    assert manifest.rejects == {} and [s.records for s in manifest.shards] == [12]
    assert manifest.source_sha256 == hashlib.sha256(good.path.read_bytes()).hexdigest()
    shard = tmp_path / "out" / manifest.shards[0].name
    assert manifest.shards[0].sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    records = stored(tmp_path / "out")
    assert [r.id for r in records] == [f"r{i}" for i in range(12)]
    assert records[0].media[0].data == (tmp_path / "media" / "wide.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["good.json", "media", "out"]


def test_shards_are_deterministic_and_complete(good, tmp_path):
    first = build_records(good, tmp_path / "a", shards=5)
    second = build_records(good, tmp_path / "b", shards=5)
    assert first.shards == second.shards
    assert [s.records for s in first.shards] == [3, 3, 2, 2, 2]
    assert sorted(r.id for r in stored(tmp_path / "a")) == sorted(f"r{i}" for i in range(12))
    assert len(build_records(good, tmp_path / "c", shards=100).shards) == 12  # no empty files


def test_second_run_does_nothing_until_an_input_changes(good, tmp_path):
    out, lines = tmp_path / "out", []
    build_records(good, out, progress=lines.append)
    before = (out / "manifest.json").stat().st_mtime_ns
    build_records(good, out, progress=lines.append)
    assert "up to date" in lines[-1] and (out / "manifest.json").stat().st_mtime_ns == before

    def rebuilt(**options):
        build_records(good, out, progress=lines.append, **options)
        return "up to date" not in lines[-1]

    write_png(good.root / "wide.png", 40, 20, 99)  # the same size or not, the time differs
    assert rebuilt() and not rebuilt()
    assert stored(out)[0].media[0].data == png_bytes(40, 20, 99)
    assert rebuilt(shards=2) and not rebuilt(shards=2)
    (out / load_manifest(out).shards[0].name).unlink()
    assert rebuilt(shards=2)
    (out / "manifest.json").write_text("{}")
    assert rebuilt(shards=2)
    write_json(good.path, mixed_records(good.root, 6))
    assert rebuilt(shards=2) and len(stored(out)) == 6
    assert sorted(os.listdir(tmp_path)) == ["good.json", "media", "out"]


def bad_entries(root):
    """20 good records and one of each kind of bad one."""
    write_png(root / "ok.png")
    (root / "broken.png").write_bytes(png_bytes(64, 64)[:300])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("not a picture")
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 nothing more")

    def shown(name):
        return {"id": name, "image": name, "conversations": talk("<image>\nWhat?", "This.")}

    good = [{**shown("ok.png"), "id": f"ok{i}"} for i in range(20)]
    return good, [
        shown("broken.png"),
        shown("empty.png"),
        shown("text.png"),
        shown("missing.png"),
        {"id": "clip", "video": "broken.mp4", "conversations": talk("<video>\nWhat?", "This.")},
        {"id": "count", "image": "ok.png", "conversations": talk("What?", "This.")},
        {"id": "field", "imagee": "ok.png", "conversations": talk("What?", "This.")},
        {"id": "sound", "audio": "text.png", "conversations": talk("<audio>", "Hm.")},
        "not a record",
    ]


def test_bad_records_within_the_budget_are_listed(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    good, bad = bad_entries(root)
    source = write_json(tmp_path / "some.json", good[:10] + bad + good[10:])
    manifest = build_records(RecordsFile(source, root), tmp_path / "out", max_bad_fraction=0.5)
    assert manifest.counts["records"] == 20 and len(stored(tmp_path / "out")) == 20
    assert manifest.rejects == {
        "damaged media": 5,
        "format": 1,
        "missing media": 1,
        "placeholders": 1,
        "unknown field": 1,
    }
    lines = rejects(tmp_path / "out" / "rejects.jsonl")
    assert [line["record"] for line in lines] == list(range(10, 19))
    assert [line["field"] for line in lines] == ["image"] * 4 + ["video", "image", "imagee", "audio", ""]
    assert all(line["file"] == "some.json" for line in lines)
    assert lines[0]["id"] == "broken.png" and "damaged or cut off" in lines[0]["reason"]
    assert lines[-1]["id"] is None
    assert build_records(RecordsFile(source, root), tmp_path / "out", max_bad_fraction=0.5) == manifest


def test_over_budget_fails_with_one_line_and_keeps_the_rejects(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    good, bad = bad_entries(root)
    source = write_json(tmp_path / "some.json", good + bad)
    with pytest.raises(UserError) as caught:
        build_records(RecordsFile(source, root), tmp_path / "out", max_bad_fraction=0.2)
    assert "9 of 29 records rejected (31.0%), max_bad_fraction is 0.2" in str(caught.value)
    assert "broken.png" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert len(rejects(tmp_path / "out.rejects.jsonl")) == 9
    build_records(RecordsFile(source, root), tmp_path / "out", max_bad_fraction=0.5)
    assert sorted(os.listdir(tmp_path)) == ["media", "out", "some.json"]
    with pytest.raises(UserError, match="9 of 29 records rejected"):  # a stricter budget holds for an old build
        build_records(RecordsFile(source, root), tmp_path / "out", max_bad_fraction=0.2)


def test_failed_rebuild_leaves_the_old_build(good, tmp_path):
    build_records(good, tmp_path / "out")
    write_json(good.path, [{"image": "missing.png", "conversations": talk("<image>", "Yes.")}])
    with pytest.raises(UserError, match="1 of 1 records rejected"):
        build_records(good, tmp_path / "out", max_bad_fraction=1.0)
    assert len(stored(tmp_path / "out")) == 12


def test_repaired_media_are_noticed(tmp_path):
    """A file that was missing at the last run and now exists is an input that changed."""
    entries = [{"image": f"{i}.png", "conversations": talk("<image>", "Yes.")} for i in range(2)]
    source = write_json(tmp_path / "a.json", entries)
    write_png(tmp_path / "0.png")
    assert build_records(RecordsFile(source, tmp_path), tmp_path / "out", max_bad_fraction=0.5).counts["records"] == 1
    write_png(tmp_path / "1.png")
    assert build_records(RecordsFile(source, tmp_path), tmp_path / "out", max_bad_fraction=0.5).counts["records"] == 2


def test_folders_by_set(tmp_path, capsys):
    write_png(tmp_path / "x" / "a.png", seed=1)
    write_png(tmp_path / "y" / "a.png", seed=2)
    entries = [{"set": key, "image": "a.png", "conversations": talk("<image>", key)} for key in ("first", "second")]
    source = write_json(tmp_path / "a.json", entries)
    table = write_json(tmp_path / "roots.json", {"first": "x", "second": "y"})
    options = ["--shards", "2", "--runner-option", "direct_running_mode=in_memory"]
    places = ["--json", str(source), "--folders", str(table), "--output", str(tmp_path / "out")]
    assert main(["records", *places, *options]) == 0
    assert "2 records, 2 rounds, 2 images" in capsys.readouterr().out
    assert [r.media[0].data for r in stored(tmp_path / "out")] == [png_bytes(16, 16, 1), png_bytes(16, 16, 2)]
    assert load_manifest(tmp_path / "out").command.startswith("python -m data_pipelines.build records --json ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"conversations": [', "is not valid JSON"),
        (b"\xff\xfe[]", "is not UTF-8"),
        (b"", "is empty"),
        (b"[]", "empty list"),
        (b"{}", "expected a list of records"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    arguments = [
        "records",
        "--json",
        str(tmp_path / "bad.json"),
        "--root",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "bad.json" in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["bad.json"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--json", "a.json", "--split", "test"], "--split says nothing beside --json"),
        (["--tfds", "mnist", "--ignore-fields", "a"], "--ignore-fields says nothing beside --tfds"),
    ],
)
def test_options_of_another_source_are_refused(tmp_path, capsys, line, message):
    assert main(["records", *line, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_refused_places(good, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not built here"):
        build_records(good, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        build_records(good, good.path)
    with pytest.raises(UserError, match="root .* is not a folder"):
        build_records(RecordsFile(good.path, tmp_path / "nowhere"), tmp_path / "out")
    for options in ({"max_bad_fraction": -0.1}, {"shards": 0}):
        with pytest.raises(UserError, match="must be between"):
            build_records(good, tmp_path / "out", **options)


def test_sounds_are_decoded_counted_and_stored_as_they_are(tmp_path):
    write_wav(tmp_path / "a.wav", tone())
    entries = [{"id": "s", "audio": ["a.wav", "a.wav"], "conversations": talk("<audio>", "One.", "<audio>", "Two.")}]
    manifest = build_records(RecordsFile(write_json(tmp_path / "s.json", entries), tmp_path), tmp_path / "out")
    assert manifest.counts["audios"] == 2 and manifest.counts["text_only"] == 0
    assert [m.data for m in stored(tmp_path / "out")[0].media] == [(tmp_path / "a.wav").read_bytes()] * 2


def test_validate_says_what_a_build_would_reject_and_writes_nothing(good, tmp_path, capsys):
    source, root = good.path, good.root
    entries = json.loads(source.read_text()) + [{"image": "none.png", "conversations": talk("<image>", "Yes.")}, 7]
    source = write_json(tmp_path / "more.json", entries)
    before = sorted(os.listdir(tmp_path))
    found = validate_records(RecordsFile(source, root))
    built = build_records(RecordsFile(source, root), tmp_path / "out", max_bad_fraction=0.5)
    assert found.total == 14 and found.counts == built.counts and found.categories == built.rejects
    assert list(found.rejects) == rejects(tmp_path / "out" / "rejects.jsonl")
    assert main(["validate", str(source), "--root", str(root)]) == 2
    said = capsys.readouterr().out
    assert "none.png" in said and "12 records" in said and "rejected format: 1, missing media: 1" in said
    assert main(["validate", str(source), "--root", str(root), "--max-bad-fraction", "0.5"]) == 0
    assert sorted(set(os.listdir(tmp_path)) - {"out"}) == before
    assert main(["validate", str(source), "--root", str(tmp_path / "nowhere")]) == 2
