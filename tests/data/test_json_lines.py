"""Files with a JSON value a line: what is read is what was written, and every mistake has its place."""

from __future__ import annotations

import pytest

from vita_jax.data import json_lines
from vita_jax.data.json_lines import read_json_lines, write_json_lines
from vita_jax.errors import UserError


def test_what_was_written_is_read(tmp_path):
    values = [{"text": "a\u2028b\n"}, {"text": "\u4e00"}, {}]
    path = tmp_path / "deep" / "values.jsonl"
    write_json_lines(path, values)
    assert [value for _, value in read_json_lines(path)] == values
    assert [name.name for name in path.parent.iterdir()] == ["values.jsonl"]
    path.write_text("\ufeff1\n\n[2]")
    assert list(read_json_lines(path)) == [(f"{path}:1", 1), (f"{path}:3", [2])]


def test_mistakes_have_their_place(tmp_path):
    for name, content, message in (
        ("none", None, "none does not exist; look there"),
        ("empty", b" \n", "empty is empty; look there"),
        ("bad", b"{}\n{", "bad:2: not JSON"),
        ("latin", b"\xe4", "latin cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_json_lines(tmp_path / name, "look there"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_json_lines(tmp_path / "file" / "x.jsonl", [])


def test_errors_that_are_no_system_s_have_their_words(monkeypatch, tmp_path):
    """Those of a bucket, say, have no number."""

    def write(*arguments):
        raise OSError("the bucket is locked")

    monkeypatch.setattr(json_lines, "write_whole", write)
    with pytest.raises(UserError, match="x.jsonl cannot be written: the bucket is locked; choose"):
        write_json_lines(tmp_path / "x.jsonl", [])
