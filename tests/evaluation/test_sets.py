"""Sets of questions read from folders as they are published."""

from __future__ import annotations

import pytest

from tests.data.media import tone, write_wav
from vita_jax.errors import UserError
from vita_jax.evaluation.sets import SETS, evenly, read_aishell, read_query_noise

TRANSCRIPTS = "BAC009S0764W0121 甚至 出现 交易\nBAC009S0765W0122 一二三\nBAC009S0002W0122 训练\n"


def write_aishell(folder, names=("S0764/BAC009S0764W0121", "S0765/BAC009S0765W0122", "S0765/BAC009S0765W0999")):
    """Three recordings of the test split, of which the last has no transcript, as a few of the corpus."""
    (folder / "transcript").mkdir(parents=True)
    (folder / "transcript" / "aishell_transcript_v0.8.txt").write_text(TRANSCRIPTS, encoding="utf-8")
    for name in names:
        path = folder / "wav" / "test" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, tone(0.3))
    return folder


def test_aishell_as_it_is_unpacked(tmp_path):
    write_aishell(tmp_path / "data_aishell")
    for folder in (tmp_path, tmp_path / "data_aishell"):
        questions, root = read_aishell(folder)
        assert root == tmp_path / "data_aishell"
        assert [(q.id, q.truths) for q in questions] == [
            ("BAC009S0764W0121", ("甚至出现交易",)),
            ("BAC009S0765W0122", ("一二三",)),
        ]
        assert questions[0].media == (("audio", "wav/test/S0764/BAC009S0764W0121.wav"),)
    with pytest.raises(UserError, match="give the folder data_aishell of AISHELL-1"):
        read_aishell(tmp_path / "data_aishell" / "wav")
    with pytest.raises(UserError, match="unpack the archives of its speakers"):
        read_aishell(write_aishell(tmp_path / "packed", ()))
    with pytest.raises(UserError, match="has no transcript of a file"):
        read_aishell(write_aishell(tmp_path / "other", ("S1/X",)))


def test_queries_and_noise_by_folder(tmp_path):
    for name in ("query/a.wav", "query/far/b.flac", "noise/hum.WAV", "noise/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    questions, _ = read_query_noise(tmp_path)
    assert [(q.id, q.truths[0], q.category) for q in questions] == [
        ("query/a.wav", "query", "query"),
        ("query/far/b.flac", "query", "query/far"),
        ("noise/hum.WAV", "noise", "noise"),
    ]
    assert [q.id for q in evenly(questions, 2)] == ["query/a.wav", "query/far/b.flac"]
    assert evenly(questions, 9) == questions
    (tmp_path / "noise" / "hum.WAV").unlink()
    with pytest.raises(UserError, match="noise has no sound"):
        read_query_noise(tmp_path)
    assert SETS["query_noise"].scoring == "state"
