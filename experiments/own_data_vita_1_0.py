"""VITA-1.0's curriculum on your own records: a mixture of experts that reads, sees and hears, with `<1> <2> <3>`.

    python -m vita_jax.train --config=experiments/own_data_vita_1_0.py --config.size=small \\
        --config.data.json=my.json --config.data.root=my_media --config.run_dir=runs/vita_1_0

Stages (VITA, arXiv 2408.05211): bilingual text tuning of the language model, whose vocabulary was enlarged before;
alignment of vision, then of sound, where only the adapters learn; instruction tuning on everything, with a state token
in front of every answer: `<1>` to speech meant for the model, `<2>` to other sounds (records with `inserted_id`), `<3>`
to text. Records are sorted by what they hold; a stage without any is left out.

Sizes: `smoke` (a few steps), `small` (four experts, a laptop), `full` (Mixtral-8x7B; needs accelerators). To start from
a model of yours, enlarge its vocabulary and name the result, with the two sizes that the command prints:

    python -m vita_jax.enlarge_vocabulary --checkpoint runs/base --to runs/enlarged --texts zh.txt --pieces 20000 \\
        --symbols "<1>" "<2>" "<3>" "</s>"
    python -m vita_jax.train --config=experiments/own_data_vita_1_0.py ... \\
        --config.tokenizer.folder=runs/enlarged/tokenizer --config.tokenizer.vocab_size=51747 \\
        --config.model.language.vocab_size=51760 --config.stages.bilingual_text.start_from=runs/enlarged

Without a tokenizer folder one is trained on the records' own text, with the same symbols.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.records import read_json_records
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError
from vita_jax.models.audio.tower import audio_small
from vita_jax.models.vita import VitaConfig, vita_1_0, vita_small
from vita_jax.training.experiment import (
    DataConfig,
    ExperimentConfig,
    LogConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.stages import Stage

VOCAB_SIZE = 4096
# What the template writes, beside what every tokenizer of ours has.
SYMBOLS = ("</s>", "<1>", "<2>", "<3>")
# A new router sends everything to a few experts unless it is told not to; the released one was left alone.
BALANCE = 0.01


def small_model(width: int, num_layers: int, tower_width: int) -> VitaConfig:
    """VITA-1.0's architecture with four experts, small towers and few layers."""
    base = vita_small(width, num_layers, tower_width, VOCAB_SIZE)
    language = dataclasses.replace(base.language, qkv_bias=False, num_experts=4, router_aux_loss_coef=BALANCE)
    audio = audio_small(width, tower_width, num_layers)
    return dataclasses.replace(base, language=language, audio=audio)


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in: steps and learning rates of the four stages, and the shape of a batch."""

    steps: tuple[int, int, int, int]
    rates: tuple[float, float, float, float]
    rows: int
    row_length: int
    row_clips: int
    clip_frames: int


SIZES = {
    "smoke": Size((3, 2, 2, 3), (3e-3,) * 4, rows=2, row_length=512, row_clips=1, clip_frames=400),
    "small": Size((600, 150, 150, 600), (1.5e-3, 2e-3, 2e-3, 7e-4), 8, 512, 1, 1000),
    # Learning rates and lengths of the original scripts.
    "full": Size((5000, 2000, 2000, 5000), (2e-5, 5e-4, 5e-4, 2e-5), 128, 6144, 4, 3000),
}
TEXT, VISION, SOUND = SourceConfig("text"), SourceConfig("vision"), SourceConfig("sound")


def stages(size: Size, row_tiles: int) -> tuple[Stage, ...]:
    """The curriculum."""
    text, vision, sound, tuning = zip(size.steps, size.rates, strict=True)

    def stage(
        name: str,
        title: str,
        plan: tuple[int, float],
        sources: tuple[SourceConfig, ...],
        *trainable: str,
        **fields: Any,
    ) -> Stage:
        has_sound = SOUND in sources
        return Stage(
            name,
            title,
            trainable,
            sources,
            *plan,
            batch_size=size.rows,
            row_length=size.row_length,
            # Records with sound may show something, too.
            row_tiles=0 if sources == (TEXT,) else row_tiles,
            row_clips=size.row_clips if has_sound else 0,
            clip_frames=size.clip_frames if has_sound else 0,
            **fields,
        )

    return (
        stage("bilingual_text", "1 bilingual text", text, (TEXT,), "^language/"),
        stage("vision_alignment", "2a vision alignment", vision, (VISION,), "^projector/", start_from="bilingual_text"),
        stage(
            "sound_alignment", "2b sound alignment", sound, (SOUND,), "^audio/adapter/", start_from="vision_alignment"
        ),
        stage(
            "instruction_tuning",
            "3 instruction tuning",
            tuning,
            (TEXT, VISION, SOUND),
            "^language/",
            "^projector/",
            "^audio/adapter/",
            start_from="sound_alignment",
        ),
    )


def get_config(size: Literal["smoke", "small", "full"] = "small") -> ExperimentConfig:
    """The configuration of one size; `data.json` and `data.root` must be set."""
    models = {"smoke": lambda: small_model(32, 2, 48), "small": lambda: small_model(192, 4, 96), "full": vita_1_0}
    model = models[size]()
    image = ImageConfig(image_size=model.vision.image_size)
    return ExperimentConfig(
        name="vita_1_0",
        size=size,
        run_dir="runs/vita_1_0",
        model=model,
        image=image,
        tokenizer=TokenizerConfig(vocab_size=model.language.vocab_size),
        template="mixtral_two",
        system_texts=SystemTexts(image="Look.", video="Watch.", lang="Read."),
        data=DataConfig(num_threads=2 if size == "full" else 0),
        stages=stages(SIZES[size], 2 * image.most_tiles),
        log=LogConfig(every_steps=1 if size == "smoke" else 10),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def kind_of(record: Any) -> str:
    """Name of the source a record belongs to. What is no record is called text, and rejected by the builder."""
    fields = record if isinstance(record, Mapping) else {}
    if "audio" in fields:
        return SOUND.path
    return VISION.path if "image" in fields or "video" in fields else TEXT.path


def without_sources(all_stages: tuple[Stage, ...], kept: set[str]) -> tuple[Stage, ...]:
    """The stages that have a source left; a start from a stage that is left out becomes what that one starts from.

    Raises:
      UserError: none is left.
    """
    starts: dict[str, Any] = {}
    result = []
    for stage in all_stages:
        start = starts.get(stage.start_from, stage.start_from)
        sources = tuple(source for source in stage.sources if source.path in kept)
        if not sources:
            starts[stage.name] = start
            continue
        clips = {} if SOUND.path in kept else {"row_clips": 0, "clip_frames": 0}
        result.append(dataclasses.replace(stage, sources=sources, start_from=start, **clips))
    if not result:
        raise UserError(f"no stage has records: the data holds {', '.join(sorted(kept)) or 'nothing'}")
    return tuple(result)


def texts_of(record: Any) -> Iterator[str]:
    """Every turn that is where it belongs; the builder reports the others."""
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping) and isinstance(turn.get("value"), str):
            yield turn["value"].replace("<image>", "").replace("<video>", "").replace("<audio>", "")


def make_tokenizer(config: ExperimentConfig, records: list[Any]) -> None:
    """Trains a tokenizer on the records and adds the template's symbols."""
    texts = [text for record in records for text in texts_of(record)]
    fixed = [*dataclasses.astuple(config.system_texts), "system:", "\nuser:", "\nbot:"] * 20
    size = config.tokenizer.vocab_size - len(SYMBOLS)
    tokenizer = train_sentencepiece([*texts, *fixed], size, None, at_most=True)
    enlarge(tokenizer, [], SYMBOLS).tokenizer.save(tokenizer_folder(config))


def prepare(config: ExperimentConfig) -> ExperimentConfig:
    """Sorts and builds the records, trains the tokenizer if there is none, and leaves out stages without data."""
    if config.data.json is None or config.data.root is None:
        raise UserError("vita_1_0 needs your records: --config.data.json=FILE and --config.data.root=DIR")
    records = read_json_records(Path(config.data.json))
    parts: dict[str, list[Any]] = {}
    for record in records:
        parts.setdefault(kind_of(record), []).append(record)
    folder = data_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part_file = folder / f"{name}.json"
        part_file.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
        source = RecordsFile(part_file, config.data.root)
        manifest = build_records(source, folder / name, max_bad_fraction=config.data.max_bad_fraction)
        print(f"{name}: {manifest.counts}", flush=True)
    if not tokenizer_folder(config).is_dir():
        make_tokenizer(config, records)
    return dataclasses.replace(config, stages=without_sources(config.stages, set(parts)))
