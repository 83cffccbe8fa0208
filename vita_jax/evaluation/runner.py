"""Asks a model every question of a benchmark, and what comes of it: a result, its table, its file in the run.

Every file is decoded once and goes through its tower once, however many questions there are about it; the questions
then read its features as `extra_features`. Batches are padded to one length per number of tile slots and tokens of
sound, so only a handful of programs is compiled.

A result is JSON:
  {"benchmark", "title", "num_items", "limit", "seconds", "groups": {name: group}, "examples": [...]}
  group: {"title", "n", "accuracy" (mean over kinds), "by_kind", "by_language", "by_num_digits" (key -> {"accuracy",
  "n"}), "prior", "floor", "goal", "floor_reached", "goal_reached" (the last four and the prior may be null),
  "refused" (share of answers that begin with the noise symbol)}; accuracy of transcripts: 1 - character error rate
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vita_jax.data.audio import pad_clips
from vita_jax.data.examples import (
    Example,
    ExampleContext,
    TileTable,
    join_tables,
    media_from_file,
    prompt_example,
    tile_table,
)
from vita_jax.data.prompts import stop_ids
from vita_jax.data.templates import Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks import Benchmark, Group, get_benchmark
from vita_jax.evaluation.items import ITEMS, Item, read_items, stratified
from vita_jax.evaluation.scoring import (
    answer_prior,
    character_errors,
    error_rate,
    is_refusal,
    is_right,
    normalise,
)
from vita_jax.inference.generate import LENGTH_BUCKETS, TILE_BUCKETS, Params, bucket, generate
from vita_jax.models.vita import Vita, VitaInputs
from vita_jax.training.experiment import ExperimentConfig, build_model, data_folder, example_context

Progress = Callable[[int, int], None]

# Name of the result at the end of a run, beside those of its stages.
FINAL = "final"
# Tiles that go through the tower at a time.
TILES_AT_ONCE = 32
# Sounds that go through the audio tower at a time, and the multiple of frames they are padded to.
CLIPS_AT_ONCE, CLIP_FRAMES = 8, 128
# Round numbers of tokens of sound in a question.
SOUND_BUCKETS = (0, 16, 32, 64, 128, 256)
# Answered items that a result keeps per group, for people to look at.
EXAMPLES_PER_GROUP = 24


# ---------------------------------------------------------------------------------------------------------------------
# Answering
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Question:
    """An item ready to be asked; `index`: its place in the caller's list, `files`: what it is about.

    `sound` is the number of tokens of sound.
    """

    index: int
    example: Example
    files: tuple[tuple[str, str], ...]
    sound: int


def answer_items(
    model: Vita,
    params: Params,
    context: ExampleContext,
    items: Sequence[Item],
    root: str | Path,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `items`; a state symbol is still in front.

    Args:
      root: the folder that the items' media paths start from.
      batch_size: questions per call.
      max_new_tokens: the longest answer.
      progress: called with (answered, total) after every batch.

    Raises:
      UserError: a file is missing or damaged.
    """
    files = dict.fromkeys(file for item in items for file in item.media)
    tables = {file: tile_table([media_from_file(Path(root) / file[1], file[0])], context) for file in files}
    groups: dict[tuple[int, int], list[_Question]] = {}
    for index, item in enumerate(items):
        question = _question(index, item, tables, root, context)
        slots = bucket(len(question.example["tiles"]), TILE_BUCKETS)
        groups.setdefault((slots, bucket(question.sound, SOUND_BUCKETS)), []).append(question)
    answers = [""] * len(items)
    answered = 0
    for (slots, sound), questions in sorted(groups.items()):
        # Questions about one file next to each other: they share a batch, and its features.
        questions.sort(key=lambda question: (question.files, question.index))
        num_features = slots * context.layout.features_per_slot + sound
        length = bucket(max(len(question.example["tokens"]) for question in questions), LENGTH_BUCKETS)
        features: dict[tuple[str, str], np.ndarray] = {}
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            features = _batch_features(model, params, batch, tables, features)
            inputs = _batch_inputs(batch, features, num_features, length, batch_size)
            generated = generate(
                model,
                params,
                inputs,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_ids(context.tokenizer, context.template),
                pad_token=context.tokenizer.pad_id,
            )
            tokens, lengths = jax.device_get((generated.tokens, generated.lengths))
            for row, question in enumerate(batch):
                # A model's table may have more rows than its tokenizer has entries; those spell nothing.
                ids = [i for i in tokens[row, : lengths[row]].tolist() if i < context.tokenizer.vocab_size]
                answers[question.index] = context.tokenizer.decode(ids)
            answered += len(batch)
            if progress is not None:
                progress(answered, len(items))
    return answers


def _question(
    index: int,
    item: Item,
    tables: Mapping[tuple[str, str], TileTable],
    root: str | Path,
    context: ExampleContext,
) -> _Question:
    media = [media_from_file(Path(root) / path, kind) for kind, path in item.media]
    table = join_tables([tables[file] for file in item.media], context)
    sound = sum(clip.num_tokens for clip in table.clips)
    return _Question(index, prompt_example(item.question, media, context, table=table), item.media, sound)


@partial(jax.jit, static_argnames="model")
def _encode_tiles(model: Vita, params: Params, tiles: jax.Array) -> jax.Array:
    """tiles: (n S S 3) -> (n k d), each tile's part of the feature table."""
    return model.apply({"params": params}, tiles[:, None], method="encode_tiles")


@partial(jax.jit, static_argnames="model")
def _encode_clips(model: Vita, params: Params, features: jax.Array, lengths: jax.Array) -> jax.Array:
    """features (n f m), lengths (n,) -> (n p d), each clip's part of the feature table."""
    return model.apply({"params": params}, features[:, None], lengths[:, None], method="encode_audio")


def _batch_features(
    model: Vita,
    params: Params,
    batch: Sequence[_Question],
    tables: Mapping[tuple[str, str], TileTable],
    known: Mapping[tuple[str, str], np.ndarray],
) -> dict[tuple[str, str], np.ndarray]:
    """(t*k d), or (tokens d) of a sound, of every file of the batch; those of `known` are not computed again."""
    files = list(dict.fromkeys(file for question in batch for file in question.files))
    features = {file: known[file] for file in files if file in known}
    features |= _clip_features(model, params, [f for f in files if f not in known and f[0] == "audio"], tables)
    new = [file for file in files if file not in known and file[0] != "audio"]
    if not new:
        return features
    tiles = np.concatenate([tables[file].tiles for file in new])
    padded = np.pad(tiles, ((0, -len(tiles) % TILES_AT_ONCE), (0, 0), (0, 0), (0, 0)))
    chunks = np.split(padded, len(padded) // TILES_AT_ONCE)
    encoded = np.concatenate([jax.device_get(_encode_tiles(model, params, chunk)) for chunk in chunks])
    start = 0
    for file in new:
        count = len(tables[file].tiles)
        features[file] = encoded[start : start + count].reshape(-1, encoded.shape[-1])
        start += count
    return features


def _clip_features(
    model: Vita, params: Params, files: Sequence[tuple[str, str]], tables: Mapping[tuple[str, str], TileTable]
) -> dict[tuple[str, str], np.ndarray]:
    """(tokens d) of every sound; those of similar length go through the tower together."""
    features: dict[tuple[str, str], np.ndarray] = {}
    waiting = sorted(files, key=lambda file: len(tables[file].clips[0].features))
    for start in range(0, len(waiting), CLIPS_AT_ONCE):
        part = waiting[start : start + CLIPS_AT_ONCE]
        clips = [tables[file].clips[0] for file in part]
        frames = -(-len(clips[-1].features) // CLIP_FRAMES) * CLIP_FRAMES
        lengths = np.zeros(CLIPS_AT_ONCE, np.int32)
        lengths[: len(clips)] = [len(clip.features) for clip in clips]
        padded = pad_clips([clip.features for clip in clips], frames, clips[0].features.shape[1])
        padded = np.pad(padded, ((0, CLIPS_AT_ONCE - len(clips)), (0, 0), (0, 0)))
        encoded = jax.device_get(_encode_clips(model, params, padded, lengths))
        features |= {f: row[: clip.num_tokens] for f, row, clip in zip(part, encoded, clips, strict=False)}
    return features


def _batch_inputs(
    batch: Sequence[_Question],
    features: Mapping[tuple[str, str], np.ndarray],
    num_features: int,
    length: int,
    batch_size: int,
) -> VitaInputs:
    """(batch_size length) arrays and (batch_size num_features d) features; rows beyond the questions are empty."""

    def rows(name: str, fill: int) -> np.ndarray:
        out = np.full((batch_size, length), fill, np.int32)
        for row, question in enumerate(batch):
            values = question.example[name]
            out[row, : len(values)] = values
        return out

    extra = None
    if num_features:
        first = next(iter(features.values()))
        extra = np.zeros((batch_size, num_features, first.shape[-1]), first.dtype)
        for row, question in enumerate(batch):
            if question.files:
                table = np.concatenate([features[file] for file in question.files])
                extra[row, : len(table)] = table
    tiles = batch[0].example["tiles"]
    return VitaInputs(
        tokens=rows("tokens", 0),
        positions=rows("positions", 0),
        segment_ids=rows("segment_ids", 0),
        feature_index=rows("feature_index", -1),
        tiles=np.zeros((batch_size, 0, *tiles.shape[1:]), tiles.dtype),
        extra_features=extra,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def evaluate_params(
    config: ExperimentConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    benchmark: str = "quickstart",
    groups: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answers a benchmark and scores it.

    Args:
      config, params, tokenizer: the model, and where its data is.
      groups: names of the groups to ask; None asks all that the data has.
      limit: at most so many items of each kind of each group, see `stratified`.
      progress: called with (answered, total).

    Returns:
      The result described at the top of this file.

    Raises:
      UserError: unknown benchmark or group, or no data.
    """
    started = time.monotonic()
    bench = get_benchmark(benchmark)
    root = benchmark_folder(config, benchmark)
    items = read_items(root / ITEMS)
    known = {group.name for group in bench.groups}
    for name in sorted({item.group for item in items} | set(groups or ())):
        if name not in known:
            raise UserError(f"benchmark {benchmark!r} has no group {name!r}; groups: {', '.join(sorted(known))}")
    if groups is not None:
        items = [item for item in items if item.group in groups]
    if limit is not None:
        items = stratified(items, limit)
    context = example_context(config, tokenizer)
    answers = answer_items(
        build_model(config),
        params,
        context,
        items,
        root,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    result = score(bench, items, answers, context.template)
    return {**result, "limit": limit, "seconds": time.monotonic() - started}


def benchmark_folder(config: ExperimentConfig, benchmark: str = "quickstart") -> Path:
    """Where the items and media of a benchmark are."""
    return data_folder(config) / "benchmarks" / benchmark


def score(
    benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str], template: Template | None = None
) -> dict[str, Any]:
    """The figures of answered items, without time and limit."""
    measures = {group.name: group.measure for group in benchmark.groups}
    right = [
        is_refusal(answer, template)
        if measures[item.group] == "refusal"
        else is_right(item.kind, answer, item.answer, template)
        for item, answer in zip(items, answers, strict=True)
    ]
    groups, examples = {}, []
    for group in benchmark.groups:
        indices = [index for index, item in enumerate(items) if item.group == group.name]
        if not indices:
            continue
        said = [answers[i] for i in indices]
        groups[group.name] = _group_figures(
            group, [items[i] for i in indices], said, [right[i] for i in indices], template
        )
        for i in _sample(indices, items):
            # No longer than it can be read; the comparison has seen all of it.
            answer = normalise(answers[i], template)[:200]
            if measures[group.name] == "refusal" and right[i]:
                answer = f"(refused) {answer}"
            outcome = {"truth": items[i].answer, "answer": answer, "right": right[i]}
            examples.append({**dataclasses.asdict(items[i]), **outcome})
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "num_items": len(items),
        "groups": groups,
        "examples": examples,
    }


def _sample(indices: Sequence[int], items: Sequence[Item]) -> list[int]:
    """Up to EXAMPLES_PER_GROUP of the indices: kinds and languages in turn, unseen files and digit counts first."""
    strata: dict[tuple[str, str], list[int]] = {}
    for index in indices:
        strata.setdefault((items[index].kind, items[index].language), []).append(index)
    chosen: list[int] = []
    files: Counter[tuple[str, str] | None] = Counter()
    digits: Counter[int] = Counter()
    while len(chosen) < min(EXAMPLES_PER_GROUP, len(indices)):
        for waiting in filter(None, strata.values()):
            if len(chosen) == EXAMPLES_PER_GROUP:
                break
            index = min(waiting, key=lambda i: (files[items[i].media], digits[items[i].num_digits], i))
            waiting.remove(index)
            files[items[index].media] += 1
            digits[items[index].num_digits] += 1
            chosen.append(index)
    return chosen


def _group_figures(
    group: Group, items: Sequence[Item], answers: Sequence[str], right: Sequence[bool], template: Template | None
) -> dict[str, Any]:
    def accuracy_of(chosen: Sequence[int]) -> float:
        if group.measure != "transcript":
            return sum(right[i] for i in chosen) / len(chosen)
        return max(0.0, 1 - error_rate(character_errors(answers[i], items[i].answer, template) for i in chosen))

    def by(key: Callable[[Item], Any]) -> dict[str, dict[str, float]]:
        parts: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            parts.setdefault(key(item), []).append(index)
        return {str(name): {"accuracy": accuracy_of(part), "n": len(part)} for name, part in sorted(parts.items())}

    by_kind = by(lambda item: item.kind)
    accuracy = sum(part["accuracy"] for part in by_kind.values()) / len(by_kind)
    by_num_digits = by(lambda item: item.num_digits)
    by_num_digits.pop("0", None)
    return {
        "title": group.title,
        "n": len(items),
        "accuracy": accuracy,
        "by_kind": by_kind,
        "by_language": by(lambda item: item.language),
        "by_num_digits": by_num_digits,
        # A constant answer to sound that is no question is the refusal itself, and there is none for transcripts.
        "prior": answer_prior(items, template) if group.measure == "answer" else None,
        "refused": sum(is_refusal(answer, template) for answer in answers) / len(answers),
        "floor": group.floor,
        "goal": group.goal,
        "floor_reached": None if group.floor is None else accuracy >= group.floor,
        "goal_reached": None if group.goal is None else accuracy >= group.goal,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files and tables
# ---------------------------------------------------------------------------------------------------------------------


def evaluation_path(run_dir: str | Path, name: str) -> Path:
    """`<run_dir>/evaluation/<name>.json`; `name` is a stage, or "final"."""
    return Path(run_dir) / "evaluation" / f"{name}.json"


def save_result(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(path.name + ".partial")
        partial_file.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        partial_file.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def save_stage_evaluation(config: ExperimentConfig, stage_name: str, result: Mapping[str, Any]) -> Path:
    """Keeps the result reached after a stage ("final": at the end of the run). Returns its file."""
    path = evaluation_path(config.run_dir, stage_name)
    save_result(result, path)
    return path


def read_evaluation(run_dir: str | Path, name: str) -> dict[str, Any] | None:
    """A saved result, or None if there is none of that name."""
    path = evaluation_path(run_dir, name)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from None


def stage_accuracies(run_dir: str | Path, config: ExperimentConfig) -> list[tuple[str, dict[str, Any]]]:
    """(title, groups) of every stage of the run that has been evaluated, in order; "final" last if it is there.

    Stages are usually evaluated on a part of the benchmark, whose size is added to their title.
    """
    named = [(stage.title, stage.name) for stage in config.stages] + [(FINAL, FINAL)]
    found = [(title, read_evaluation(run_dir, name)) for title, name in named]
    return [
        (title if result["limit"] is None else f"{title} ({result['num_items']:,} questions)", result["groups"])
        for title, result in found
        if result is not None
    ]


def percent(value: float | None) -> str:
    """`93.4 %`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def verdict(group: Mapping[str, Any]) -> str:
    """What was reached, in words; empty where there is no floor."""
    if group["goal_reached"]:
        return "goal reached"
    if group["floor_reached"]:
        return "floor reached"
    return "" if group["floor"] is None else f"floor missed by {100 * (group['floor'] - group['accuracy']):.1f} points"


def align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a text table: first column to the left, the others to the right; the first row is underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        yield "  ".join(cells).rstrip()
        if number == 0:
            yield "-" * (sum(widths) + 2 * (len(widths) - 1))


def format_result(result: Mapping[str, Any]) -> str:
    """The result as text: one table of groups, then each group in parts."""
    groups = result["groups"]
    rows = [("group", "n", "accuracy", "prior", "floor", "goal", "")]
    for group in groups.values():
        figures = [percent(group[name]) for name in ("accuracy", "prior", "floor", "goal")]
        rows.append((group["title"], str(group["n"]), *figures, verdict(group)))
    lines = [f"benchmark {result['benchmark']}: {result['num_items']} questions in {result['seconds']:.0f} s"]
    if result.get("limit") is not None:
        lines[0] += f" (at most {result['limit']} of each kind)"
    lines += ["", *align(rows)]
    for group in groups.values():
        parts = [("kind", "by_kind"), ("language", "by_language"), ("digits", "by_num_digits")]
        refused = [] if not group.get("refused") else [("refused", percent(group["refused"]), str(group["n"]))]
        listed = [
            (f"{label} {name}", percent(part["accuracy"]), str(part["n"]))
            for label, key in parts
            for name, part in group[key].items()
        ]
        lines += ["", *align([(group["title"], "accuracy", "n"), *listed, *refused])]
    return "\n".join(lines)


def format_stages(run_dir: str | Path, config: ExperimentConfig) -> str:
    """Table of the accuracies after each evaluated stage; empty if there are none."""
    stages = stage_accuracies(run_dir, config)
    if not stages:
        return ""
    # The last one has been asked most, in the order of the benchmark.
    names = list(dict.fromkeys(name for _, groups in reversed(stages) for name in groups))
    rows = [("accuracy after stage", *names)]
    for title, groups in stages:
        rows.append((title, *(percent(groups[name]["accuracy"]) if name in groups else "-" for name in names)))
    return "\n".join(align(rows))
