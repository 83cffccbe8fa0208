"""Transcripts as characters, and batches of transcribed clips."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest

from vita_jax.data.ctc_vocabulary import (
    WORD_COUNT,
    CtcVocabulary,
    build_ctc_vocabulary,
    load_ctc_vocabulary,
    normalise_transcript,
)
from vita_jax.data.lanes import Reading
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import SpokenText
from vita_jax.data.recognition import RecognitionShape, make_recognition_loader, recognition_element, recognition_row
from vita_jax.data.records import RecordError
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import log_mel

VOCABULARY = build_ctc_vocabulary(["abc", "你好 a"], size=16)
SHAPE = RecognitionShape(frames=60)


def write(path, seconds, rate=16_000):
    samples = np.random.default_rng(len(path.name)).integers(-3000, 3000, int(seconds * rate))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return samples.astype(np.float32) / 32768


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How many digits are there?", "how many digits are there"),
        ("  It's  A\ttest. ", "it's a test"),
        ("这里写了几个数字？", "这里写了几个数字"),
        ("你 好，世界", "你好世界"),
        ("第２ a", "第2 a"),
        ("...", ""),
    ],
)
def test_transcripts_are_compared_without_case_and_punctuation(text, expected):
    assert normalise_transcript(text) == expected
    assert normalise_transcript(expected) == expected


def test_vocabulary_goes_both_ways_and_through_a_file(tmp_path):
    assert len(VOCABULARY) == 1 + len("abc你好 ")
    ids = VOCABULARY.encode("CAB 你好!")
    assert min(ids) > 0
    assert VOCABULARY.decode([0, *ids, 99]) == "cab你好"
    assert VOCABULARY.decode(VOCABULARY.encode("ab 你 c")) == "ab你 c"
    VOCABULARY.save(tmp_path / "v.json")
    assert load_ctc_vocabulary(tmp_path / "v.json") == VOCABULARY


def test_frequent_words_are_units_and_others_are_spelt():
    texts = ["the cat 看 the dog"] * WORD_COUNT + ["a cat"]
    vocabulary = build_ctc_vocabulary(texts, size=40)
    assert [unit for unit in vocabulary.units if len(unit) > 1] == [" cat", " dog", " the"]
    ids = vocabulary.encode("The dog, a cat 看")
    assert [vocabulary.units[i - 1] for i in ids] == [" the", " dog", " ", "a", " cat", "看"]
    assert vocabulary.decode(ids) == "the dog a cat看"
    # " the" is the most frequent; there is no room for the others.
    assert [u for u in build_ctc_vocabulary(texts, size=12).units if len(u) > 1] == [" the"]


def test_vocabulary_errors(tmp_path):
    with pytest.raises(UserError, match="'xy'"):
        VOCABULARY.encode("abxy")
    with pytest.raises(UserError, match="at least 5"):
        build_ctc_vocabulary(["abc"], size=3)
    with pytest.raises(UserError, match="no characters"):
        build_ctc_vocabulary(["?!"], size=3)
    with pytest.raises(UserError, match="missing.json"):
        load_ctc_vocabulary(tmp_path / "missing.json")
    for content in ('{"a": 1}', '["a", 3]', '["a", "a"]', '[""]', '"ab"'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="bad.json"):
            load_ctc_vocabulary(tmp_path / "bad.json")


def test_an_element_holds_features_and_characters(tmp_path):
    samples = write(tmp_path / "a.wav", 0.4)
    element = recognition_element(SpokenText("line 1", tmp_path / "a.wav", "abc"), SHAPE, VOCABULARY)
    np.testing.assert_array_equal(element["features"], log_mel(samples))  # 25 ms windows every 10 ms: 38 frames
    assert VOCABULARY.decode(element["targets"].tolist()) == "abc"
    chinese = recognition_element(SpokenText("line 2", tmp_path / "a.wav", "a你好"), SHAPE, VOCABULARY)
    assert VOCABULARY.decode(chinese["targets"].tolist()) == "a你好"


def test_a_row_joins_clips_and_spreads_their_characters():
    frames = [23, 31]
    padded = SHAPE.frames - sum(frames)
    packed = {
        "features": np.arange(SHAPE.frames * 80, dtype=np.float32).reshape(-1, 80),
        "features_segment_ids": np.repeat([1, 2, 0], [*frames, padded]),
        "targets": np.array([1, 2, 3, 4, 5, *[0] * (SHAPE.targets - 5)], np.int32),
        "targets_segment_ids": np.array([1, 1, 2, 2, 2, *[0] * (SHAPE.targets - 5)]),
    }
    row = recognition_row(packed)
    assert (row["lengths"], row["target_lengths"]) == (54, 5)
    # 23 frames make 5 frames of the encoder; the second clip begins with frame 23, so with encoder frame 6, and has 7.
    assert row["frame_targets"].tolist() == [1, 1, 2, 2, 2, -1, 3, 3, 4, 4, 4, 5, 5, -1]


@pytest.mark.parametrize(
    ("seconds", "text", "category"),
    [
        (0.4, "xyz", "unknown character"),
        (0.4, "?", "no text"),
        (0.4, "abc" * 9, "infeasible"),
        (0.4, "aabbccaa", "infeasible"),
        (2.0, "abc", "too long"),
        (0.05, "abc", "too short"),
    ],
)
def test_unusable_clips_say_why(tmp_path, seconds, text, category):
    write(tmp_path / "a.wav", seconds)
    with pytest.raises(RecordError) as caught:
        recognition_element(SpokenText("line 7", tmp_path / "a.wav", text), SHAPE, VOCABULARY)
    assert caught.value.category == category
    assert "line 7" in str(caught.value)


def test_batches_leave_out_bad_clips_and_resume(tmp_path):
    rows = []
    for number in range(8):
        write(tmp_path / f"{number}.wav", 0.3 + 0.02 * number)
        rows.append({"audio": f"{number}.wav", "text": "ab c" if number != 5 else "ab x"})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert CtcVocabulary((" ", "a", "b", "c")).encode("abc") == [1, 2, 3, 4]
    vocabulary = build_ctc_vocabulary(["a b c"], 8)

    def loader():
        options = {"batch_size": 3, "reading": Reading(0), "max_bad_fraction": 0.5}
        return make_recognition_loader([SourceConfig(str(tmp_path))], SHAPE, vocabulary, seed=1, **options)

    stream = loader()
    batches = [next(stream) for _ in range(4)]
    state = stream.get_state()
    expected = next(stream)
    assert stream.counts.bad >= 1
    assert stream.counts.reasons.keys() == {"unknown character"}
    assert batches[0]["features"].shape == (3, 60, 80)
    assert batches[0]["frame_targets"].shape == (3, 14)
    stream.close()
    again = loader()
    again.set_state(state)
    got = next(again)
    assert all(np.array_equal(got[key], expected[key]) for key in expected)
    again.close()


def test_rows_carry_the_tokens_of_the_language_model_where_they_are_wanted(tmp_path):
    texts = ["ab", "ca", "b"] * 3
    tokenizer = train_sentencepiece([*texts, "Ab, C!"], 330, None, at_most=True)
    rows = []
    for number, text in enumerate(texts):
        write(tmp_path / f"{number}.wav", 0.24 + 0.002 * number)
        rows.append({"audio": f"{number}.wav", "text": text.title() + "!"})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"batch_size": 2, "reading": Reading(0), "max_bad_fraction": 0.0}
    vocabulary = build_ctc_vocabulary(texts, 8)
    stream = make_recognition_loader([SourceConfig(str(tmp_path))], SHAPE, vocabulary, tokenizer, seed=1, **options)
    batch = next(stream)
    stream.close()
    joined = 0
    for row in range(2):
        # As they are written, with case and punctuation, while the head's units are those of the normalised text.
        written = tokenizer.decode(batch["token_targets"][row, : batch["token_lengths"][row]].tolist())
        said = vocabulary.decode(batch["targets"][row, : batch["target_lengths"][row]].tolist())
        assert normalise_transcript(written.replace("!", " ")).replace(" ", "") == said.replace(" ", "")
        assert not np.any(batch["token_targets"][row, batch["token_lengths"][row] :])
        joined += written.count("!")
    assert joined > 2  # more clips than rows


def test_clips_too_short_for_the_encoder_are_refused():
    with pytest.raises(UserError, match="6 frames"):
        RecognitionShape(6)
