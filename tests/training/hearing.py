"""The tiny experiment with ears: a recognition stage, then spoken questions with a state head, on real record files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from tests.data.media import talk, tone, write_wav
from tests.training.tiny import TILE, experiment, model_config, stage
from tests.training.voice import CODEC, SPEECH, training
from vita_jax.data.ctc_vocabulary import build_ctc_vocabulary
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import MANIFEST
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.state_head import StateHeadConfig
from vita_jax.models.vita import VitaConfig
from vita_jax.training.experiment import (
    CTC_VOCABULARY,
    ExperimentConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)

VOCAB = 330
WIDTH = 16
FRAMES = 60
WORDS = ("red", "gold", "blue")


def hearing_model(vocab_size: int = VOCAB, **changes) -> VitaConfig:
    """One layer of everything that hears; `changes` may add a voice, see `VOICE`."""
    vision = model_config().vision
    language = DecoderConfig(vocab_size, WIDTH, 1, 2, 1, 8, 24)
    encoder = AudioEncoderConfig(hidden_size=24, num_layers=1, num_heads=2, intermediate_size=32)
    audio = AudioTowerConfig(encoder, AudioAdapterConfig(input_size=24, output_size=WIDTH))
    values = {"audio": audio, "state_head": StateHeadConfig(WIDTH), "ctc_vocab_size": 24}
    projector = ProjectorConfig("mlp2x_gelu", vision.output_size, WIDTH)
    return VitaConfig(vision, projector, language, **{**values, **changes})


VOICE = {"codec": CODEC, "speech": SPEECH, "codec_training": training()}


def hearing_experiment(run_dir: str | Path, speaks: bool = False, **fields) -> ExperimentConfig:
    """`recognition` for the speech encoder, then `hearing` for adapter, language model and state head.

    Args:
      speaks: adds a voice, with the stages `codec` and `decoders`.
    """
    stages = (
        stage(
            "recognition",
            objective="ctc",
            trainable=("^audio/encoder/", "^ctc_head/"),
            steps=2,
            sources=(SourceConfig("source"),),
            row_tiles=0,
            clip_frames=FRAMES,
        ),
        stage(
            "hearing",
            trainable=("^audio/adapter/", "^language/", "^state_head/"),
            start_from="recognition",
            steps=2,
            sources=(SourceConfig("spoken", split_rounds=True), SourceConfig("asr")),
            row_length=96,
            row_clips=2,
            clip_frames=FRAMES,
            state_labels=True,
        ),
    )
    if speaks:
        voice = {"sources": (SourceConfig("raw/speech_out"),), "steps": 2, "row_tiles": 0, "batch_size": 2}
        stages += (
            stage("codec", objective="codec", trainable=("^codec/",), codec_frames=16, **voice),
            stage(
                "decoders",
                objective="speech_decoder",
                trainable=("^speech/",),
                codec_frames=40,
                row_length=24,
                start_from=("hearing", "codec"),
                **voice,
            ),
        )
    defaults = {
        "model": hearing_model(**VOICE if speaks else {}),
        "tokenizer": TokenizerConfig(VOCAB),
        "stages": stages,
    }
    return experiment(run_dir, **{**defaults, **fields})


def prepare_hearing(config: ExperimentConfig) -> None:
    """Builds records, tokenizer, CTC vocabulary, the assistant's sentences and both benchmarks."""
    folder = data_folder(config)
    source = folder / "source"
    records: dict[str, list[dict]] = {"asr": [], "spoken": []}
    manifest: list[dict] = []
    source.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        word = WORDS[number % 3]
        write_wav(source / f"{number}.wav", tone(0.3 + 0.02 * number, frequency=300.0 * (1 + number % 3)))
        Image.fromarray(np.full((TILE, TILE, 3), 20 * number, np.uint8)).save(source / f"{number}.png")
        media = {"id": str(number), "audio": f"{number}.wav"}
        manifest.append({**media, "text": word})
        records["asr"].append({**media, "conversations": talk("<audio>\nwrite", word)})
        asked = talk("<image>\n<audio>", word, "number?", str(number))
        records["spoken"].append({**media, "image": f"{number}.png", "conversations": asked})
        refused = {**media, "id": f"n{number}", "inserted_id": 1, "conversations": talk("<audio>", "not for me")}
        records["spoken"].append(refused)
    (source / MANIFEST).write_text("".join(json.dumps(entry) + "\n" for entry in manifest))
    for name, entries in records.items():
        (source / f"{name}.json").write_text(json.dumps(entries))
        build_records(RecordsFile(source / f"{name}.json", source), folder / name)
    texts = [turn["value"] for entries in records.values() for entry in entries for turn in entry["conversations"]]
    train_sentencepiece(texts * 3, VOCAB, tokenizer_folder(config), at_most=True)
    build_ctc_vocabulary(WORDS, config.model.ctc_vocab_size).save(folder / CTC_VOCABULARY)
    write_assistant(folder / "raw" / "speech_out")
    write_benchmark(folder / "benchmarks" / "speech")
    write_assistant(folder / "benchmarks" / "speech" / "speech_out")
    write_written_benchmark(folder / "benchmarks" / "quickstart")


def write_assistant(root: Path) -> None:
    """Two texts in either language, as tones at the codec's rate."""
    entries = []
    for number, text in enumerate(("red", "红", "gold blue", "蓝")):
        rate = CODEC.sampling_rate
        write_wav(root / f"{number}.wav", tone(0.2 + 0.03 * number, rate, 100.0 * (1 + number)), rate)
        language, kind = ("en", "zh")[number % 2], ("answer", "sentence")[number // 2]
        entry = {"id": f"a{number}", "audio": f"{number}.wav", "text": text, "language": language, "kind": kind}
        entries.append(entry)
    (root / MANIFEST).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_written_benchmark(root: Path) -> None:
    """Two questions about pictures and two without."""
    items = []
    (root / "media").mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.fromarray(np.full((TILE, TILE, 3), 120 * number, np.uint8)).save(root / f"media/{number}.png")
        common = {"kind": "colour", "language": "en", "question": "number?", "answer": "red"}
        items.append({**common, "id": f"w{number}", "group": "typed", "image": f"media/{number}.png"})
        items.append({**common, "id": f"x{number}", "group": "text"})
    (root / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def write_benchmark(root: Path) -> None:
    """Two items of each group."""
    items = []
    for number in range(2):
        write_wav(root / f"media/{number}.wav", tone(0.4 + 0.1 * number))
        (root / "media").mkdir(exist_ok=True)
        Image.fromarray(np.full((TILE, TILE, 3), 90 * number, np.uint8)).save(root / f"media/{number}.png")
        common = {"language": ("en", "zh")[number], "audio": f"media/{number}.wav", "question": ""}
        picture = {"image": f"media/{number}.png"}
        items += [
            {**common, **picture, "id": f"s{number}", "group": "spoken", "kind": "colour", "answer": "red"},
            {**common, "id": f"n{number}", "group": "noise", "kind": "hum", "answer": "not for me"},
            {**common, "id": f"t{number}", "group": "transcribe", "kind": "new_voice", "question": "write",
             "answer": "gold blue"},
        ]  # fmt: skip
    (root / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
