"""`experiments/own_data.py` on recordings and records unlike the quickstart's: which stages come of which data."""

from __future__ import annotations

import dataclasses
import io
import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.media import talk, tone, write_wav
from tests.training.hearing import hearing_model
from tests.training.llava import llava_records
from tests.training.records import prepare_records
from tests.training.voice import CODEC, SPEECH, training
from vita_jax import chat, train
from vita_jax.config import apply_overrides, load_module
from vita_jax.data.images import ImageConfig
from vita_jax.data.manifests import SpokenText, read_manifest
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.session import Session
from vita_jax.models.lora import detach
from vita_jax.training import loop
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import CTC_VOCABULARY, ExperimentConfig, data_folder, tokenizer_folder, validate
from vita_jax.training.stages import flatten, starts_of

own_data = load_module(str(Path(__file__).parents[1] / "experiments" / "own_data.py"))

ANIMALS = ("котёнок", "щенок", "ёж")


def write_flac(path: Path, samples: np.ndarray, rate: int) -> None:
    """(n,) floats as FLAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.round(samples[None] * 32767).astype(np.int16), "s16", "mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """`lists/heard.jsonl` (48 kHz stereo), `voice/texts.jsonl` (FLAC), and records with and without media."""
    root = tmp_path_factory.mktemp("mine")
    heard, voice, seen, spoken, plain = [], [], [], [], []
    for number in range(6):
        animal = ANIMALS[number % 3]
        sound = tone(0.6, 48_000, 300.0 + 100 * number)
        write_wav(root / "recordings" / f"clip {number}.wav", np.stack([sound, 0 * sound]), 48_000)
        heard.append({"audio": f"../recordings/clip {number}.wav", "text": f"{animal.title()}, да!"})
        write_flac(root / "voice" / "takes" / f"{number}.flac", tone(0.3, 22_050, 200.0), 22_050)
        voice.append({"audio": f"takes/{number}.flac", "text": f"Это {animal}: {number}."})
        Image.new("RGB", (20 + number, 40), (40 * number, 0, 90)).save(root / f"{number}.jpg")
        asked = talk("<image>\nКто?", f"Это {animal}.")
        seen.append({"id": number, "image": f"{number}.jpg", "conversations": asked})
        answered = talk("<audio>", f"Это {animal}.")
        spoken.append({"id": number, "audio": f"recordings/clip {number}.wav", "conversations": answered})
        plain.append({"id": number, "conversations": talk("Кто?", animal)})
    (root / "lists").mkdir()
    for path, lines in ((root / "lists" / "heard.jsonl", heard), (root / "voice" / "texts.jsonl", voice)):
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    for name, records in (("seen", seen), ("spoken", spoken), ("plain", plain), ("all", seen + spoken + plain)):
        (root / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return root


def config_for(run_dir: Path, **data: str) -> ExperimentConfig:
    """The smoke configuration with a tiny model and short stages, on some data."""
    config = own_data.get_config("smoke")
    codec = dataclasses.replace(training(), discriminators=None)  # they take most of the time to compile
    model = hearing_model(4096, codec=CODEC, speech=SPEECH, codec_training=codec, ctc_vocab_size=0)
    sizes = {"own_data": {"row_length": 96, "row_tiles": 2, "row_clips": 2, "clip_frames": 80}}
    sizes |= {"speech_encoder": {"row_length": 80, "clip_frames": 80}}
    sizes |= {"codec": {"codec_frames": 8}, "speech_decoders": {"codec_frames": 60, "row_length": 40}}
    stages = tuple(dataclasses.replace(stage, steps=2, **sizes[stage.name]) for stage in config.stages)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        model=model,
        image=ImageConfig(image_size=model.vision.image_size, max_tiles=1),
        data=dataclasses.replace(config.data, **data),
        stages=stages,
    )


def places(source: Path, *kinds: str, records: str = "all") -> dict[str, str]:
    """Fields of `data`."""
    known = {
        "json": {"json": str(source / f"{records}.json"), "root": str(source)},
        "asr": {"asr": str(source / "lists" / "heard.jsonl")},
        "speech": {"speech": str(source / "voice" / "texts.jsonl")},
    }
    return {field: value for kind in kinds for field, value in known[kind].items()}


@pytest.mark.parametrize("size", ["smoke", "small", "full"])
def test_all_sizes_are_valid(size):
    validate(own_data.get_config(size), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "--config.data.asr=MANIFEST.jsonl"),
        ({"json": "a.json"}, "given without --config.data.root=DIR"),
        ({"root": "a"}, "given without --config.data.json=FILE"),
        ({"asr": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
    ],
)
def test_missing_data_is_said(data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        own_data.prepare(config_for(tmp_path / "run", **data))


def test_transcripts_alone_give_a_recogniser(source, tmp_path):
    prepared = own_data.prepare(config_for(tmp_path / "run", **places(source, "asr")))
    assert [stage.name for stage in prepared.stages] == ["speech_encoder"]
    model = prepared.model
    assert (model.codec, model.speech, model.state_head) == (None, None, None) and model.audio is not None
    letters = set("".join(ANIMALS) + " да")
    assert model.ctc_vocab_size == len(letters) + 1
    pairs = read_manifest(data_folder(prepared) / own_data.TRANSCRIBED)
    assert len(pairs) == 6 and all(pair.audio.is_file() for pair in pairs)
    assert own_data.prepare(config_for(tmp_path / "run", **places(source, "asr"))) == prepared
    many = [SpokenText("", Path(), f"word{n // 60} ") for n in range(60 * 900)]
    (tmp_path / "many" / "data").mkdir(parents=True)
    rows = own_data._with_recogniser(config_for(tmp_path / "many"), many).model.ctc_vocab_size
    assert rows == own_data.CTC_ROWS  # however many words are frequent
    few = config_for(tmp_path / "other", **places(source, "asr"))
    few = dataclasses.replace(few, model=dataclasses.replace(few.model, ctc_vocab_size=5))
    with pytest.raises(UserError, match=f"ctc_vocab_size to at least {len(letters) + 1}"):
        own_data.prepare(few)


def test_a_voice_alone_and_with_transcripts(source, tmp_path):
    prepared = own_data.prepare(config_for(tmp_path / "a", **places(source, "speech")))
    assert {stage.name: starts_of(stage) for stage in prepared.stages} == {"codec": (), "speech_decoders": ("codec",)}
    assert prepared.model.audio is None and prepared.model.ctc_vocab_size == 0
    texts = [pair.text for pair in read_manifest(data_folder(prepared) / own_data.VOICE)]
    assert texts[:2] == ["это котёнок zero", "это щенок one"]
    ids = load_tokenizer(tokenizer_folder(prepared)).encode(texts[0], add_bos=False)
    assert 0 < len(ids) < len(texts[0])
    both = own_data.prepare(config_for(tmp_path / "b", **places(source, "speech", "asr")))
    assert starts_of(both.stages[-1]) == ("speech_encoder", "codec")


@pytest.mark.parametrize(
    ("records", "kinds", "trained"),
    [
        ("plain", ("json",), ("^language/",)),
        ("seen", ("json",), ("^vision/", "^projector/", "^language/")),
        ("spoken", ("json",), ("^language/", "^audio/", "^state_head/")),
        ("spoken", ("json", "asr"), ("^language/", "^audio/adapter/", "^state_head/")),
        ("plain", ("json", "asr"), ("^language/",)),
    ],
)
def test_records_train_what_they_show(records, kinds, trained, source, tmp_path):
    prepared = own_data.prepare(config_for(tmp_path / "run", **places(source, *kinds, records=records)))
    stage = prepared.stage("own_data")
    assert stage.trainable == trained
    assert bool(stage.row_tiles) == (records == "seen")
    assert bool(stage.row_clips) == stage.state_labels == (records == "spoken")
    assert (prepared.model.audio is not None) == (records == "spoken" or "asr" in kinds)
    assert starts_of(stage) == (("speech_encoder",) if "asr" in kinds else ())
    validate(prepared, 1)


@pytest.mark.slow
def test_adapters_for_a_model_that_is_there_already(source, tmp_path, capsys):
    """The command of the README, at size smoke: on a run, and on that as an exported folder."""
    base = own_data.prepare(config_for(tmp_path / "base", **places(source, "json", "asr")))
    loop.run(base, stream=io.StringIO())
    vocabulary = tmp_path / "base" / "data" / CTC_VOCABULARY
    arguments = [f"--config={own_data.__file__}", "--config.size=smoke", "--config.stages.own_data.steps=2"]
    arguments += [f"--config.data.{field}={value}" for field, value in places(source, "json", records="seen").items()]
    arguments += ["--config.stages.own_data.trainable=", "--config.stages.own_data.lora.rank=2"]
    run_dir = tmp_path / "adapted"
    start = f"--config.stages.own_data.start_from={tmp_path / 'base'}"
    assert train.main([*arguments, start, f"--config.run_dir={run_dir}"]) == 0
    assert "language   " in capsys.readouterr().out
    loaded, before = load_params(run_dir), load_params(tmp_path / "base")
    assert loaded.config.model == before.config.model and loaded.config.model.audio is not None
    assert loaded.config.stage("own_data").lora.rank == 2
    assert (run_dir / CTC_VOCABULARY).read_bytes() == vocabulary.read_bytes()
    same, adapters = detach(loaded.params)
    assert len(flatten(adapters)) == 7 * 3
    for path, leaf in flatten(before.params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(same)[path]).tobytes(), path
    session = Session.load(run_dir)
    assert session.tokenizer.vocab_size == Session.load(tmp_path / "base").tokenizer.vocab_size
    assert isinstance("".join(session.ask("Кто?", [str(source / "1.jpg")], [])), str)


def test_a_llava_that_is_there_already(source, tmp_path):
    base = llava_records(tmp_path / "base")
    prepare_records(base, ["</s>"])
    loop.run(base, stream=io.StringIO())
    config = config_for(tmp_path / "run", **places(source, "json", records="seen"))
    config = dataclasses.replace(config, image=own_data.get_config(config.size).image)  # as it is without being set
    prepared = own_data.prepare(apply_overrides(config, {"stages.own_data.start_from": str(base.run_dir)}))
    assert (prepared.model, prepared.prompt, prepared.image) == (base.model, base.prompt, base.image)
    assert prepared.stage("own_data").trainable == ("^projector/", "^language/")
    loop.run(prepared, stream=io.StringIO())
    before, after = (flatten(load_params(run_dir).params) for run_dir in (base.run_dir, prepared.run_dir))
    for path, leaf in before.items():
        same = np.asarray(leaf).tobytes() == np.asarray(after[path]).tobytes()
        assert same == path.startswith("vision/"), path


def test_adapters_take_the_place_of_the_language_model(source, tmp_path):
    config = config_for(tmp_path / "run", **places(source, "json", records="seen"))
    config = apply_overrides(config, {"stages.own_data.lora.rank": "4"})
    assert own_data.prepare(config).stage("own_data").trainable == ("^vision/", "^projector/")
    plain = config_for(tmp_path / "plain", **places(source, "json", records="plain"))
    plain = own_data.prepare(apply_overrides(plain, {"stages.own_data.lora.rank": "4"}))
    loop.run(plain, stream=io.StringIO())
    assert len(flatten(detach(load_params(plain.run_dir).params)[1])) == 7 * 3


@pytest.mark.slow
def test_everything_trains_and_answers_aloud(source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    prepared = own_data.prepare(config_for(run_dir, **places(source, "json", "asr", "speech")))
    loop.run(prepared, stream=io.StringIO())
    session = Session.load(run_dir)
    assert all(session.has(name) for name in ("language", "vision", "audio", "ctc_head", "codec", "speech"))
    assert session.ctc_vocabulary_file is not None and list(session.speakers) == ["en"]
    samples, rate = session.say("Это ёж, да.", "en")
    assert rate == CODEC.sampling_rate and len(samples) % CODEC.hop == 0
    reply = tmp_path / "reply.wav"
    question = str(source / "recordings" / "clip 1.wav")
    capsys.readouterr()
    assert chat.main(["--checkpoint", str(run_dir), "--audio", question, "--speak", str(reply)]) == 0
    printed = capsys.readouterr().out
    assert str(reply) in printed.splitlines()[-1]
    if reply.exists():
        with wave.open(str(reply)) as file:
            assert file.getframerate() == CODEC.sampling_rate and file.getnframes() > 0
