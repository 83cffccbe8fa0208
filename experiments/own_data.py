"""The quickstart's small model on your own data: pictures, videos, sounds and text, transcribed speech, a voice.

    python -m vita_jax.train --config=experiments/own_data.py --config.run_dir=runs/mine \\
        --config.data.json=my.json --config.data.root=my_media \\
        --config.data.asr=transcribed/manifest.jsonl --config.data.speech=speaker/manifest.jsonl

Each kind of data has its stages; what is not given is left out, stages and parts of the model alike.

    data.asr                 speech_encoder   2.1a: the speech encoder, by CTC, for whole clips and chunks of any size
    data.json and data.root  own_data         the language model; with tower, audio adapter and input head as far as the
                                              records show pictures or play sounds
    data.speech              codec            3.1: the codec, on the sound alone
    data.speech              speech_decoders  3.2: text to speech tokens; all else is frozen

The records file is described in the README and in `vita_jax/data/records.py`; media of records that name a `set` are
looked for in the folders of `data.folders`, a JSON table. Bad records are listed in
`<run_dir>/data/records/rejects.jsonl`. Records with "<audio>" train the speech encoder along unless `data.asr` has
trained it before; without transcripts they need many more records to be understood.

A manifest has a JSON object per line, {"audio": path, "text": what is said}; paths start from its folder; recordings
may have any common format, rate and number of channels (the first is taken). For `data.speech` they should be of one
speaker (per language: the first recording in each is the voice it speaks with). Its texts are written out as replies
are before they are spoken: lower case, no punctuation, digits one by one.

To adapt a model that is there already, a run or what `vita_jax.convert` has imported, name it; the language model then
keeps its weights if adapters (LoRA) are asked for. Model, tokenizer, prompts and voices are that model's:

        --config.stages.own_data.start_from=runs/vita_1_5 --config.stages.own_data.lora.rank=16

Adapters take the place of `^language/` in `.trainable`; what else that names trains along, and can be left out:
`--config.stages.own_data.trainable=^projector/`, or `=` for the adapters alone. `.lora.alpha` and `.lora.targets` are
as in `vita_jax/models/lora.py`; a learning rate for adapters is some ten times that for the weights.

Otherwise tokenizer and recogniser's characters are those of the data. Talk to the result with
`python -m vita_jax.chat --checkpoint runs/mine`, `--audio FILE` asks aloud, `--speak FILE.wav` has it answer aloud.
Without records the language model learns nothing, so that there is a recogniser or a voice, but nobody to talk to.

Sizes: `smoke` (a few steps), `small` (the quickstart's model; minutes to an hour on a laptop), `full` (VITA-1.5's
full-size models; needs accelerators). Per stage, as in `--config.stages.own_data.steps=N`: `.steps` is the length of
training; `.row_length`, `.row_tiles`, `.row_clips` and `.clip_frames` bound the longest record (tokens, picture tiles
and frames, sounds, frames of 10 ms of each); `.clip_frames` the longest transcribed clip; `.codec_frames` (40 a second)
and `.row_length` the longest sentence of the voice.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from vita_jax.data.ctc_vocabulary import build_ctc_vocabulary, load_ctc_vocabulary, normalise_transcript
from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import MANIFEST, SpokenText, read_manifest
from vita_jax.data.records import read_folders
from vita_jax.data.spoken_words import answer_aloud, language_of
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.errors import UserError
from vita_jax.models.audio.ctc_head import CtcTraining
from vita_jax.models.codec.losses import codec_training_small
from vita_jax.models.vita import VitaConfig, vita_1_5_with_voice, vita_small_with_voice
from vita_jax.training.checkpoint import load_config
from vita_jax.training.experiment import (
    CTC_VOCABULARY,
    DataConfig,
    ExperimentConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.portable import TOKENIZER, extra_files
from vita_jax.training.stages import Stage, starts_of

RECORDS = "records"
# The manifests as the stages read them, below the data folder; a voice is looked for in the second.
TRANSCRIBED, VOICE = "raw/asr", "raw/speech_out"
VOCAB_SIZE = 4096
# Rows of the recogniser's head, or more for more characters.
CTC_ROWS = 512
NEEDED = (
    "own_data needs your data: --config.data.json=FILE with --config.data.root=DIR (records), "
    "--config.data.asr=MANIFEST.jsonl (transcribed speech), --config.data.speech=MANIFEST.jsonl (a voice and its "
    "texts), or several of them"
)

# Of the configuration, what comes from a model that is there already, unless it is set on the command line.
INHERITED = ("image", "template", "system_texts", "video_rule", "prompt", "audio", "dtypes")
# The stages of size `small` that train by Muon, as in the quickstart; all others by AdamW.
MUON = ("speech_encoder", "codec")
# Steps, rows and peak learning rate of every stage.
PLANS = {
    "smoke": {name: (6, 2, 3e-3) for name in ("speech_encoder", "own_data", "codec", "speech_decoders")},
    "small": {
        "speech_encoder": (2400, 4, 2e-3),
        "own_data": (600, 8, 1.5e-3),
        "codec": (8000, 4, 3e-3),
        "speech_decoders": (2500, 8, 2e-3),
    },
    "full": {
        "speech_encoder": (20_000, 128, 2e-4),
        "own_data": (5000, 128, 2e-5),
        "codec": (100_000, 32, 2e-4),
        "speech_decoders": (20_000, 64, 5e-4),
    },
}


def small_model(width: int = 192, num_layers: int = 4, tower_width: int = 96, ease_in: int = 1000) -> VitaConfig:
    """The quickstart's model with room for more words. The recogniser's head gets its size from the transcripts.

    Args:
      ease_in: see `CodebookTraining`.
    """
    model = vita_small_with_voice(width, num_layers, tower_width, VOCAB_SIZE)
    # A step against discriminators takes as long as four without, and in minutes the voice gains less by it.
    codec_training = dataclasses.replace(codec_training_small(ease_in=ease_in), discriminators=None)
    return dataclasses.replace(model, ctc_training=CtcTraining(flat_start_steps=500), codec_training=codec_training)


def get_config(size: Literal["smoke", "small", "full"] = "small") -> ExperimentConfig:
    """The configuration of one size with all stages; `prepare` leaves out those that `data` has nothing for."""
    models = {"smoke": lambda: small_model(48, 2, 48, ease_in=0), "small": small_model, "full": vita_1_5_with_voice}
    model = models[size]()
    image = ImageConfig(image_size=model.vision.image_size)
    return ExperimentConfig(
        name="own_data",
        size=size,
        run_dir="runs/own_data",
        model=model,
        image=image,
        tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
        template="qwen2p5_instruct",
        system_texts=SystemTexts(image="Look.", video="Watch.", lang="Read."),
        data=DataConfig(num_threads=2 if size == "full" else 0),
        stages=_stages(size, 2 * image.most_tiles),
    )


def _stages(size: str, tiles: int) -> tuple[Stage, ...]:
    small, plan = size != "full", PLANS[size]
    seconds = 4 if size == "smoke" else 16

    def stage(name: str, title: str, *trainable: str, source: str, **fields: Any) -> Stage:
        steps, rows, rate = plan[name]
        optimizer = "muon" if size == "small" and name in MUON else "adamw"
        shared = {"steps": steps, "batch_size": rows, "learning_rate": rate, "row_tiles": 0, "optimizer": optimizer}
        return Stage(name, title, trainable, (SourceConfig(source),), **{**shared, **fields})

    return (
        stage(
            "speech_encoder",
            "2.1a speech encoder",
            "^audio/encoder/",
            "^ctc_head/",
            source=TRANSCRIBED,
            objective="ctc",
            row_length=100 * seconds,
            clip_frames=100 * seconds,
            warmup_ratio=0.1,
        ),
        stage(
            "own_data",
            "own data",
            "^vision/",
            "^projector/",
            "^language/",
            "^audio/",
            "^state_head/",
            source=RECORDS,
            row_length=512 if small else 6144,
            row_tiles=tiles,
            row_clips=4 if small else 32,
            clip_frames=100 * seconds,
            state_labels=True,
            start_from="speech_encoder",
        ),
        stage(
            "codec",
            "3.1 codec",
            "^codec/",
            source=VOICE,
            objective="codec",
            row_length=1,
            codec_frames=20,
        ),
        stage(
            "speech_decoders",
            "3.2 speech decoders",
            "^speech/",
            source=VOICE,
            objective="speech_decoder",
            row_length=96,
            codec_frames=400,
            start_from=("own_data", "codec"),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def prepare(config: ExperimentConfig) -> ExperimentConfig:
    """Builds records and manifests, trains the tokenizer, and leaves out stages and parts that have no data.

    Raises:
      UserError: no data at all, records without their folder or the other way round, or data that cannot be read.
    """
    data = config.data
    places = data.root is not None or data.folders is not None
    if (data.json is not None) != places:
        given, missing = ("root=DIR", "json=FILE") if places else ("json=FILE", "root=DIR")
        raise UserError(f"--config.data.{given} is given without --config.data.{missing}; records need both")
    if data.json is None and data.asr is None and data.speech is None:
        raise UserError(NEEDED)
    config = like_its_start(config)
    folder = data_folder(config)
    texts: list[str] = []
    counts: dict[str, int] = {}
    if data.json is not None:
        source = RecordsFile(data.json, data.root, None if data.folders is None else read_folders(data.folders))
        counts = build_records(source, folder / RECORDS, max_bad_fraction=data.max_bad_fraction).counts
        print(f"data: {counts}", flush=True)
        texts += _record_texts(source)
    if data.asr is not None:
        pairs = read_manifest(data.asr)
        _write_manifest(folder / TRANSCRIBED, ({"audio": pair.audio, "text": pair.text} for pair in pairs))
        config = _with_recogniser(config, pairs)
        texts += [pair.text for pair in pairs]
        print(f"data: {len(pairs)} transcribed clips", flush=True)
    if data.speech is not None:
        if any(pair.codes is not None for pair in read_manifest(data.speech)):
            raise UserError(f"{data.speech} has codes, but the codec is trained anew here; give a manifest without")
        lines = [
            {"audio": pair.audio, "text": answer_aloud(pair.text, language_of(pair.text)), "written": pair.text}
            for pair in read_manifest(data.speech)
        ]
        _write_manifest(folder / VOICE, lines)
        texts += [text for line in lines for text in (line["text"], line["written"])]
        print(f"data: {len(lines)} sentences of the voice", flush=True)
    if not tokenizer_folder(config).is_dir():
        fixed = [*dataclasses.astuple(config.system_texts), "system\n", "user\n", "assistant\n"] * 20
        train_sentencepiece([*texts, *fixed], config.tokenizer.vocab_size, tokenizer_folder(config), at_most=True)
    return fitted(config, counts)


def base_of(config: ExperimentConfig) -> str | None:
    """The folder of the model that the records are to adapt; None where they train one of their own."""
    names = {stage.name for stage in config.stages}
    return next((start for start in starts_of(config.stage("own_data")) if start not in names), None)


def like_its_start(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with model, tokenizer and prompts of the model it starts from, if it does; small files that
    belong to that model are copied to the run.
    """
    base = base_of(config)
    if base is None:
        return config
    begun, run_dir = load_config(base)
    for file in extra_files(begun, run_dir):
        target = Path(config.run_dir) / file.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    plain = get_config(config.size)
    kept = {name: getattr(begun, name) for name in INHERITED if getattr(config, name) == getattr(plain, name)}
    # How much is computed twice is no matter of the weights.
    language = dataclasses.replace(begun.model.language, remat=config.model.language.remat)
    model = dataclasses.replace(begun.model, language=language)
    tokenizer = dataclasses.replace(begun.tokenizer, folder=str(run_dir / TOKENIZER))
    return dataclasses.replace(config, model=model, tokenizer=tokenizer, **kept)


def _record_texts(source: RecordsFile) -> Iterator[str]:
    """Every turn of every record that has its turns where they belong; the builder reports the others."""
    for record in (entry.get("record") for entry in source.entries()):
        turns = record.get("conversations") if isinstance(record, dict) else None
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                yield turn["value"].replace("<image>", "").replace("<video>", "").replace("<audio>", "")


def _write_manifest(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes `manifest.jsonl` with full paths, since it lies elsewhere than the user's."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{**line, "audio": str(Path(line["audio"]).absolute())} for line in lines]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _with_recogniser(config: ExperimentConfig, pairs: list[SpokenText]) -> ExperimentConfig:
    """The configuration with a head for the characters and frequent words of the transcripts, kept in the data folder.

    `model.ctc_vocab_size` is the number of its rows where that is set, and an error if they are too few for the
    characters; else these get all the rows they need, and words what is left of `CTC_ROWS`.
    """
    path = data_folder(config) / CTC_VOCABULARY
    if not path.is_file():
        texts = [pair.text for pair in pairs]
        characters = {character for text in texts for character in normalise_transcript(text)}
        rows = config.model.ctc_vocab_size or max(CTC_ROWS, len(characters) + 1)
        build_ctc_vocabulary(texts, rows).save(path)
    rows = config.model.ctc_vocab_size or len(load_ctc_vocabulary(path))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, ctc_vocab_size=rows))


# ---------------------------------------------------------------------------------------------------------------------
# What the data has nothing for
# ---------------------------------------------------------------------------------------------------------------------


def fitted(config: ExperimentConfig, counts: dict[str, int]) -> ExperimentConfig:
    """The configuration without the stages and parts of the model that nothing would train.

    Args:
      counts: of the records' pictures, videos and sounds; empty without records.
    """
    data = config.data
    sees = bool(counts.get("images") or counts.get("videos"))
    hears = bool(counts.get("audios"))
    given = {
        "speech_encoder": data.asr is not None,
        "own_data": data.json is not None,
        "codec": data.speech is not None,
        "speech_decoders": data.speech is not None,
    }
    model = config.model if base_of(config) else _trimmed(config, hears)

    def starts_given(stage: Stage) -> tuple[str, ...]:
        """What the stage starts from; in place of a stage without data, what that would have started from."""
        starts = starts_of(stage)
        kept = [(s,) if given.get(s, True) else starts_given(config.stage(s)) for s in starts]
        return tuple(dict.fromkeys(name for names in kept for name in names))

    stages = []
    for stage in config.stages:
        if not given.get(stage.name, True):
            continue
        starts = starts_given(stage)
        if stage.name == "own_data":
            encoder = data.asr is None and base_of(config) is None
            tower = sees and isinstance(model, VitaConfig)  # LLaVA's is frozen in every stage
            has_state = model.state_head is not None
            stage = _own_stage(stage, sees, hears, trains_tower=tower, trains_encoder=encoder, has_state=has_state)
        stages.append(dataclasses.replace(stage, start_from=starts or None))
    return dataclasses.replace(config, model=model, stages=tuple(stages))


def _trimmed(config: ExperimentConfig, hears: bool) -> VitaConfig:
    """The model without the parts that the data has nothing for."""
    data, model = config.data, config.model
    if not hears:
        model = dataclasses.replace(model, state_head=None)
    if data.asr is None:
        model = dataclasses.replace(model, audio=model.audio if hears else None, ctc_vocab_size=0)
    if data.speech is None:
        model = dataclasses.replace(model, codec=None, speech=None)
    return model


def _own_stage(
    stage: Stage, sees: bool, hears: bool, *, trains_tower: bool, trains_encoder: bool, has_state: bool
) -> Stage:
    """The stage on the records, of the modalities that they have. A trained speech encoder is frozen, so that it stays
    the recogniser it is; so is the language model where it gets adapters.
    """
    trainable = {
        "^vision/": trains_tower,
        "^projector/": sees,
        "^language/": stage.lora is None,
        "^audio/": hears,
        "^state_head/": hears and has_state,
    }
    kept = [pattern for pattern in stage.trainable if trainable.get(pattern, True)]
    if not trains_encoder:
        kept = ["^audio/adapter/" if pattern == "^audio/" else pattern for pattern in kept]
    changes: dict[str, Any] = {} if sees else {"row_tiles": 0}
    if not hears:
        changes |= {"row_clips": 0, "clip_frames": 0}
    if not (hears and has_state):
        changes["state_labels"] = False
    return dataclasses.replace(stage, trainable=tuple(kept), **changes)
