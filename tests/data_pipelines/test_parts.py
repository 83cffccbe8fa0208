"""Work in parts: what is dealt out, what is done again, and what is said when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipelines.build import main
from data_pipelines.parts import Runner, deal_out, map_in_order, read_part, run_parts
from data_pipelines.records import build_records, validate_records
from data_pipelines.sources import RecordsFile
from tests.data.media import mixed_records, talk, write_json
from vita_jax.data.records import load_manifest
from vita_jax.errors import UserError


@dataclass(frozen=True)
class Sum:
    """Adds a part's numbers up and notes that it ran, and where; fails where a part holds `poison`."""

    notes: str
    poison: int | None = None

    def __call__(self, part: Path, report) -> int:
        Path(self.notes, f"{part.stem}-{time.monotonic_ns()}-{os.getpid()}").touch()
        total = 0
        for _, number in read_part(part):
            if number == self.poison:
                raise UserError(f"{part.stem}: {number} is poison")
            total += number
            report.show(numbers=total)
        return total


@pytest.fixture
def parts(tmp_path):
    """(folder of 3 parts of the numbers 0 to 9, an empty one)."""
    for name in ("parts", "notes"):
        (tmp_path / name).mkdir()
    assert deal_out(range(10), tmp_path / "parts", lambda place: place % 3) == 10
    return tmp_path / "parts", tmp_path / "notes"


def test_parts_hold_what_was_dealt(parts):
    folder, _ = parts
    dealt = [list(read_part(file)) for file in sorted(folder.iterdir())]
    assert dealt == [[(n, n) for n in range(first, 10, 3)] for first in range(3)]


def test_a_failure_is_said_and_the_rest_is_not_done_again(parts):
    folder, notes = parts
    with pytest.raises(UserError, match="part-00001: 4 is poison"):
        run_parts(folder, Sum(str(notes), poison=4), Runner())
    done = {file.stem for file in folder.glob("*.result")}
    assert "part-00001" not in done
    assert run_parts(folder, Sum(str(notes)), Runner()) == [18, 12, 15]
    ran = [note.name[: len("part-00000")] for note in notes.iterdir()]
    assert ran.count("part-00001") == 2 and len(ran) == 4
    assert run_parts(folder, Sum(str(notes), poison=4), Runner()) == [18, 12, 15]  # all there: nothing runs


def test_several_processes_give_the_same(parts):
    folder, notes = parts
    several = Runner(options=("direct_running_mode=multi_processing", "direct_num_workers=2"))
    assert run_parts(folder, Sum(str(notes)), several) == [18, 12, 15]
    assert str(os.getpid()) not in {note.name.split("-")[-1] for note in notes.iterdir()}


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        (Runner("NoRunner"), "NoRunner"),
        (Runner(options=("direct_num_workers=many",)), "direct_num_workers"),
        (Runner(options=("no_such_option=1",)), "no_such_option"),
    ],
)
def test_what_beam_does_not_know_is_refused(parts, runner, message):
    with pytest.raises(UserError, match=message):
        run_parts(parts[0], Sum(str(parts[1])), runner)


def test_runner_options_are_pairs():
    for option in ("direct_num_workers", "=3", "--=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            Runner(options=(option,))


def test_threads_keep_the_order():
    def slow(number):
        time.sleep(0.002 * (number % 3))
        return number

    assert list(map_in_order(slow, range(150))) == list(range(150))


# ---- records on parts -----------------------------------------------------------------------------------------------


def test_shards_do_not_depend_on_who_makes_them(tmp_path):
    source = RecordsFile(write_json(tmp_path / "a.json", mixed_records(tmp_path / "media", 12)), tmp_path / "media")
    one = build_records(source, tmp_path / "one", shards=3)
    several = Runner(options=("direct_running_mode=multi_processing", "direct_num_workers=2"))
    two = build_records(source, tmp_path / "two", shards=3, runner=several)
    assert one.shards == two.shards and one.counts == two.counts


def test_json_lines_are_a_source_and_broken_lines_are_rejected(tmp_path):
    records = mixed_records(tmp_path / "media", 6)
    whole = build_records(RecordsFile(write_json(tmp_path / "a.json", records), tmp_path / "media"), tmp_path / "whole")
    lines = [json.dumps(record).encode() for record in records]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines, b"", b'{"id": ', b'{"id": "\xff"}']))
    source = RecordsFile(tmp_path / "a.jsonl", tmp_path / "media")
    built = build_records(source, tmp_path / "lines", max_bad_fraction=0.3)
    assert built.shards == whole.shards and built.rejects == {"format": 2}
    reasons = [reject["reason"] for reject in validate_records(source).rejects]
    assert "line 8 is not valid JSON: column 8" in reasons[0] and "line 9 is not UTF-8 (byte 8)" in reasons[1]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        validate_records(RecordsFile(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        validate_records(RecordsFile(tmp_path / "none.jsonl"))


def test_results_whose_shards_have_gone_are_made_again(tmp_path, monkeypatch):
    file, output = write_json(tmp_path / "a.json", [{"conversations": talk("A?", "B.")}] * 6), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("data_pipelines.records.replace_folder", lambda new, output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_records(RecordsFile(file), output, shards=3)
    (work,) = tmp_path.glob(".out.parts-*")
    sorted(work.glob("output/*.array_record"))[1].unlink()
    (work / "output" / "records-00000-of-00003.77.new").touch()
    manifest = build_records(RecordsFile(file), output, shards=3)
    assert len(manifest.shards) == 3 and all((output / shard.name).is_file() for shard in manifest.shards)
    assert not list(output.glob("*.new")) and sorted(os.listdir(tmp_path)) == ["a.json", "out"]


def test_records_with_the_same_id_are_both_kept(tmp_path):
    entries = [{"id": "twin", "conversations": talk("Which?", answer)} for answer in ("This.", "That.")]
    manifest = build_records(RecordsFile(write_json(tmp_path / "a.json", entries)), tmp_path / "out")
    assert manifest.counts["records"] == 2


@pytest.mark.slow
def test_a_build_that_is_killed_is_completed_and_leaves_nothing(tmp_path):
    records = [{"id": i, "conversations": talk("How many?", f"{i} " * 2000)} for i in range(6000)]
    file, output = write_json(tmp_path / "a.json", records), tmp_path / "out"
    line = ["records", "--json", str(file), "--output", str(output), "--shards", "8"]
    process = subprocess.Popen([sys.executable, "-m", "data_pipelines.build", *line], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.parts-*/part-*.result")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert main(line) == 0
    manifest = load_manifest(output)
    assert manifest.counts["records"] == 6000 and sorted(os.listdir(tmp_path)) == ["a.json", "out"]
    names = {shard.name for shard in manifest.shards}
    assert set(os.listdir(output)) == names | {"manifest.json", "rejects.jsonl"}
    other = build_records(RecordsFile(file), tmp_path / "other", shards=8)
    assert other.shards == load_manifest(output).shards
