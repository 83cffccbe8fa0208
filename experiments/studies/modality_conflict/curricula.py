"""Both arms of the study of modality conflict: the quickstart's curriculum, and the same data in one stage.

start           language model, tower and speech encoder with its adapter, as stages 0 and 2.1a leave them
staged          from there 1.1, 1.2, 1.3, 2.1b and 2.2, each from the one before, or those stages of a run
all at once     from there one stage, which trains whatever one of these trains, all the time
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from experiments import quickstart
from experiments.studies.arms import SHARED, stage_cost
from vita_jax import config as config_lib
from vita_jax.data.loader import SourceConfig
from vita_jax.errors import UserError
from vita_jax.models.vita import VitaConfig
from vita_jax.storage import place
from vita_jax.training.checkpoint import CONFIG
from vita_jax.training.experiment import (
    Amount,
    CheckpointConfig,
    ExperimentConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.stages import Stage

# Component -> the stage that trains what both arms start from.
PARTS = {"language": "language", "vision": "tower", "audio": "speech_encoder"}
STAGED = ("vision_alignment", "vision_understanding", "vision_sft", "speech_alignment", "audio_sft")
JOINT = "all_at_once"
# Of what the quickstart builds, what training reads; recordings of questions have a least number of their own.
TRAINING_DATA = ("text", "cells", "captions", "pictures", "clips")
TRAINING_DATA += ("speech_asr", "speech_spoken", "speech_negatives", "speech_speech_out")


def scaled(stage: Stage, share: float) -> Stage:
    """The stage with a share of its steps."""
    return dataclasses.replace(stage, steps=max(1, round(share * stage.steps)))


def seeing_and_hearing(model: VitaConfig) -> VitaConfig:
    """The model without its voice and its recogniser's head, which neither arm trains or asks."""
    return dataclasses.replace(model, codec=None, speech=None, ctc_vocab_size=0)


# ---- what both start from -------------------------------------------------------------------------------------------


def shared_config(size: str, share: float, run_dir: str) -> ExperimentConfig:
    """A run of the stages of `PARTS`, where no other run lends them.

    The adapter learns along in 2.1a to say words as the language model of stage 0 spells them: no other is there yet.

    Args:
      share: of the quickstart's steps and training data.
    """
    config = quickstart.get_config(size)
    language, tower, encoder = (scaled(config.stage(stage), share) for stage in PARTS.values())
    amounts = (
        Amount(entry.name, max(1, round(share * entry.count))) if entry.name in TRAINING_DATA else entry
        for entry in config.data.amounts
    )
    return dataclasses.replace(
        config,
        name="modality_conflict",
        run_dir=str(Path(run_dir) / SHARED),
        model=dataclasses.replace(config.model, codec=None, speech=None),
        data=dataclasses.replace(config.data, amounts=tuple(amounts)),
        stages=(language, tower, dataclasses.replace(encoder, start_from="language")),
    )


def existing_run(run_dir: str, stages: Sequence[str]) -> ExperimentConfig:
    """The configuration of a run of the quickstart, where it lies now.

    Raises:
      UserError: no run, or one of the stages is not there or not finished.
    """
    file = place(run_dir) / CONFIG
    if not file.is_file():
        raise UserError(
            f"--run {run_dir} is no run: it has no {CONFIG}; give the folder of a quickstart, or leave it out"
        )
    config = dataclasses.replace(config_lib.load_json(ExperimentConfig, file), run_dir=run_dir)
    for stage in stages:
        stage_cost(run_dir, config.stage(stage))
    return config


# ---- the arms -------------------------------------------------------------------------------------------------------


def from_start(base: ExperimentConfig, run_dir: str, stages: Sequence[Stage], name: str) -> ExperimentConfig:
    """A run of an arm, with data and tokenizer of `base`."""
    return dataclasses.replace(
        base,
        name=f"modality_conflict_{name}",
        run_dir=str(Path(run_dir) / name),
        model=seeing_and_hearing(base.model),
        data=dataclasses.replace(base.data, folder=str(data_folder(base))),
        tokenizer=dataclasses.replace(base.tokenizer, folder=str(tokenizer_folder(base))),
        checkpoint=CheckpointConfig(every_steps=500, keep=1),
        stages=tuple(stages),
    )


def staged_config(
    base: ExperimentConfig, curriculum: ExperimentConfig, start: str, share: float, run_dir: str
) -> ExperimentConfig:
    """The staged arm where it is trained here.

    Args:
      base: whose data and tokenizer it has.
      curriculum: whose stages.
      start: a checkpoint of the components of `PARTS`.
      share: of the steps of every stage.
    """
    starts = (start, *STAGED)
    stages = [
        dataclasses.replace(scaled(curriculum.stage(name), share), start_from=before)
        for name, before in zip(STAGED, starts, strict=False)
    ]
    return from_start(base, run_dir, stages, "staged")


def milestones(stages: Sequence[Stage]) -> list[int]:
    """Steps that are done at the end of each stage."""
    return list(accumulate(stage.steps for stage in stages))


def joint_sources(stages: Sequence[Stage], records: Mapping[str, int]) -> tuple[SourceConfig, ...]:
    """Every source of the stages once, with its share of all records that they read.

    Args:
      records: stage -> how many it read.
    """
    found: dict[tuple[str, bool], SourceConfig] = {}
    total = sum(records[stage.name] for stage in stages)
    for stage in stages:
        weights = [1.0 if source.weight is None else source.weight for source in stage.sources]
        for source, weight in zip(stage.sources, weights, strict=True):
            key, share = (source.path, source.split_rounds), weight / sum(weights) * records[stage.name] / total
            known = found.get(key)
            found[key] = dataclasses.replace(
                source,
                ratio=max(source.ratio, known.ratio if known else 0.0),
                weight=share + (known.weight if known else 0.0),
            )
    return tuple(found.values())


def joint_config(staged: ExperimentConfig, start: str, rate: float | None, run_dir: str) -> ExperimentConfig:
    """The arm that trains everything at once, as many steps and positions as the staged arm, which must be finished.

    Its rows are as many as the last stage has, which has all there is to be seen and heard, and so long that positions
    are equal; longer where a record of another stage would not fit.

    Args:
      staged: the other arm, or the run whose stages it is.
      start: a checkpoint of the components of `PARTS`.
      rate: peak learning rate; None = mean of the other arm's peaks over its steps.
    """
    stages = [staged.stage(name) for name in STAGED]
    costs = {stage.name: stage_cost(staged.run_dir, stage) for stage in stages}
    last = stages[-1]
    steps = sum(stage.steps for stage in stages)
    positions = sum(cost["positions"] for cost in costs.values())
    length = round(positions / (steps * last.batch_size))
    mean_rate = sum(stage.steps * stage.learning_rate for stage in stages) / steps
    joint = dataclasses.replace(
        last,
        name=JOINT,
        title="everything at once",
        trainable=tuple(dict.fromkeys(pattern for stage in stages for pattern in stage.trainable)),
        sources=joint_sources(stages, {name: int(cost["records"]) for name, cost in costs.items()}),
        steps=steps,
        learning_rate=rate or mean_rate,
        learning_rate_scale=(),
        optimizer="adamw",
        row_length=max(length, *(stage.row_length for stage in stages)),
        row_tiles=max(stage.row_tiles for stage in stages),
        row_clips=last.row_clips,
        start_from=start,
    )
    config = from_start(staged, run_dir, [joint], JOINT)
    saved = dataclasses.replace(config.checkpoint, milestones=tuple(milestones(stages)))
    return dataclasses.replace(config, checkpoint=saved)
