"""Corpora to a manifest for training: what is in it, what is left out, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines.build import CORPORA, main
from data_pipelines.recordings import build_manifest
from data_pipelines.speech import manifests
from data_pipelines.speech.manifests import read_corpus
from tests.data.media import tone, write_wav
from vita_jax.data.manifests import read_manifest
from vita_jax.data.speech_pairs import read_wave
from vita_jax.errors import UserError


@pytest.fixture
def libri(tmp_path):
    """Three recordings in LibriSpeech's folders, a line without its recording, and a damaged one."""
    folder = tmp_path / "corpus" / "dev" / "84" / "1"
    for number in range(3):
        write_wav(folder / f"84-1-000{number}.wav", tone(0.5 + number), 16000)
    (folder / "84-1-0003.wav").write_bytes(b"RIFF")
    lines = "".join(f"84-1-000{number} WORD {number}\n" for number in range(5))
    (folder / "84-1.trans.txt").write_text(lines, encoding="utf-8")
    return tmp_path / "corpus"


def command(libri, output, *more):
    return main(["recordings", "--layout", "librispeech", "--from", str(libri), "--output", str(output), *more])


def test_a_corpus_becomes_a_manifest_that_training_reads(libri, tmp_path, capsys):
    output = tmp_path / "a" / "out"
    assert command(libri, output, "--max-bad-fraction", "0.4") == 0
    said = capsys.readouterr().out
    assert "3 recordings" in said and "3 en" in said and "damaged media: 1, missing media: 1" in said
    pairs = read_manifest(output)
    assert [pair.text for pair in pairs] == ["word 0", "word 1", "word 2"]
    np.testing.assert_allclose(read_wave(pairs[1].audio, 16000), tone(1.5), atol=1e-4)
    entries = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert [entry["duration"] for entry in entries] == [0.5, 1.5, 2.5] and entries[0]["id"] == "84-1-0000"
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert [reject["category"] for reject in rejects] == ["damaged media", "missing media"]
    assert "trans.txt:5" in rejects[1]["reason"] and "84-1-0004" in rejects[1]["reason"]


def test_too_many_rejects_write_nothing_but_the_reasons(libri, tmp_path, capsys):
    output = tmp_path / "out"
    assert command(libri, output) == 2
    error = capsys.readouterr().err
    assert "2 of 5 recordings rejected" in error and "out.rejects.jsonl" in error
    assert not output.exists() and len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 2


def test_durations_of_a_list_are_checked(tmp_path, capsys):
    write_wav(tmp_path / "a.wav", tone(1.0), 16000)
    lines = [{"audio": "a.wav", "text": "one", "duration": seconds} for seconds in (1.2, 4)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["recordings", "--layout", "manifest", "--from", str(tmp_path / "list.jsonl")]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--max-bad-fraction", "0.5"]) == 0
    assert "1 recordings" in capsys.readouterr().out
    assert "is 4.0 s in the list, 1.00 s" in (tmp_path / "out" / "rejects.jsonl").read_text()


def test_odd_lines_are_rejected_and_odd_texts_survive(tmp_path):
    write_wav(tmp_path / "a.wav", tone(1.0), 16000)
    odd = ["a\0.wav", "x" * 300 + ".wav", "a.wav"]
    lines = [json.dumps({"audio": name, "text": "one\u2028two", "id": f"no {i}"}, ensure_ascii=False) for i, name in
             enumerate(odd)]  # fmt: skip
    lines += ['{"audio": "a.wav", "text": "half \\ud800"}', '{"audio": "a.wav", "text": "b", "duration": 1e999}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = build_manifest(read_corpus(tmp_path / "list.jsonl", "manifest"), tmp_path / "out", max_bad_fraction=0.9)
    assert found.count == 1 and sum(found.rejects.values()) == 4
    assert [pair.text for pair in read_manifest(tmp_path / "out")] == ["one\u2028two"]
    assert json.loads((tmp_path / "out" / "manifest.jsonl").read_text(encoding="utf-8"))["id"] == "no 2"


def test_a_users_own_manifest_is_not_replaced(tmp_path):
    write_wav(tmp_path / "a.wav", tone(1.0), 16000)
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav", "text": "mine"}')
    with pytest.raises(UserError, match="was not built here"):
        build_manifest(read_corpus(tmp_path / "manifest.jsonl", "manifest"), tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list(read_corpus(tmp_path / "manifest.jsonl", "manifest", tmp_path / "nowhere"))
    (tmp_path / "empty.trans.txt").write_text("")
    with pytest.raises(UserError, match="there are no recordings"):
        build_manifest(read_corpus(tmp_path, "librispeech"), tmp_path / "out")


def test_refused_places(libri, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert command(libri, tmp_path / "mine") == 2 and "was not built here" in capsys.readouterr().err
    assert command(libri, tmp_path / "mine" / "thesis.txt") == 2 and "is a file" in capsys.readouterr().err
    assert command(libri, tmp_path / "out", "--max-bad-fraction", "2") == 2


def test_the_commands_layouts_are_those_of_the_readers():
    assert CORPORA == manifests.LAYOUTS
