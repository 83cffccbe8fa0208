"""TensorFlow Datasets as records: files as tfds prepares them, its mock data, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines import tfds_source
from data_pipelines.build import main
from data_pipelines.records import build_records
from data_pipelines.tfds_source import TfdsSource
from tests.data.media import tone, write_png
from vita_jax.data.audio import AudioConfig, read_audio
from vita_jax.data.images import open_image
from vita_jax.data.manifests import read_manifest
from vita_jax.data.records import RecordError, decode_record, load_manifest
from vita_jax.data.speech_pairs import read_wave
from vita_jax.errors import UserError

CAPTIONS = [["a red square", "red"], ["a blue one"], []]


@pytest.fixture
def prepared(tmp_path):
    """Folder of a data set as tfds leaves it: three pictures with their captions, the last without any."""
    folder = tmp_path / "tfds" / "squares" / "1.0.0"
    folder.mkdir(parents=True)
    text = tfds.features.Sequence({"text": tfds.features.Text()})
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "captions": text})
    features.save_config(folder)
    split = {"name": "train", "shardLengths": [str(len(CAPTIONS))], "numBytes": "1000"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "squares", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    writer = ArrayRecordWriter(str(folder / "squares-train.array_record-00000-of-00001"), "group_size:1")
    for number, captions in enumerate(CAPTIONS):
        write_png(tmp_path / f"{number}.png", 8 + number, 6, number)
        example = {"image": str(tmp_path / f"{number}.png"), "captions": {"text": captions}}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    return folder


def stored(folder):
    names = [str(folder / shard.name) for shard in load_manifest(folder).shards]
    return [decode_record(data) for data in ArrayRecordDataSource(names)]


def test_a_prepared_data_set_becomes_records_with_its_own_bytes(prepared, tmp_path, capsys):
    output = tmp_path / "out"
    line = ["records", "--tfds", str(prepared), "--image", "image", "--answer", "captions/text", "--question", "What?"]
    assert main([*line, "--output", str(output), "--max-bad-fraction", "0.4"]) == 0
    assert "2 records, 2 rounds, 2 images" in capsys.readouterr().out
    first, second = stored(output)
    assert [turn["value"] for turn in first.conversations] == ["<image>\nWhat?", "a red square"]
    assert first.media[0].data == (tmp_path / "0.png").read_bytes() and second.conversations[1]["value"] == "a blue one"
    reject = json.loads((output / "rejects.jsonl").read_text())
    assert reject["record"] == 2 and "answer is empty" in reject["reason"]
    manifest = load_manifest(output)
    assert manifest.source.startswith("tfds:") and manifest.options["answer"] == "captions/text"
    again = main([*line, "--output", str(output), "--max-bad-fraction", "0.4"])
    assert again == 0 and "up to date" in capsys.readouterr().err
    assert "tensorflow" not in sys.modules


def test_mock_data_of_a_known_set(tmp_path):
    digits = [{"image": np.full((28, 28, 1), 40 * i, np.uint8), "label": np.int64(i)} for i in range(5)]
    tfds_source._open.cache_clear()
    # Its own random pictures cannot be left encoded without TensorFlow.
    with tfds.testing.mock_data(as_data_source_fn=lambda builder, **_: digits):
        source = TfdsSource("mnist", image="image", question="Which digit is this?", answer="label")
        manifest = build_records(source, tmp_path / "out", shards=2)
    tfds_source._open.cache_clear()
    assert manifest.counts["images"] == 5 and [shard.records for shard in manifest.shards] == [3, 2]
    records = stored(tmp_path / "out")
    assert [record.conversations[1]["value"] for record in records] == ["0", "2", "4", "1", "3"]
    assert np.asarray(open_image(records[1].media[0].data, name="two"))[0, 0].tolist() == [80, 80, 80]


@pytest.mark.parametrize("scale", [1, 32767])
def test_sound_is_stored_with_its_rate(monkeypatch, scale):
    """Sound needs TensorFlow, which tests do without: the data set is stood in for by what it gives."""
    samples = (tone() * scale).astype(np.int64 if scale > 1 else np.float32)
    features = {"speech": SimpleNamespace(sample_rate=16000), "text": SimpleNamespace()}
    monkeypatch.setattr(tfds_source, "_open", lambda *_: ([{"speech": samples, "text": b"HELLO"}], features, "0"))
    source = TfdsSource("librispeech")
    source.check()
    record = source.checked(0, 0).with_media()
    assert [turn["value"] for turn in record.conversations] == ["<audio>\nWrite down what you hear.", "HELLO"]
    heard = read_audio(record.media[0].data, AudioConfig(), name="speech")
    np.testing.assert_allclose(heard, tone(), atol=1e-4)
    with wave.open(io.BytesIO(record.media[0].data)) as file:
        assert file.getframerate() == 16000
    with pytest.raises(RecordError, match="is no text"):
        TfdsSource("any", question="What?", answer="speech").checked(0, 0)


def test_labels_that_are_none_and_sound_of_two_channels(monkeypatch):
    label = SimpleNamespace(num_classes=2, int2str=lambda value: ["cat", "dog"][value])
    stereo = np.stack([100 * np.ones(800, np.int64), -300 * np.ones(800, np.int64)], 1)
    elements = [{"label": np.int64(1), "speech": stereo}, {"label": np.int64(-1), "speech": stereo}]
    features = {"label": label, "speech": SimpleNamespace(sample_rate=16000)}
    monkeypatch.setattr(tfds_source, "_open", lambda *_: (elements, features, "0"))
    source = TfdsSource("any", audio="speech", answer="label")
    record = source.checked(0, 0).with_media()
    assert record.conversations[1]["value"] == "dog"
    heard = read_audio(record.media[0].data, AudioConfig(), name="speech")
    np.testing.assert_allclose(heard, -100 / 32768, atol=1e-6)
    with pytest.raises(RecordError, match="is no text in UTF-8, no class"):
        source.checked(1, 1)


def test_what_is_missing_is_named(prepared):
    good = {"image": "image", "question": "What?", "answer": "captions/text"}
    for change, message in (
        ({"answer": "caption"}, "has no feature 'caption'; it has captions, image"),
        ({"answer": "captions/words"}, "has no feature 'captions/words'"),
        ({"split": "test"}, "split test: "),
        ({"dataset": str(prepared.parent)}, "data set "),
    ):
        with pytest.raises(UserError, match=message):
            TfdsSource(**{"dataset": str(prepared), **good, **change}).check()
    with pytest.raises(UserError, match="say which feature is the answer"):
        TfdsSource("mnist", image="image", question="Which?")
    with pytest.raises(UserError, match="say what is asked"):
        TfdsSource("mnist", image="image", answer="label")
    assert TfdsSource("coco_captions/2014:1.1.0").answer == "captions/text"


def test_sound_of_a_data_set_becomes_a_manifest(monkeypatch, tmp_path, capsys):
    elements = [
        {"speech": (tone(0.2 + 0.1 * n) * 32767).astype(np.int64), "text": f"TEXT {n}".encode()} for n in range(3)
    ]
    elements.append({"speech": np.zeros(0, np.int64), "text": b"NOTHING"})
    features = {"speech": SimpleNamespace(sample_rate=16000), "text": SimpleNamespace()}
    monkeypatch.setattr(tfds_source, "_open", lambda *_: (elements, features, "0"))
    line = ["recordings", "--tfds", "librispeech", "--output", str(tmp_path / "out")]
    assert main(line) == 2
    assert "1 of 4 recordings rejected" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*line, "--max-bad-fraction", "0.3"]) == 0
    assert "3 recordings" in capsys.readouterr().out
    pairs = read_manifest(tmp_path / "out")
    assert [pair.text for pair in pairs] == ["TEXT 0", "TEXT 1", "TEXT 2"]
    np.testing.assert_allclose(read_wave(pairs[2].audio, 16_000), tone(0.4), atol=1e-4)
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert reject["category"] == "damaged media" and "record 3" in reject["reason"]
    for more, message in (
        (["--tfds", "librispeech", "--layout", "manifest"], "--layout says nothing beside --tfds"),
        (["--from", "x", "--layout", "manifest", "--split", "test"], "--split says nothing beside --from"),
        (["--from", "x"], "--from needs --layout"),
        (["--tfds", "mine", "--answer", "text"], "say which feature is the sound"),
    ):
        assert main(["recordings", *more, "--output", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
