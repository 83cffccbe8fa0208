"""The quickstart's speech sets and benchmark: what is written, in which format, and what stays out of training."""

import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.quickstart import build as build_lib
from data_pipelines.quickstart.build import build_quickstart, tokenizer_texts
from data_pipelines.quickstart.questions import KINDS, LANGUAGES, phrasings
from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.sentences import REFUSAL, TRANSCRIBE, split_of
from data_pipelines.quickstart.speech import RECORD_SETS, SPEECH_SETS, build_speech
from data_pipelines.quickstart.speech_benchmark import NOISE_KINDS, TRANSCRIBE_KINDS, plan_benchmark
from data_pipelines.quickstart.speech_sets import (
    ROUNDS,
    SMOKE,
    SPOKEN_KINDS,
    Folder,
    SpeechCounts,
    plan_asr,
    plan_negatives,
    plan_speech_out,
    plan_spoken,
)
from data_pipelines.speech.noises import SYNTHETIC_KINDS, TRAINING_KINDS, UNSEEN_KIND
from data_pipelines.speech.synthesizer import SAMPLE_RATE
from data_pipelines.speech.voices import UNSEEN_VARIANT, assistant_voice, held_out_voices
from vita_jax.data.prompts import preprocess_multimodal, state_labels
from vita_jax.data.spoken_words import answer_aloud, heard
from vita_jax.data.templates import get_template
from vita_jax.errors import UserError

COUNTS = SpeechCounts(16, 72, 4, 6, 8, 8, 2, 2, 4, processes=1)
HELD_OUT = {voice.name for language in LANGUAGES for voice in held_out_voices(language)}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits():
    return load_scan_splits(0)


@pytest.fixture(scope="module")
def built(tmp_path_factory, splits):
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    records = build_speech(folder, splits, COUNTS, 0, lines.append)
    return SimpleNamespace(folder=folder, lines=lines, records=records)


@pytest.fixture(scope="module")
def planned(tmp_path_factory, splits):
    """Larger amounts, planned but not spoken."""
    root = tmp_path_factory.mktemp("planned")
    counts = SpeechCounts(asr=1200, question_clips=144, spoken=40, negatives=300, speech_out=200)
    sets = {name: Folder(root / name, (0, index)) for index, name in enumerate((*SPEECH_SETS, "benchmark", "answers"))}
    plan_asr(sets["asr"], counts.asr)
    plan_spoken(sets["spoken"], splits["train"], counts.spoken, counts.question_clips)
    plan_negatives(sets["negatives"], splits["train"], counts.negatives)
    plan_speech_out(sets["speech_out"], "train", counts.speech_out)
    items = plan_benchmark(sets["benchmark"], sets["asr"], splits["held_out"], counts)
    plan_speech_out(sets["answers"], "held_out", 60)
    return SimpleNamespace(**sets, items=items, counts=counts)


def parts_of(folder):
    return [part for clip in folder.clips for part in clip.parts]


def squeezed(text):
    return heard(text).replace(" ", "")


# ---- what is held out ------------------------------------------------------------------------------------------------


def test_no_held_out_voice_speaks_in_training(planned):
    for name in SPEECH_SETS:
        spoken_by = {f"{d.accent}+{d.variant}" for _, d in parts_of(getattr(planned, name))}
        assert spoken_by and not spoken_by & HELD_OUT
        assert UNSEEN_VARIANT not in {voice.split("+")[1] for voice in spoken_by}
    assert UNSEEN_VARIANT in {d.variant for _, d in parts_of(planned.benchmark)}


def test_no_held_out_sentence_is_said_or_written_in_training(planned):
    said = {squeezed(text) for name in SPEECH_SETS for text, _ in parts_of(getattr(planned, name))}
    new = [i for i in planned.items if i["group"] == "transcribe" and i["kind"] != "new_voice"]
    assert len(new) == 2 * planned.counts.benchmark_transcribe
    assert not {squeezed(item["answer"]) for item in new} & said
    statements = {part for entry in planned.benchmark.manifest if entry["id"].startswith("noise")
                  for part in entry["text"].split(" / ") if part}  # fmt: skip
    assert len(statements) > 50 and not {squeezed(text) for text in statements} & said
    assert all(split_of(text) == "held_out" for text in statements)
    assert not {squeezed(entry["text"]) for entry in planned.answers.manifest} & said


def test_one_kind_of_noise_is_in_the_benchmark_only(planned):
    trained = {clip.kind for clip in planned.negatives.clips} | {clip.background for clip in planned.asr.clips}
    assert UNSEEN_KIND not in trained
    assert set(TRAINING_KINDS) <= trained
    assert UNSEEN_KIND in {clip.kind for clip in planned.benchmark.clips}


def test_what_is_known_and_what_is_new_in_transcriptions(planned):
    kinds = {entry["text"]: entry["kind"] for entry in planned.asr.manifest}
    assert {"sentence", "words", "answer", "question"} == set(kinds.values())
    written = {record["conversations"][1]["value"] for record in planned.asr.records}
    assert written == {text for text, kind in kinds.items() if kind != "words"}
    voices = {entry["id"]: set(entry["voices"]) for entry in planned.benchmark.manifest}
    for item in planned.items:
        if item["group"] == "transcribe":
            assert (item["answer"] in kinds) == (item["kind"] == "new_voice")
            assert kinds.get(item["answer"]) in ("sentence", "answer", None)
            assert bool(voices[item["id"]] & HELD_OUT) == (item["kind"] != "new_sentence")
        else:
            assert voices[item["id"]] <= HELD_OUT


def test_items_are_balanced(planned):
    counts = planned.counts
    wanted = {("spoken", kind): counts.benchmark_spoken for kind in KINDS}
    wanted |= {("noise", kind): counts.benchmark_noise for kind in NOISE_KINDS}
    wanted |= {("transcribe", kind): counts.benchmark_transcribe for kind in TRANSCRIBE_KINDS}
    for (group, kind), count in wanted.items():
        items = [item for item in planned.items if (item["group"], item["kind"]) == (group, kind)]
        assert len(items) == count
        assert {sum(item["language"] == language for item in items) for language in LANGUAGES} == {count // 2}
        if group == "spoken":
            assert {sum(i["num_digits"] == n for i in items) for n in (1, 2, 3, 4)} == {count // 4}
        if group == "noise":
            assert sum("image" in item for item in items) == count // 2
    assert len(planned.items) == sum(wanted.values())


# ---- what training gets ----------------------------------------------------------------------------------------------


def test_vocabulary_of_the_transcripts(planned):
    texts = {language: "\n".join(e["text"] for e in planned.asr.manifest if e["language"] == language)
             for language in LANGUAGES}  # fmt: skip
    assert len(set(texts["en"].split())) >= 300
    assert len({c for c in texts["zh"] if "\u4e00" <= c <= "\u9fff"}) >= 200
    assert [e["language"] for e in planned.asr.manifest].count("en") == planned.counts.asr // 2
    assert all(e["text"] == heard(e["text"]) for e in planned.asr.manifest)


def test_about_half_of_the_questions_are_spoken(planned):
    spoken = 0
    asked = {text for language in LANGUAGES for text in phrasings(SPOKEN_KINDS, language)}
    for record in planned.spoken.records:
        questions = [turn["value"] for turn in record["conversations"][::2]]
        assert len(questions) == ROUNDS and questions[0].startswith("<image>\n")
        assert "".join(questions).count("<audio>") == len(record["audio"]) >= 1
        assert all(q.replace("<image>\n", "") in asked | {"<audio>"} for q in questions)
        spoken += len(record["audio"])
    assert spoken / (ROUNDS * len(planned.spoken.records)) == pytest.approx(0.5, abs=0.1)
    assert {text for text, d in parts_of(planned.spoken)} >= asked


def test_the_recording_asks_the_question_that_is_answered(planned):
    """Spoken and typed rounds of one kind of question have the same kind of answer, per language."""
    said = {f"media/{i:06d}.wav": clip.parts[0][0] for i, clip in enumerate(planned.spoken.clips)}
    colours = set(phrasings(["ink", "paper"], "zh"))
    for record in planned.spoken.records:
        audio = iter(record["audio"])
        turns = [turn["value"] for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = said[next(audio)] if "<audio>" in question else question.replace("<image>\n", "")
            assert (text in colours) == (answer.endswith("色") and ":" not in answer)


def test_negatives_are_marked_as_noise(planned):
    template = get_template("qwen2p5_instruct")
    after_question = 0
    for record in planned.negatives.records:
        turns, inserted = record["conversations"], record["inserted_id"]
        assert turns[inserted]["value"] in REFUSAL.values() and inserted == len(turns) - 1
        assert state_labels(turns, inserted) == [-102]
        tiles = [1] if "image" in record else []
        prepared = preprocess_multimodal(turns, template, tiles, inserted_id=inserted)
        assert prepared[inserted]["value"].startswith(template.state_symbols.noise)
        if inserted == 3:
            after_question += 1
            assert prepared[1]["value"].startswith(template.state_symbols.text)
    with_picture = sum("image" in record for record in planned.negatives.records)
    assert 0.25 < with_picture / 300 < 0.55 and 0.3 < after_question / with_picture < 0.7
    kinds = [clip.kind for clip in planned.negatives.clips]
    assert np.mean([kind == "speech" for kind in kinds]) == pytest.approx(0.5, abs=0.1)
    assert np.mean([kind in SYNTHETIC_KINDS for kind in kinds]) == pytest.approx(0.25, abs=0.1)


def test_the_assistant_has_one_voice_and_says_what_is_written(planned):
    for folder in (planned.speech_out, planned.answers):
        for language in LANGUAGES:
            entries = [e for e in folder.manifest if e["language"] == language]
            assert len(entries) == len(folder.manifest) // 2 == len({e["written"] for e in entries})
            assert sum(e["kind"] == "answer" for e in entries) == len(entries) // 2
            assert all(e["text"] == answer_aloud(e["written"], language) for e in entries if e["kind"] == "answer")
            assert all((e["kind"] == "answer") == ("question" in e) for e in entries)
        assert {f"{d.accent}+{d.variant}" for _, d in parts_of(folder)} == {
            assistant_voice(language).name for language in LANGUAGES
        }
        assert not any(clip.varied or clip.augmented for clip in folder.clips)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_every_path_is_a_recording_or_picture_and_none_is_left_over(built):
    for folder in (*(built.folder / "raw" / name for name in SPEECH_SETS), built.folder / "benchmarks" / "speech"):
        named = set()
        for path in folder.glob("*.json*"):
            entries = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else read_lines(path)
            for entry in entries:
                audio = entry["audio"] if isinstance(entry["audio"], list) else [entry["audio"]]
                named |= {*audio, *([entry["image"]] if "image" in entry else [])}
        files = {str(path.relative_to(folder)) for path in (folder / "media").iterdir()}
        # Not every recording of a question is drawn for one of these few records.
        assert named == files if folder.name != "spoken" else named <= files
        for path in folder.glob("media/*.wav"):
            with wave.open(str(path)) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
                assert 0.3 < file.getnframes() / SAMPLE_RATE < 6
    assert built.lines[-1].startswith("speech: clips of asr 16, spoken 72, negatives 6, speech_out 8; benchmark")


def test_manifests_and_records_agree(built):
    folder = built.folder / "raw" / "asr"
    records, manifest = json.loads((folder / "records.json").read_text("utf-8")), read_lines(folder / "manifest.jsonl")
    assert len(manifest) == COUNTS.asr
    asked = [entry for entry in manifest if entry["kind"] != "words"]  # which only the recogniser hears
    assert len(records) == len(asked) < len(manifest)
    for record, entry in zip(records, asked, strict=True):
        assert (record["id"], record["audio"]) == (entry["id"], entry["audio"])
        request, answer = (turn["value"] for turn in record["conversations"])
        assert answer == entry["text"]
        assert request.removeprefix("<audio>\n") in TRANSCRIBE[entry["language"]]
        with wave.open(str(folder / entry["audio"])) as file:
            assert file.getnframes() / SAMPLE_RATE == pytest.approx(entry["duration"], abs=1e-3)


def test_the_same_seed_writes_the_same_bytes(built, tmp_path, splits):
    build_speech(tmp_path, splits, COUNTS, 0, lambda line: None)
    for path in built.folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(built.folder)).read_bytes() == path.read_bytes(), path
    other = Folder(tmp_path / "other", (1, 10))
    plan_asr(other, 16)
    assert [e["text"] for e in other.manifest] != [r["text"] for r in read_lines(tmp_path / "raw/asr/manifest.jsonl")]


def test_impossible_amounts_are_refused(tmp_path, splits):
    with pytest.raises(UserError, match="negatives=0"):
        build_speech(tmp_path, splits, SpeechCounts(negatives=0), 0)
    with pytest.raises(UserError, match="question_clips=10"):
        plan_spoken(Folder(tmp_path / "spoken", (0,)), splits["train"], 4, 10)
    small = Folder(tmp_path / "asr", (0,))
    plan_asr(small, 4)
    with pytest.raises(UserError, match="make asr larger"):
        plan_benchmark(Folder(tmp_path / "benchmark", (0,)), small, splits["held_out"], SMOKE)


# ---- with the pictures -----------------------------------------------------------------------------------------------

VISION = {"text": 2, "cells": 1, "captions": 1, "pictures": 1, "clips": 0} | {
    "typed": 1, "typed_unseen_writers": 1, "text_only": 1, "video_order": 0,
}  # fmt: skip


def test_speech_is_built_on_request_and_packed(tmp_path, monkeypatch):
    packed, spoken = [], {"records": [{"conversations": [{"from": "human", "value": "<image>\n<audio>\nWrite."}]}]}

    def pack(source, output):
        assert source.root == source.path.parent
        packed.append((source.path.parent.name, output.name))
        return SimpleNamespace(counts={})

    def speak(folder, splits, counts, seed, progress):
        spoken["counts"] = counts
        return spoken["records"]

    monkeypatch.setattr(build_lib, "build_records", pack)
    monkeypatch.setattr(build_lib, "build_speech", speak)
    lines = []
    build_quickstart(tmp_path, VISION, 0, lines.append)
    assert "counts" not in spoken and not {name for name, _ in packed} & set(RECORD_SETS)
    build_quickstart(tmp_path, VISION, 0, lines.append, speech=SMOKE)
    assert spoken["counts"] == SMOKE
    assert [pair for pair in packed if pair[0] in RECORD_SETS] == [(name, name) for name in RECORD_SETS]
    assert '"Write."' in (tmp_path / "tokenizer_text.txt").read_text("utf-8").splitlines()
    build_quickstart(tmp_path, VISION, 0, lines.append, speech=SpeechCounts(**{**vars(SMOKE), "processes": 3}))
    assert lines[-1].endswith("is up to date")


def test_placeholders_are_no_text_for_the_tokenizer():
    record = {
        "conversations": [{"from": "human", "value": "<image>\n<audio>"}, {"from": "gpt", "value": "Not for me."}]
    }
    assert {"Not for me."} <= set(tokenizer_texts([record]))
    assert not any("<" in text for text in tokenizer_texts([record]))
