"""Lists of recordings: the same utterances from each layout; what is wrong is named with its line."""

import json
import re

import pytest

from data_pipelines.speech.manifests import read_corpus
from vita_jax.data.records import RecordError
from vita_jax.errors import UserError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def write_manifest(folder, *entries):
    path = folder / "list.jsonl"
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries), encoding="utf-8")
    return path


def test_a_manifest(tmp_path):
    first, second = touch(tmp_path / "a/1.wav"), touch(tmp_path / "2.flac")
    path = write_manifest(
        tmp_path,
        {"audio": "a/1.wav", "text": " hello ", "duration": 1.5, "speaker": "left alone"},
        "",
        {"audio": "2.flac", "text": "你好", "language": "zh"},
    )
    found = [(u.path, u.text, u.language, u.duration) for u in read_corpus(path, "manifest")]
    assert found == [(first, "hello", "en", 1.5), (second, "你好", "zh", None)]


def test_a_manifest_with_a_root_elsewhere(tmp_path):
    recording = touch(tmp_path / "sounds/1.wav")
    path = write_manifest(tmp_path, {"audio": "1.wav", "text": "你好"})
    assert [(u.path, u.language) for u in read_corpus(path, "manifest", tmp_path / "sounds")] == [(recording, "zh")]


def test_librispeech(tmp_path):
    folder = tmp_path / "dev-clean/84/121123"
    files = [touch(folder / f"84-121123-000{i}.flac") for i in range(2)]
    (folder / "84-121123.trans.txt").write_text("84-121123-0000 GO ON\n84-121123-0001 DON'T\n", encoding="utf-8")
    found = [(u.path, u.text, u.language) for u in read_corpus(tmp_path, "librispeech")]
    assert found == [(files[0], "go on", "en"), (files[1], "don't", "en")]


def test_aishell(tmp_path):
    recording = touch(tmp_path / "wav/train/S0002/BAC009S0002W0122.wav")
    (tmp_path / "transcript").mkdir()
    (tmp_path / "transcript/aishell_transcript_v0.8.txt").write_text(
        "BAC009S0002W0122 而 对 楼市\nBAC009S0002W0999 没有 录音\n", encoding="utf-8"
    )
    assert [(u.path, u.text, u.language) for u in read_corpus(tmp_path, "aishell")] == [(recording, "而对楼市", "zh")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", r"list.jsonl:1: not JSON"),
        ("[]", "expected an object"),
        ({"text": "hello"}, "list.jsonl:1: audio: is missing"),
        ({"audio": "1.wav"}, "text: is missing"),
        ({"audio": "1.wav", "text": " "}, "text: is empty"),
        ({"audio": 3, "text": "hello"}, "audio: 3 must be a path"),
        ({"audio": "../1.wav", "text": "hello"}, "outside of the root"),
        ({"audio": "1.wav", "text": "hello", "duration": "1"}, "duration: '1' must be a number"),
        ({"audio": "1.wav", "text": "hello", "duration": True}, "duration: True must be a number"),
        ({"audio": "1.wav", "text": "hello", "duration": 0}, "more than 0 seconds"),
        ({"audio": "1.wav", "text": "hello", "language": 1}, "language: 1 must be text"),
        ({"audio": "1.wav", "text": "hello", "duration": 1e999}, "more than 0 seconds"),
        ({"audio": "1.wav", "text": "hello", "id": []}, "id: .* must be text or a number"),
        ("[" * 10_000, "list.jsonl:1"),
    ],
)
def test_wrong_lines_are_named_and_those_behind_them_read(tmp_path, entry, message):
    path = write_manifest(tmp_path, entry, {"audio": "1.wav", "text": "good"})
    error, good = read_corpus(path, "manifest")
    assert isinstance(error, RecordError) and re.search(message, str(error))
    assert good.text == "good" and good.place.endswith("list.jsonl:2")


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_corpus(tmp_path / "none.jsonl", "manifest"))
    with pytest.raises(UserError, match="is empty"):
        list(read_corpus(write_manifest(tmp_path, ""), "manifest"))
    with pytest.raises(UserError, match="not UTF-8"):
        (tmp_path / "latin.jsonl").write_bytes(b"\xe4")
        list(read_corpus(tmp_path / "latin.jsonl", "manifest"))
    with pytest.raises(UserError, match="unknown layout 'voxforge'"):
        read_corpus(tmp_path, "voxforge")
    with pytest.raises(UserError, match="is for manifests"):
        read_corpus(tmp_path, "aishell", tmp_path)
    with pytest.raises(UserError, match="trans.txt"):
        list(read_corpus(tmp_path, "librispeech"))
    with pytest.raises(UserError, match="no transcript"):
        list(read_corpus(tmp_path, "aishell"))


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "libri/84/1"
    touch(folder / "84-1.trans.txt").write_text("84-1-0000 GO\n84-1-0001\n", encoding="utf-8")
    missing, wordless = read_corpus(tmp_path, "librispeech")
    assert missing.path == folder / "84-1-0000.flac"  # whether it is there is for the build to say
    assert "utterance name and its text" in str(wordless)
    touch(tmp_path / "transcript/a.txt").write_text("A 你好\n", encoding="utf-8")
    with pytest.raises(UserError, match="no wav"):
        list(read_corpus(tmp_path, "aishell"))
    touch(tmp_path / "wav/B.wav")
    with pytest.raises(UserError, match="has the name of a line"):
        list(read_corpus(tmp_path, "aishell"))
