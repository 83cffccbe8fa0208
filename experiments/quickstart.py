"""A small VITA-1.5 that sees, listens and answers aloud, trained from nothing: stages 0 to 3.2.

    python -m vita_jax.train --config=experiments/quickstart.py
    python -m vita_jax.train --config=experiments/quickstart.py --config.size=smoke --config.run_dir=/tmp/smoke

Sizes: `smoke` (all stages and commands in minutes, learns nothing), `small` (the quickstart: under an hour on two CPU
cores), `full` (the same curriculum on VITA-1.5's full-size models; needs accelerators).

Stage 0 stands in for the public Qwen2 and InternViT weights: the language model learns questions about scenes written
in characters, the tower learns to name what each cell shows. The curriculum of the VITA-1.5 paper (section 3.3) follows
with its trainable parts and data fractions:

    1.1  the adapter, on 20 % of the captions
    1.2  tower, adapter and language model, on all captions
    1.3  all three, on all questions and 20 % of the captions
    2.1a the speech encoder, on transcripts by CTC; the speech adapter along with it
    2.1b speech adapter and language model, on speech and its transcripts
    2.2  the same and the input head: questions, half of them spoken, some captions, and sounds that are no questions
    3.1  the codec, on the assistant's voices
    3.2  the two speech decoders, on its spoken sentences; everything else is frozen

Text-only questions stay in the mixtures of 1.2, 1.3 and 2.2, as the paper's question data has them. The speech encoder
is frozen after 2.1a, so the final model is also the recogniser that measures its voice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from data_pipelines.codes import build_codes
from data_pipelines.quickstart.build import build_quickstart
from data_pipelines.quickstart.speech_sets import SMOKE as SMOKE_SPEECH
from data_pipelines.quickstart.speech_sets import SpeechCounts
from vita_jax.data.ctc_vocabulary import build_ctc_vocabulary
from vita_jax.data.images import ImageConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import read_manifest
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vita_jax.evaluation.comparison import changes_since
from vita_jax.evaluation.report import write_report
from vita_jax.evaluation.results import FINAL, format_result, format_stages, read_evaluation, save_stage_evaluation
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.inference.speak import save_voices
from vita_jax.models.audio.ctc_head import CtcTraining
from vita_jax.models.codec.losses import codec_training_small
from vita_jax.models.vita import VitaConfig, vita_1_5_with_voice, vita_small_with_voice
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import (
    CTC_VOCABULARY,
    Amount,
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LogConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.optimizer import OptimizerConfig
from vita_jax.training.stages import Optimizer, Stage

# Rows of the recogniser's head; the speech of the quickstart has fewer characters and frequent words.
CTC_ROWS = 768

TEXT = SourceConfig("text")
QUESTIONS = SourceConfig("questions")
ASR = SourceConfig("asr")
SPOKEN = SourceConfig("spoken", split_rounds=True)
NEGATIVES = SourceConfig("negatives", split_rounds=True)
# Manifests of recordings, for the stages without a language model.
RECORDINGS = SourceConfig("raw/asr")
ASSISTANT = SourceConfig("raw/speech_out")
# The same sentences as tokens of the codec, made once when it is trained.
CODES = SourceConfig("raw/speech_codes")


def captions(ratio: float) -> SourceConfig:
    """A share of the caption records."""
    return SourceConfig("captions", ratio=ratio)


def mixture(*parts: tuple[SourceConfig, float]) -> tuple[SourceConfig, ...]:
    """Sources with their weights."""
    return tuple(dataclasses.replace(source, weight=weight) for source, weight in parts)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of packed rows: how many, and what fits into one in tokens, picture tiles and sounds."""

    batch_size: int
    row_length: int
    row_tiles: int = 0
    row_clips: int = 0


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in.

    Attributes:
      plan: steps and peak learning rate of every stage.
      muon: the stages that train by Muon, all others by AdamW.
      seen, cells, spoken, aligned: batches of stages 0 to 1.3, of the tower's own, of 2.2, and of 2.1b.
      adapter_early: whether the speech adapter learns along in 2.1a to say words as the language model spells them. In
        the paper it waits for 2.1b, which is then longer; scores of a full vocabulary at every token take much memory.
      clips: rows of a batch for the speech encoder, of `clip_frames` frames of 10 ms.
      crops, crop_frames: of a batch for the codec.
      replies, reply_tokens, reply_frames: of a batch for the speech decoders: text tokens and codec frames.
      amounts: of data.
      speech: amounts of speech.
    """

    plan: dict[str, tuple[int, float]]
    muon: tuple[str, ...]
    seen: Rows
    cells: Rows
    spoken: Rows
    aligned: Rows
    adapter_early: bool
    clips: int
    clip_frames: int
    crops: int
    crop_frames: int
    replies: int
    reply_tokens: int
    reply_frames: int
    amounts: dict[str, int]
    speech: SpeechCounts

    def optimizer(self, stage: str) -> Optimizer:
        """What a stage trains by."""
        return "muon" if stage in self.muon else "adamw"


BENCHMARK = {"typed": 504, "typed_unseen_writers": 104, "text_only": 120, "video_order": 402}
# Small batches: at this size the number of updates counts for more than what is in each.
SMALL = Size(
    plan={
        "language": (1700, 3e-3),
        "tower": (900, 1e-3),
        "vision_alignment": (300, 2e-3),
        "vision_understanding": (400, 7e-4),
        "vision_sft": (1400, 1.5e-3),
        "speech_encoder": (9000, 2e-3),
        "speech_alignment": (3400, 1.5e-3),
        "audio_sft": (1900, 5e-4),
        "codec": (17000, 4e-3),
        "speech_decoders": (2400, 2e-3),
    },
    # It needs fewer steps, most of all for the codec. Where sound meets the language model it gained nothing: there
    # small batches do, whose updates it makes dear.
    muon=("language", "vision_sft", "speech_encoder", "codec"),
    seen=Rows(6, 208, row_tiles=8),  # two conversations
    cells=Rows(12, 304, row_tiles=8),
    spoken=Rows(2, 304, row_tiles=12, row_clips=4),
    aligned=Rows(1, 304, row_clips=6),
    adapter_early=True,
    clips=2,
    clip_frames=416,
    crops=4,
    crop_frames=20,
    replies=8,
    reply_tokens=40,
    reply_frames=160,
    amounts={"text": 32000, "cells": 11000, "captions": 8000, "pictures": 15000, "clips": 5000, **BENCHMARK},
    speech=SpeechCounts(),
)
SMOKE = dataclasses.replace(
    SMALL,
    plan={name: (3, rate) for name, (_, rate) in SMALL.plan.items()},
    seen=Rows(4, 256, row_tiles=12),
    cells=Rows(8, 256, row_tiles=8),
    spoken=Rows(4, 256, row_tiles=12, row_clips=4),
    aligned=Rows(4, 256, row_clips=6),
    clips=2,
    crops=2,
    replies=2,
    amounts={"text": 40, "cells": 40, "captions": 40, "pictures": 40, "clips": 6}
    | {"typed": 8, "typed_unseen_writers": 8, "text_only": 8, "video_order": 6},
    speech=SMOKE_SPEECH,
)
# Optimiser and rates of the original scripts, for which the lengths of `SMALL` are only a start; stage 0 is replaced by
# the public weights once they are converted.
FULL = dataclasses.replace(
    SMALL,
    plan=SMALL.plan
    | {"language": (1700, 1e-4), "tower": (900, 1e-4), "vision_alignment": (300, 5e-4)}
    | {"vision_understanding": (400, 2e-5), "vision_sft": (1400, 2e-5)}
    | {"speech_encoder": (9000, 2e-4), "speech_alignment": (3400, 2e-5), "audio_sft": (1900, 2e-5)}
    | {"codec": (17000, 2e-4), "speech_decoders": (2400, 5e-4)},
    muon=(),
    seen=Rows(128, 6144, row_tiles=26),
    cells=Rows(256, 6144, row_tiles=8),
    spoken=Rows(128, 6144, row_tiles=26, row_clips=32),
    aligned=Rows(128, 6144, row_clips=48),
    adapter_early=False,
    clips=64,
    clip_frames=3000,
    crops=64,
    replies=64,
)


def vision_stages(size: Size) -> tuple[Stage, ...]:
    """Stages 0 to 1.3."""

    def stage(name: str, title: str, *trainable: str, rows: Rows = size.seen, **fields: Any) -> Stage:
        steps, rate = size.plan[name]
        optimizer = size.optimizer(name)
        return Stage(
            name, title, trainable, steps=steps, learning_rate=rate, optimizer=optimizer, **vars(rows), **fields
        )

    everything = ("^vision/", "^projector/", "^language/")
    return (
        stage(
            "language",
            "0a language model",
            "^language/",
            sources=(TEXT,),
            objective="text_pretraining",
            rows=dataclasses.replace(size.seen, row_tiles=0),
        ),
        stage(
            "tower",
            "0b vision tower",
            "^vision/",
            "^naming_head/",
            sources=(SourceConfig("cells"),),
            objective="cell_naming",
            rows=size.cells,
        ),
        stage(
            "vision_alignment",
            "1.1 vision alignment",
            "^projector/",
            sources=(captions(0.2),),
            start_from=("language", "tower"),
        ),
        stage(
            "vision_understanding",
            "1.2 vision understanding",
            *everything,
            sources=mixture((captions(1.0), 0.7), (TEXT, 0.3)),
            start_from="vision_alignment",
        ),
        stage(
            "vision_sft",
            "1.3 vision SFT",
            *everything,
            sources=mixture((QUESTIONS, 0.78), (captions(0.2), 0.06), (TEXT, 0.16)),
            start_from="vision_understanding",
        ),
    )


HEARING_MIX = mixture(
    (SPOKEN, 0.32), (NEGATIVES, 0.1), (ASR, 0.11), (QUESTIONS, 0.32), (TEXT, 0.11), (captions(0.2), 0.04)
)


def audio_stages(size: Size) -> tuple[Stage, ...]:
    """Stages 2.1a to 2.2: hearing."""
    steps, rates = zip(*(size.plan[name] for name in ("speech_encoder", "speech_alignment", "audio_sft")), strict=True)
    return (
        Stage(
            "speech_encoder",
            "2.1a speech encoder",
            ("^audio/encoder/", "^ctc_head/", *(("^audio/adapter/",) if size.adapter_early else ())),
            # The recogniser also knows the voice that it is to read back, from recordings.
            (RECORDINGS, dataclasses.replace(ASSISTANT, ratio=0.5)),
            steps=steps[0],
            learning_rate=rates[0],
            optimizer=size.optimizer("speech_encoder"),
            batch_size=size.clips,
            row_length=size.clip_frames,
            row_tiles=0,
            clip_frames=size.clip_frames,
            objective="ctc",
            warmup_ratio=0.1,
            start_from="vision_sft" if size.adapter_early else None,  # whose embedding table the adapter learns to say
        ),
        Stage(
            "speech_alignment",
            "2.1b speech alignment",
            ("^audio/adapter/", "^language/"),
            (ASR,),
            steps=steps[1],
            learning_rate=rates[1],
            # The language model must not forget what it knows.
            learning_rate_scale=(("^language/", 0.5),),
            **vars(size.aligned),
            clip_frames=size.clip_frames,
            whole_clips=True,
            start_from="speech_encoder" if size.adapter_early else ("vision_sft", "speech_encoder"),
        ),
        Stage(
            "audio_sft",
            "2.2 audio SFT",
            ("^audio/adapter/", "^language/", "^state_head/"),
            HEARING_MIX,
            steps=steps[2],
            learning_rate=rates[2],
            **vars(size.spoken),
            clip_frames=size.clip_frames,
            state_labels=True,
            start_from="speech_alignment",
        ),
    )


def voice_stages(size: Size) -> tuple[Stage, ...]:
    """Stages 3.1 and 3.2: speaking."""
    (codec_steps, codec_rate), (steps, rate) = size.plan["codec"], size.plan["speech_decoders"]
    return (
        Stage(
            "codec",
            "3.1 codec",
            ("^codec/",),
            (ASSISTANT,),
            steps=codec_steps,
            learning_rate=codec_rate,
            optimizer=size.optimizer("codec"),
            batch_size=size.crops,
            row_length=1,
            row_tiles=0,
            codec_frames=size.crop_frames,
            objective="codec",
        ),
        Stage(
            "speech_decoders",
            "3.2 speech decoders",
            ("^speech/",),
            (CODES,),
            steps=steps,
            learning_rate=rate,
            optimizer=size.optimizer("speech_decoders"),
            batch_size=size.replies,
            row_length=size.reply_tokens,
            row_tiles=0,
            codec_frames=size.reply_frames,
            objective="speech_decoder",
            start_from=("audio_sft", "codec"),
        ),
    )


def small_model(width: int = 192, num_layers: int = 4, tower_width: int = 96) -> VitaConfig:
    """The small model with its recogniser."""
    model = vita_small_with_voice(width, num_layers, tower_width, vocab_size=1280)
    training = CtcTraining(flat_start_steps=1000, spec_augment=False, feature_noise=1.0, token_weight=0.5)
    # A step against discriminators takes as long as four without, and in minutes the voice gains less by it.
    codec_training = dataclasses.replace(model.codec_training, discriminators=None)
    return dataclasses.replace(model, ctc_vocab_size=CTC_ROWS, ctc_training=training, codec_training=codec_training)


def smoke_model() -> VitaConfig:
    """The same in every part, tiny; its codec meets the discriminators at once."""
    model = small_model(48, 2, 48)
    return dataclasses.replace(model, codec_training=codec_training_small(adversarial_start=1, ease_in=1))


def full_model() -> VitaConfig:
    """VITA-1.5 with recogniser and voice, at full size."""
    return dataclasses.replace(vita_1_5_with_voice(), ctc_vocab_size=CTC_ROWS)


def get_config(size: Literal["smoke", "small", "full"] = "small") -> ExperimentConfig:
    """The configuration of one size."""
    plan = {"smoke": SMOKE, "small": SMALL, "full": FULL}[size]
    models = {"smoke": smoke_model, "small": small_model, "full": full_model}
    model = models[size]()
    speech = {f"speech_{name}": count for name, count in dataclasses.asdict(plan.speech).items()}
    return ExperimentConfig(
        name="quickstart",
        size=size,
        run_dir="runs/quickstart",
        model=model,
        image=ImageConfig(image_size=model.vision.image_size),
        tokenizer=TokenizerConfig(vocab_size=1280),
        template="qwen2p5_instruct",
        system_texts=SystemTexts(image="Look.", video="Watch.", lang="Read."),
        data=DataConfig(
            num_threads=0 if size != "full" else 2,
            amounts=tuple(Amount(name, count) for name, count in {**plan.amounts, **speech}.items()),
        ),
        optimizer=OptimizerConfig() if size == "full" else OptimizerConfig(beta2=0.98),
        stages=(*vision_stages(plan), *audio_stages(plan), *voice_stages(plan)),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=25 if size == "small" else 1),
    )


def prepare(config: ExperimentConfig) -> None:
    """Builds the data and trains the tokenizer, unless they are there."""
    build_data(config)
    if not tokenizer_folder(config).is_dir():
        texts = tokenizer_texts(config, "system\n", "user\n", "assistant\n")
        train_sentencepiece(texts, config.tokenizer.vocab_size, tokenizer_folder(config), at_most=True)


def build_data(config: ExperimentConfig) -> None:
    """Builds the data, and the recogniser's characters from its transcripts, unless they are there."""
    folder = data_folder(config)
    amounts = {entry.name: entry.count for entry in config.data.amounts}
    speech = {name.removeprefix("speech_"): n for name, n in amounts.items() if name.startswith("speech_")}
    counts = {name: n for name, n in amounts.items() if not name.startswith("speech_")}
    build_quickstart(folder, counts, config.seed, speech=SpeechCounts(**speech))
    if not (folder / CTC_VOCABULARY).is_file():
        texts = [pair.text for source in (RECORDINGS, ASSISTANT) for pair in read_manifest(folder / source.path)]
        build_ctc_vocabulary(texts, config.model.ctc_vocab_size).save(folder / CTC_VOCABULARY)


def tokenizer_texts(config: ExperimentConfig, *roles: str) -> list[str]:
    """What a tokenizer is trained on: every turn of the data once, and what the template writes, `roles` among it."""
    lines = (data_folder(config) / "tokenizer_text.txt").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    # The fixed parts of every prompt are frequent; repeated, they become single pieces.
    return [*texts, *[*dataclasses.astuple(config.system_texts), *roles] * len(texts)]


Groups = tuple[str, ...]
# What is measured after a stage: groups of the benchmark "quickstart", and of "speech". After "language" there is no
# tower yet; after "tower" both parts of stage 0 are measured together, joined by an adapter that has learnt nothing.
# The codec starts from nothing, so what reads its copies back is the recogniser of 2.1a; the voice as a whole is
# measured at the end.
SEEN = ("typed", "video_order", "text")
EVALUATED: Mapping[str, tuple[Groups, Groups]] = {
    "tower": (("typed", "text"), ()),
    "vision_alignment": (("typed", "text"), ()),
    "vision_understanding": (SEEN, ()),
    "vision_sft": (SEEN, ()),
    "speech_encoder": ((), ("recognition_full", "recognition_chunked")),
    "speech_alignment": ((), ("transcribe",)),
    "audio_sft": (SEEN, ("spoken", "noise", "transcribe", "accepted", "input_head")),
    "codec": ((), ("voice_synthesizer", "voice_copy")),
}
QUESTIONS_PER_KIND = 120
# Before and after the audio stages everything is asked: the two are compared question by question.
ASKED_IN_FULL = ("vision_sft", "audio_sft")
# The final model is compared with this stage, the last one that only sees, on these groups.
COMPARED_STAGE, COMPARED = "vision_sft", ("typed", "text")


def after_stage(
    config: ExperimentConfig,
    stage: Stage,
    params: Any,
    evaluated: Mapping[str, tuple[Groups, Groups]] = EVALUATED,
) -> None:
    """Measures the model on a part of what was held out; after 3.1 also makes the tokens that 3.2 learns from."""
    if stage.name == "tower":
        params = {**params, "language": load_params(checkpoint_folder(config.run_dir, "language")).params["language"]}
    tokenizer = load_tokenizer(tokenizer_folder(config))
    limit = None if stage.name in ASKED_IN_FULL else QUESTIONS_PER_KIND
    if stage.name == "codec":
        folder = data_folder(config)
        build_codes(str(checkpoint_folder(config.run_dir, stage.name)), folder / ASSISTANT.path, folder / CODES.path)
    for benchmark, groups in zip(("quickstart", "speech"), evaluated.get(stage.name, ((), ())), strict=True):
        if groups:
            result = evaluate_params(config, params, tokenizer, benchmark=benchmark, groups=groups, limit=limit)
            save_stage_evaluation(config, stage.name, result)
            print(f"after {stage.title}\n{format_result(result)}", flush=True)


def finish(config: ExperimentConfig) -> None:
    """Measures the final model on everything that was held out, keeps its voices if it has any, writes the report."""
    params, tokenizer = load_params(config.run_dir).params, load_tokenizer(tokenizer_folder(config))
    if config.model.speech is not None:
        save_voices(config, params)
    for benchmark in ("quickstart", "speech"):
        result = evaluate_params(config, params, tokenizer, benchmark=benchmark, keep_sounds=True)
        before = read_evaluation(config.run_dir, COMPARED_STAGE)
        if benchmark == "quickstart" and before is not None:
            result["changes"] = changes_since(before, result, COMPARED, COMPARED_STAGE)
        save_stage_evaluation(config, FINAL, result)
        print(format_result(result), flush=True)
    print(format_stages(Path(config.run_dir), config))
    print(f"report: {write_report(config.run_dir)}")
