"""Paths on disks and in buckets, and what buckets do in another way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bucket import folder_as_bucket
from vita_jax import config as config_lib
from vita_jax import storage
from vita_jax.data.tokenizer import JsonTokenizer, load_tokenizer, train_sentencepiece
from vita_jax.errors import UserError
from vita_jax.storage import Scratch, append, files_below, on_disk, place, remove_folder, size_of, write_whole
from vita_jax.training.experiment import LogConfig


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path) -> Path:
    """A folder on a disk, then one in a bucket."""
    if request.param == "disk":
        yield tmp_path
    else:
        with folder_as_bucket(tmp_path):
            yield place("gs://bucket/folder")


def test_files_are_written_whole_added_to_and_removed(root: Path) -> None:
    file = root / "a" / "b.txt"
    write_whole(file, "zwei\n")
    append(file, "drei ✓\n")
    append(root / "a" / "new.txt", "one")
    assert file.read_text(encoding="utf-8") == "zwei\ndrei ✓\n"
    assert (size_of(file), size_of(root / "a" / "new.txt")) == (14, 3)
    assert [path.name for path in files_below(root)] == ["b.txt", "new.txt"]
    remove_folder(root / "a")
    assert not file.exists()


def test_what_is_written_on_disks_only_is_brought_to_its_place(root: Path) -> None:
    scratch = Scratch(root)
    assert isinstance(scratch.folder, type(Path()))
    (scratch.folder / "deep").mkdir(parents=True)
    (scratch.folder / "deep" / "log").write_text("one")
    scratch.send()
    (scratch.folder / "deep" / "log").write_text("one two")
    scratch.close()
    assert (root / "deep" / "log").read_text() == "one two"


def test_a_tokenizer_and_a_configuration_come_back(root: Path) -> None:
    tokenizer = train_sentencepiece(["a b c"] * 3, 300, None, at_most=True)
    tokenizer.save(root / "tokenizer")
    again = load_tokenizer(str(root / "tokenizer"))
    assert again.decode(again.encode("c a")) == "c a"
    with pytest.raises(UserError, match="does not exist"):
        JsonTokenizer(root / "nothing")
    config_lib.save_json(LogConfig(every_steps=7), str(root / "config.json"))
    assert config_lib.load_json(LogConfig, root / "config.json") == LogConfig(every_steps=7)


def test_what_is_not_supported_is_said(monkeypatch, tmp_path) -> None:
    with pytest.raises(UserError, match=r"s3:// is not supported; use a disk, or a bucket of Google's"):
        place("s3://bucket/run")
    monkeypatch.setattr(storage, "_has_driver", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'vita_jax\[gcs\]'"):
        place("gs://bucket/run")
    with pytest.raises(UserError, match="gs://bucket/x: a benchmark has to be on a disk; copy it"):
        on_disk("gs://bucket/x", "a benchmark")
    assert place(tmp_path / "a b") == tmp_path / "a b"
