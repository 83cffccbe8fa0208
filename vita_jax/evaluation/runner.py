"""Takes the figures of a benchmark: asks, listens, speaks, and puts what came of it into one result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from vita_jax.data.conversations import sees_video
from vita_jax.data.prompts import join_state_symbol
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import Question
from vita_jax.evaluation.answering import Progress, answer_items
from vita_jax.evaluation.asking import AskOptions, KeptAnswers, ask_questions
from vita_jax.evaluation.benchmarks import Benchmark, Group, get_benchmark
from vita_jax.evaluation.figures import score
from vita_jax.evaluation.hearing import NOISE_GROUP, input_head_figures, recogniser_figures, why_no_input_head
from vita_jax.evaluation.items import ITEMS, Item, read_items, stratified
from vita_jax.evaluation.recognition import load_recogniser, why_no_recogniser
from vita_jax.evaluation.subject import Subject
from vita_jax.evaluation.voice import voice_figures, why_no_voice
from vita_jax.evaluation.waves import real_time_factors
from vita_jax.inference.generate import Params
from vita_jax.training.experiment import ExperimentConfig

Lines = list[dict[str, Any]]


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
    keep_sounds: bool = False,
    cache_dtype: jnp.dtype | None = None,
    kept: KeptAnswers | None = None,
    identity: str = "",
) -> dict[str, Any]:
    """Answers a benchmark and scores it, and measures whatever else belongs to it.

    Args:
      config, params, tokenizer: the model, and where its run and data are.
      groups: names of the groups to measure; None takes all that the model and the data can have, and "real_time"
        where the benchmark is of sound.
      limit: at most so many items of each kind of each group, see `stratified`.
      progress: called with (answered, total).
      keep_sounds: writes some of what was said to `<run_dir>/evaluation/audio`, listed under "sounds".
      cache_dtype: of keys and values while questions are answered, see `generate`.
      kept: gets the answers as they are made, and has those of an earlier call; None = they are not kept.
      identity: of the model, for `kept`; see `AskOptions`.

    Returns:
      The result described in `results`, with its lines as "lines".

    Raises:
      UserError: an unknown benchmark or group, no data, or a group asked for by name that cannot be measured.
    """
    started = time.monotonic()
    bench = get_benchmark(benchmark)
    subject = Subject(config, params, tokenizer, benchmark, limit, batch_size, keep_sounds)
    items = read_items(subject.root / ITEMS)
    chosen, left_out = _choose(subject, bench, items, groups)
    if limit is not None:
        items = stratified(items, limit)
    answering = {group.items for group in chosen if group.is_answered or group.name == "voice_answers"}
    asked = [item for item in items if item.group in answering]
    options = AskOptions(max_new_tokens, cache_dtype=cache_dtype, identity=identity)
    answers = _answers(subject, asked, options, kept, progress)
    result = score(dataclasses.replace(bench, groups=tuple(chosen)), asked, answers, subject.context.template)
    found, lines, sounds = _measure(subject, chosen, items, list(zip(asked, answers, strict=True)))
    found |= result["groups"]
    for group in chosen:
        if group.name not in found:
            left_out[group.name] = "no spoken question was answered"
    more: dict[str, Any] = {"lines": result["lines"] + lines} | ({"sounds": sounds} if sounds else {})
    if groups is None and any(not group.is_answered for group in bench.groups):
        more["real_time"] = real_time_factors(config.model, params)
    return {
        **result,
        "groups": {group.name: found[group.name] for group in chosen if group.name in found},
        "left_out": left_out,
        **more,
        "limit": limit,
        "seconds": time.monotonic() - started,
    }


def _answers(
    subject: Subject, items: Sequence[Item], options: AskOptions, kept: KeptAnswers | None, progress: Progress | None
) -> list[str]:
    """What the model says to each item, with its state symbol in front; nothing that was kept is asked again."""
    if kept is None:
        how = {"batch_size": subject.batch_size, "max_new_tokens": options.max_new_tokens, "progress": progress}
        how["cache_dtype"] = options.cache_dtype
        return answer_items(subject.model, subject.params, subject.context, items, subject.root, **how)
    questions = [Question(item.id, item.question, item.media) for item in items]
    lines = ask_questions(subject, questions, subject.root, kept, options, progress)
    return [join_state_symbol(line.get("state"), line["text"], subject.context.template) for line in lines]


def _measure(
    subject: Subject, groups: Sequence[Group], items: Sequence[Item], answered: Sequence[tuple[Item, str]]
) -> tuple[dict[str, dict[str, Any]], Lines, list[dict[str, Any]]]:
    """Figures and lines of the groups that are not made of answers alone, and the sounds that were kept."""
    figures: dict[str, dict[str, Any]] = {}
    lines: Lines = []
    sounds: list[dict[str, Any]] = []
    by_measure: dict[str, list[Group]] = {}
    for group in groups:
        by_measure.setdefault(group.measure, []).append(group)
    for group in by_measure.get("input_head", ()):
        figures[group.name], named = input_head_figures(subject, group, items)
        lines += named
    if "recogniser" in by_measure or "voice" in by_measure:
        recogniser = load_recogniser(subject.config, subject.params)
    if reading := by_measure.get("recogniser"):
        clips = [item for item in items if item.group == reading[0].items]
        more, heard = recogniser_figures(subject, reading, clips, recogniser)
        figures, lines = figures | more, lines + heard
    if voices := by_measure.get("voice"):
        # Every voice is heard as a whole, however the model itself may be set up to listen.
        spoken = [(item, answer) for item, answer in answered if item.group in {group.items for group in voices}]
        more, read, sounds = voice_figures(subject, voices, recogniser.in_chunks(-1, -1), spoken)
        figures, lines = figures | more, lines + read
    return figures, lines, sounds


def _choose(
    subject: Subject, bench: Benchmark, items: Sequence[Item], wanted: Sequence[str] | None
) -> tuple[list[Group], dict[str, str]]:
    """The groups to measure, and why others that nobody asked for by name are left out."""
    known = {group.name for group in bench.groups}
    present = {item.group for item in items}
    for name in sorted(present | set(wanted or ())):
        if name not in known:
            raise UserError(f"benchmark {bench.name!r} has no group {name!r}; groups: {', '.join(sorted(known))}")
    chosen, left_out = [], {}
    for group in bench.groups:
        if wanted is not None and group.name not in wanted:
            continue
        reason = _why_not(subject, group, items)
        if reason is None:
            chosen.append(group)
        elif wanted is None:
            left_out[group.name] = reason
        else:
            raise UserError(f"the group {group.name!r} of benchmark {bench.name!r} cannot be measured: {reason}")
    return chosen, left_out


def _why_not(subject: Subject, group: Group, items: Sequence[Item]) -> str | None:
    """Why a group cannot be measured; None if it can."""
    if group.measure == "voice":
        reason = why_no_voice(subject, group.name) or why_no_recogniser(subject.config)
        if reason is not None or group.source is None:
            return reason
    sources = (group.items, NOISE_GROUP) if group.measure == "input_head" else (group.items,)
    for source in sources:
        mine = [item for item in items if item.group == source]
        if not mine:
            return f"the data has no items of {source!r}"
        if subject.config.model.audio is None and any(item.audio is not None for item in mine):
            return "the model does not hear"
        if not sees_video(subject.config.prompt) and any(item.video is not None for item in mine):
            return "the model sees no videos"
    if group.measure == "recogniser":
        return why_no_recogniser(subject.config)
    return why_no_input_head(subject) if group.measure == "input_head" else None
