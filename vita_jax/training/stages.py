"""The vocabulary of stages: a stage of a curriculum is data, and the loop knows none of them by name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from flax import traverse_util

from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.errors import UserError
from vita_jax.models.lora import KERNEL, LoraConfig, is_adapter
from vita_jax.nn.layers import LORA_SCALE

Optimizer = Literal["adamw", "muon", "adafactor"]
Schedule = Literal["cosine", "constant"]
OPTIMIZERS = list(get_args(Optimizer))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: what trains, on which data, how long, from where.

    Attributes:
      name: unique; names the folder `stages/<name>` of the run.
      title: as printed, for example "1.1 vision alignment".
      trainable: regular expressions searched in parameter paths such as `vision/layers/mlp/fc1/kernel`; everything that
        none of them matches is frozen. `.` trains everything.
      sources: the data mixture.
      steps: optimiser steps.
      learning_rate: peak of the schedule.
      optimizer: "adamw", as the original; "muon" for the matrices and Adam for the rest, which from newly drawn weights
        gets further in as many steps; or "adafactor", without momentum and with factored second moments, whose state
        takes next to no memory.
      batch_size: packed rows of one optimiser step, over all devices.
      row_length: tokens of a packed row.
      row_tiles: image tiles (or frames) of a packed row.
      row_clips, clip_frames: sounds of a packed row, and frames of 10 ms of each; 0 clips means no sound. The objective
        `ctc` has one clip in a row, of at most `clip_frames`.
      whole_clips: the speech encoder hears clips as a whole, even if its config draws chunks in training.
      state_labels: whether the model's state head trains along.
      objective: a name of `vita_jax.training.objectives.OBJECTIVES`.
      warmup_ratio: share of the steps with a rising learning rate.
      learning_rate_scale: (pattern, factor) pairs; the first match multiplies the learning rate of a parameter.
      accumulation: micro-batches the rows of a step are divided into.
      start_from: initial weights: None = newly drawn; otherwise one or several of: an earlier stage's name, a run, a
        checkpoint folder. Of several, each contributes: a path all its parameters, a stage those that it or its own
        starts trained.
      codec_frames: codec frames of a crop (objective `codec`) or of the longest sentence (`speech_decoder`, where
        row_length counts the tokens of its text); 0 for all other objectives.
      template: of the conversations of this stage, by name; None: the run's.
      sets: the data sets of the objective `flamingo`, each with its own batch, in place of `sources`; `batch_size` is
        then their sum, `row_length` and `row_tiles` their largest.
      trained_tokens: ids whose embeddings that objective learns, where `trainable` matches the table; () = all.
      schedule: of the learning rate behind its warm-up: half a "cosine" down to 0, or "constant".
      lora: adapters that train beside whatever `trainable` names, in place of the kernels they adapt, see
        `vita_jax.training.adapters`; `--config.stages.NAME.lora.rank=16` is enough. None: no adapters.
    """

    name: str
    title: str
    trainable: tuple[str, ...]
    sources: tuple[SourceConfig, ...]
    steps: int
    learning_rate: float
    batch_size: int
    row_length: int
    row_tiles: int
    objective: str = "language_modeling"
    row_clips: int = 0
    clip_frames: int = 0
    whole_clips: bool = False
    state_labels: bool = False
    warmup_ratio: float = 0.03
    learning_rate_scale: tuple[tuple[str, float], ...] = ()
    accumulation: int = 1
    start_from: str | tuple[str, ...] | None = None
    codec_frames: int = 0
    optimizer: Optimizer = "adamw"
    template: str | None = None
    sets: tuple[DataSet, ...] = ()
    trained_tokens: tuple[int, ...] = ()
    schedule: Schedule = "cosine"
    lora: LoraConfig | None = None


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts to `{"vision/layers/norm1/scale": leaf}`."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def starts_of(stage: Stage) -> tuple[str, ...]:
    """`start_from` as a tuple."""
    if stage.start_from is None:
        return ()
    return (stage.start_from,) if isinstance(stage.start_from, str) else stage.start_from


# Statistics of data that no objective updates: they get no gradient, and decaying them would falsify them.
STATISTICS = re.compile(r"(^|/)cmvn/|^audio/.*/running_(mean|var)$")


def trainable_paths(stage: Stage, paths: Sequence[str]) -> list[str]:
    """The paths the stage trains, in the given order: what its patterns match, and adapters. Statistics never train.

    Args:
      stage: what is asked for.
      paths: of all parameters, with those of the stage's adapters.

    Raises:
      UserError: a pattern is no regular expression, matches nothing, or matches a kernel that has an adapter; or there
        is neither a pattern nor an adapter.
    """
    adapters = {path for path in paths if is_adapter(path)}
    if not stage.trainable and not adapters:
        raise UserError(f"stage {stage.name!r} trains nothing: give at least one pattern in `trainable`")
    adapted = {path.rpartition("/")[0] + KERNEL for path in adapters}
    chosen = {path for path in adapters if not path.endswith(f"/{LORA_SCALE}")}
    for pattern in stage.trainable:
        try:
            matching = [path for path in paths if re.search(pattern, path) and path not in adapters]
        except re.error as error:
            raise UserError(f"stage {stage.name!r}: {pattern!r} is not a regular expression: {error}") from None
        if not matching:
            components = ", ".join(dict.fromkeys(path.split("/")[0] for path in paths))
            raise UserError(
                f"stage {stage.name!r}: trainable pattern {pattern!r} matches no parameter; components are {components}"
            )
        both = [path for path in matching if path in adapted]
        if both:
            others = ",".join(other for other in stage.trainable if other != pattern)
            raise UserError(
                f"stage {stage.name!r}: trainable pattern {pattern!r} trains {both[0]}, which has an adapter "
                f"(stages.{stage.name}.lora) and stays as it is; leave the pattern out, as in "
                f"--config.stages.{stage.name}.trainable={others}"
            )
        chosen.update(matching)
    return [path for path in paths if path in chosen and not STATISTICS.search(path)]


def adapts(stage: Stage, path: str) -> bool:
    """Whether adapters of the stage change what this parameter does: it is one, or the kernel one is added to."""
    if stage.lora is None or not (path.endswith(KERNEL) or is_adapter(path)):
        return False
    return any(re.search(target, path.rpartition("/")[0]) for target in stage.lora.targets)


def trained_so_far(stage: Stage, stages: Sequence[Stage], paths: Sequence[str]) -> set[str]:
    """What this stage or any stage it starts from has trained: the parameters it contributes to a stage with several
    starts.
    """
    by_name = {other.name: other for other in stages}
    # Not `trainable_paths`: a pattern may be for a head that was dropped when its stage ended.
    trained = {path for path in paths if any(re.search(p, path) for p in stage.trainable) or adapts(stage, path)}
    for start in starts_of(stage):
        # A path contributes a whole model.
        trained |= trained_so_far(by_name[start], stages, paths) if start in by_name else set(paths)
    return trained


def count_parameters(flat: Mapping[str, Any]) -> int:
    """Number of elements of a flat tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in flat.values())


def parameter_counts(flat: Mapping[str, Any], trainable: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Top-level component -> (trainable, frozen) number of elements."""
    chosen = set(trainable)
    counts: dict[str, tuple[int, int]] = {}
    for path, leaf in flat.items():
        component = path.split("/")[0]
        train, frozen = counts.get(component, (0, 0))
        size = math.prod(leaf.shape)
        counts[component] = (train + size, frozen) if path in chosen else (train, frozen + size)
    return counts


def stage_table(stages: Sequence[Stage], counts_by_stage: Mapping[str, Mapping[str, tuple[int, int]]]) -> str:
    """What every stage trains, as text: one line per stage and component.

    Args:
      stages: the curriculum.
      counts_by_stage: stage name -> its `parameter_counts`.
    """
    rows = [("stage", "component", "trainable", "frozen", "steps", "rate", "starts from")]
    for stage in stages:
        counts = dict(counts_by_stage[stage.name])
        counts["total"] = (sum(t for t, _ in counts.values()), sum(f for _, f in counts.values()))
        for index, (component, (train, frozen)) in enumerate(counts.items()):
            first = (
                stage.title,
                str(stage.steps),
                f"{stage.learning_rate:g}",
                " + ".join(starts_of(stage)) or "scratch",
            )
            title, steps, rate, start = first if index == 0 else ("", "", "", "")
            rows.append((title, component, f"{train:,}", f"{frozen:,}", steps, rate, start))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right_aligned = (2, 3, 4, 5)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right_aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
