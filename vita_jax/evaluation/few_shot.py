"""Few-shot evaluation of a Flamingo: every query with 0, 4, 8, ... demonstrations, as lines and as figures.

A line is {"question_id", "id", "task", "kind", "shots", "choice", "demonstrations": [ids], "prompt", "truth", "answer",
"right"}, and where the query has choices "ranked", the likeliest of them, and "ranked_right"; kept lines also have
"model_id" and "asked" (see `asking`). The figures are {"few_shot": {task: {"choice", "shots": {count: see
`shot_figures`}, "changes": [see `comparison.compare_groups`, from each count to the next]}}}.

Answers are greedy (open_flamingo searches with three beams) and compared as `scoring` says; choices are ranked by their
mean log-likelihood (`open_flamingo/eval/evaluate.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.document_examples import DocumentContext
from vita_jax.data.few_shot import (
    QUERIES,
    SUPPORT,
    FewShotOptions,
    Prompt,
    Shot,
    draw,
    make_prompt,
    most_similar,
    read_pictures,
    read_shots,
)
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import ID
from vita_jax.evaluation.asking import KeptAnswers, mark
from vita_jax.evaluation.bootstrap import interval
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.evaluation.results import align, percent
from vita_jax.evaluation.scoring import is_right
from vita_jax.inference.generate import LENGTH_BUCKETS, Params, bucket
from vita_jax.inference.generate_flamingo import generate_flamingo
from vita_jax.models.flamingo import Flamingo, FlamingoInputs
from vita_jax.ops.losses import IGNORE_LABEL, shift_labels
from vita_jax.training.experiment import ExperimentConfig, build_model, clip_frames, data_folder

Progress = Callable[[int, int], None]
Line = dict[str, Any]
Embeddings = dict[tuple[str, str], np.ndarray]

# Pictures whose embeddings are computed at a time.
PICTURES_AT_ONCE = 32
# What ends an answer that did not end by itself, see `open_flamingo/eval/vqa_metric.py` and `eval_model.py`.
_AFTER_ANSWER, _AFTER_CAPTION = re.compile(r"Question|Answer|Short"), re.compile(r"Output")


@dataclasses.dataclass(frozen=True)
class FewShotSubject:
    """What is measured.

    Attributes:
      model, params: the network.
      context: how texts and pictures become inputs.
      folder: with queries, support and media.
      frames: of a clip, as in training.
      batch_size: prompts per call.
      max_new_tokens: the longest answer.
    """

    model: Flamingo
    params: Params
    context: DocumentContext
    folder: Path
    frames: int = 8
    batch_size: int = 16
    max_new_tokens: int = 24


# A run's queries, below its data folder, and what comes of them, below its own.
FOLDER, RESULT, LINES = "few_shot", "few_shot.json", "few_shot.jsonl"


def subject_of(config: ExperimentConfig, params: Params, tokenizer: Tokenizer, folder: Path | None) -> FewShotSubject:
    """A trained Flamingo; `folder`: of the queries, None for those in the data of its run."""
    return FewShotSubject(
        build_model(config),
        params,
        DocumentContext(tokenizer, config.image),
        data_folder(config) / FOLDER if folder is None else folder,
        clip_frames(config),
    )


# ---- the whole ------------------------------------------------------------------------------------------------------


def evaluate_few_shot(
    subject: FewShotSubject,
    options: FewShotOptions,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    kept: KeptAnswers | None = None,
    identity: str = "",
) -> tuple[dict[str, Any], list[Line]]:
    """Asks every query once for each number of shots.

    Args:
      tasks: names of those to measure; None = all.
      limit: at most so many queries of each kind of each task, the first ones.
      progress: called with (answered, total), first with those that were kept.
      kept: gets the lines of every batch, and has those of an earlier call; None = they are not kept.
      identity: of the model, for `kept`; see `opening.identity`.

    Returns:
      The figures, and a line for every query and number of shots; see the top of this file.

    Raises:
      UserError: no such folder or task, a file that is missing or damaged, or a pool smaller than the shots.
    """
    queries, support = read_shots(subject.folder / QUERIES), read_shots(subject.folder / SUPPORT)
    known = list(dict.fromkeys(query.task for query in queries))
    for task in tasks or ():
        if task not in known:
            raise UserError(f"{subject.folder} has no task {task!r}; tasks: {', '.join(known)}")
    queries = _first(queries, tasks or known, limit)
    pools: dict[str, list[Shot]] = {}
    for shot in support:
        pools.setdefault(shot.pool, []).append(shot)
    embeddings = picture_embeddings(subject, queries, pools) if options.choice == "similar" else {}
    lines: list[Line] = []
    counts = {task: shots_of(task, queries, pools, options) for task in tasks or known}
    total = sum(len(counts[query.task]) for query in queries)
    for shots in options.shots:
        asked = [query for query in queries if shots in counts[query.task]]
        chosen = [_demonstrations(query, pools, shots, options, embeddings) for query in asked]
        shown = None if progress is None else _from(progress, len(lines), total)
        lines += answer_queries(subject, asked, chosen, shots, options, kept, identity, shown)
    return {"few_shot": figures(lines, options)}, lines


def _from(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one number of shots as that of all."""
    return lambda done, _: progress(before + done, total)


def _first(queries: Sequence[Shot], tasks: Sequence[str], limit: int | None) -> list[Shot]:
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} must be at least 1")
    taken: dict[tuple[str, str], int] = {}
    kept = []
    for query in queries:
        key = (query.task, query.kind)
        if query.task in tasks and (limit is None or taken.get(key, 0) < limit):
            taken[key] = taken.get(key, 0) + 1
            kept.append(query)
    return kept


def shots_of(
    task: str, queries: Sequence[Shot], pools: Mapping[str, Sequence[Shot]], options: FewShotOptions
) -> tuple[int, ...]:
    """The numbers of shots that all pools of a task are large enough for; a task without support has none but 0.

    Raises:
      UserError: there are none.
    """
    least = min((len(pools.get(query.pool, ())) for query in queries if query.task == task), default=0)
    fit = tuple(shots for shots in options.shots if shots <= least)
    if not fit:
        raise UserError(f"task {task!r}: its smallest pool has {least} demonstrations; ask for fewer shots")
    return fit


def _demonstrations(
    query: Shot, pools: Mapping[str, Sequence[Shot]], shots: int, options: FewShotOptions, embeddings: Embeddings
) -> list[Shot]:
    pool = pools.get(query.pool, [])
    count = shots or min(options.zero_shot_texts, len(pool))
    if options.choice == "similar" and shots:
        places = most_similar(query, pool, count, embeddings)
    else:
        places = draw(query, pool, count, options.seed)
    return [pool[place] for place in places]


# ---- the model ------------------------------------------------------------------------------------------------------


def answer_queries(
    subject: FewShotSubject,
    queries: Sequence[Shot],
    demonstrations: Sequence[Sequence[Shot]],
    shots: int,
    options: FewShotOptions,
    kept: KeptAnswers | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> list[Line]:
    """The lines of queries with the same number of shots, in their order; see `evaluate_few_shot`."""
    prompts = [
        make_prompt(query, shown, shots, subject.context, options.separator)
        for query, shown in zip(queries, demonstrations, strict=True)
    ]
    check_room(subject, queries, prompts, shots)
    names = [f"{query.task} {query.id}, {shots} shots, {options.choice}" for query in queries]
    marks = [_mark(subject, *pair, identity) for pair in zip(queries, prompts, strict=True)]
    known = [kept and kept.find(*pair) for pair in zip(names, marks, strict=True)]  # None where it is to be asked
    left = [place for place, line in enumerate(known) if line is None]
    done = len(queries) - len(left)
    if progress is not None:
        progress(done, len(queries))
    chosen = [queries[place] for place in left], [prompts[place] for place in left]
    for places in batches_of(*chosen, subject.batch_size):
        said = answer_batch(subject, *([part[place] for place in places] for part in chosen))
        for place, (answer, ranked) in zip((left[place] for place in places), said, strict=True):
            shown = [one.id for one in demonstrations[place]]
            line = {ID: names[place], **line_of(queries[place], shots, options.choice, shown, answer, ranked)}
            whose = {} if kept is None else {"model_id": kept.model_name, "asked": marks[place]}
            known[place] = {**line, "prompt": prompts[place].text, **whose}
        if kept is not None:
            kept.add([known[left[place]] for place in places])
        done += len(places)
        if progress is not None:
            progress(done, len(queries))
    return known


def _mark(subject: FewShotSubject, query: Shot, prompt: Prompt, identity: str) -> str:
    """Stands for everything that a line depends on."""
    paths = [(kind, name, subject.folder / name) for kind, name in prompt.files]
    files = [(kind, name, path.stat().st_size if path.is_file() else None) for kind, name, path in paths]
    how = [subject.frames, subject.max_new_tokens, identity]
    return mark([prompt.text, files, query.kind, query.answer, query.choices, *how])


def answer_batch(
    subject: FewShotSubject, queries: Sequence[Shot], prompts: Sequence[Prompt]
) -> list[tuple[str, str | None]]:
    """(answer, likeliest choice or None) of at most `batch_size` queries, whose prompts go together."""
    context = subject.context
    images = batch_pictures(subject, prompts)
    inputs = batch_inputs([(p.ids, p.times) for p in prompts], images, subject.batch_size, context.tokenizer.pad_id)
    generated = generate_flamingo(
        subject.model,
        subject.params,
        inputs,
        max_new_tokens=subject.max_new_tokens,
        stop_tokens=(context.end_of_chunk, context.eos),
        pad_token=context.tokenizer.pad_id,
    )
    tokens, lengths = jax.device_get((generated.tokens, generated.lengths))
    answers = []
    for row, query in enumerate(queries):
        ids = [i for i in tokens[row, : lengths[row]].tolist() if i < context.tokenizer.vocab_size]
        answers.append(clean_answer(context.tokenizer.decode(ids), bool(query.question)))
    return list(zip(answers, rank_choices(subject, queries, prompts, images), strict=True))


def check_room(subject: FewShotSubject, queries: Sequence[Shot], prompts: Sequence[Prompt], shots: int) -> None:
    """Raises UserError if a prompt with its answer is longer than what the language model was trained for."""
    room = subject.model.config.language.max_positions - subject.max_new_tokens
    for query, prompt in zip(queries, prompts, strict=True):
        if len(prompt.ids) > room:
            raise UserError(
                f"query {query.id!r}: its prompt of {shots} shots has {len(prompt.ids)} tokens, the language model has "
                f"room for {room}; ask for fewer shots"
            )


def line_of(
    query: Shot, shots: int, choice: str, demonstrations: Sequence[str], answer: str, ranked: str | None
) -> Line:
    """What came of one query; see the top of this file."""
    right = is_right(query.kind, answer, query.answer)
    line: Line = {"id": query.id, "task": query.task, "kind": query.kind, "shots": shots, "choice": choice}
    line |= {"demonstrations": list(demonstrations), "truth": query.answer, "answer": answer, "right": right}
    return line if ranked is None else {**line, "ranked": ranked, "ranked_right": ranked == query.answer}


def clean_answer(text: str, is_question: bool) -> str:
    """What counts of generated text: up to what looks like the next demonstration; of a short answer also up to its
    first comma, of a caption without quotation marks.
    """
    if is_question:
        return _AFTER_ANSWER.split(text, maxsplit=1)[0].split(", ", maxsplit=1)[0].strip()
    return _AFTER_CAPTION.split(text, maxsplit=1)[0].replace('"', "").strip()


def batches_of(queries: Sequence[Shot], prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Places of prompts that go together: equally many pictures, or clips, and of similar length."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for place, prompt in enumerate(prompts):
        kinds = {kind for kind, _ in prompt.files}
        if len(kinds) > 1:
            raise UserError(f"query {queries[place].id!r}: its prompt has pictures and clips; a pool has either")
        key = (kinds.pop(), len(prompt.files), bucket(len(prompt.ids), LENGTH_BUCKETS))
        groups.setdefault(key, []).append(place)
    for _, places in sorted(groups.items()):
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def batch_pictures(subject: FewShotSubject, prompts: Sequence[Prompt]) -> np.ndarray:
    """(batch_size t f S S 3) uint8; rows beyond the prompts are black."""
    frames = subject.frames if prompts[0].files[0][0] == "video" else 1
    files = list(dict.fromkeys(file for prompt in prompts for file in prompt.files))
    known = dict(zip(files, read_pictures(files, subject.folder, subject.context, frames), strict=True))
    rows = np.stack([np.stack([known[file] for file in prompt.files]) for prompt in prompts])
    return np.pad(rows, ((0, subject.batch_size - len(rows)), *((0, 0),) * 5))


def batch_inputs(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], images: np.ndarray, batch_size: int, pad_token: int
) -> FlamingoInputs:
    """Rows of (ids, times), padded at the end to one length; rows beyond them are empty.

    images: (batch_size t f S S 3).
    """
    length = bucket(max(len(ids) for ids, _ in rows), LENGTH_BUCKETS)
    tokens, times = np.full((batch_size, length), pad_token, np.int32), np.zeros((batch_size, length), np.int32)
    segments = np.zeros((batch_size, length), np.int32)
    for row, (ids, seen) in enumerate(rows):
        tokens[row, : len(ids)], times[row, : len(ids)], segments[row, : len(ids)] = ids, seen, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return FlamingoInputs(tokens, positions, segments, times, images)


def rank_choices(
    subject: FewShotSubject, queries: Sequence[Shot], prompts: Sequence[Prompt], images: np.ndarray
) -> list[str | None]:
    """For every query of a batch the likeliest of its choices; None where there are none.

    One pass for the first choices of all queries, one for the second ones, and so on, so all have one shape.
    """
    context, scores = subject.context, [[] for _ in queries]
    for number in range(max((len(query.choices) for query in queries), default=0)):
        rows, labels = [], []
        for query, prompt in zip(queries, prompts, strict=True):
            choice = query.choices[number] if number < len(query.choices) else ""
            own = np.asarray(context.tokenizer.encode(choice, allow_special=False, add_bos=False), np.int32)
            rows.append((np.concatenate([prompt.ids, own]), np.pad(prompt.times, (0, len(own)), mode="edge")))
            labels.append(np.concatenate([np.full(len(prompt.ids), IGNORE_LABEL, np.int32), own]))
        inputs = batch_inputs(rows, images, subject.batch_size, context.tokenizer.pad_id)
        wanted = np.full(inputs.tokens.shape, IGNORE_LABEL, np.int32)
        for row, own in enumerate(labels):
            wanted[row, : len(own)] = own
        likelihoods = jax.device_get(mean_log_likelihood(subject.model, subject.params, inputs, wanted))
        for row, query in enumerate(queries):
            if number < len(query.choices):
                scores[row].append(float(likelihoods[row]))
    return [
        query.choices[int(np.argmax(own))] if query.choices else None
        for query, own in zip(queries, scores, strict=True)
    ]


@partial(jax.jit, static_argnames="model")
def mean_log_likelihood(model: Flamingo, params: Params, inputs: FlamingoInputs, labels: jax.Array) -> jax.Array:
    """Of each row's labelled tokens, (b,) float32; labels (b s), -100 elsewhere. 0 without any."""
    hidden = model.apply({"params": params}, inputs)
    logits = model.apply({"params": params}, hidden, method="logits").astype(jnp.float32)
    targets = shift_labels(jnp.asarray(labels), inputs.segment_ids)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    counted = targets != IGNORE_LABEL
    return jnp.where(counted, chosen, 0.0).sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)


@partial(jax.jit, static_argnames="model")
def _embed(model: Flamingo, params: Params, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images, method="picture_embedding")


def picture_embeddings(
    subject: FewShotSubject, queries: Sequence[Shot], pools: Mapping[str, Sequence[Shot]]
) -> Embeddings:
    """File -> (e,) of length 1: of every picture of the queries and of their pools; of a clip the mean over frames."""
    wanted = [*queries, *(shot for pool in dict.fromkeys(q.pool for q in queries) for shot in pools.get(pool, ()))]
    found: Embeddings = {}
    for kind, frames in (("image", 1), ("video", subject.frames)):
        files = [file for file in dict.fromkeys(shot.file for shot in wanted) if file[0] == kind]
        for start in range(0, len(files), PICTURES_AT_ONCE):
            part = files[start : start + PICTURES_AT_ONCE]
            pictures = read_pictures(part, subject.folder, subject.context, frames)
            padded = np.pad(pictures, ((0, PICTURES_AT_ONCE - len(part)), *((0, 0),) * 4))
            flat = _embed(subject.model, subject.params, padded.reshape(-1, *padded.shape[2:]))
            means = np.asarray(jax.device_get(flat)).reshape(len(padded), frames, -1).mean(axis=1)
            found |= {file: mean / np.linalg.norm(mean) for file, mean in zip(part, means, strict=False)}
    return found


# ---- figures --------------------------------------------------------------------------------------------------------


def shot_figures(lines: Sequence[Line], field: str, seed: int) -> dict[str, Any]:
    """The figures of one task with one number of shots.

    Args:
      lines: of it.
      field: "right" or "ranked_right".
      seed: of the bootstrap.

    Returns:
      {"title", "n", "accuracy" (mean over kinds), "low", "high" (95 % bootstrap interval), "by_kind" {kind:
      {"accuracy", "n"}}, "outcomes" {kind: {id: right or not}}}.
    """
    outcomes: dict[str, dict[str, bool]] = {}
    for line in lines:
        outcomes.setdefault(line["kind"], {})[line["id"]] = bool(line[field])
    parts = [np.array(list(own.values()), float) for own in outcomes.values()]
    low, high = interval(parts, seed)
    return {
        "title": f"{lines[0]['task']}, {lines[0]['shots']} shots",
        "n": len(lines),
        "accuracy": float(np.mean([part.mean() for part in parts])),
        "low": low,
        "high": high,
        "by_kind": {kind: {"accuracy": sum(own.values()) / len(own), "n": len(own)} for kind, own in outcomes.items()},
        "outcomes": outcomes,
    }


def figures(lines: Sequence[Line], options: FewShotOptions) -> dict[str, Any]:
    """Of all lines, by task and number of shots; tasks with choices have a second set under `<task>_ranked`."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        fields = {task: "right"} | ({f"{task}_ranked": "ranked_right"} if "ranked_right" in own[0] else {})
        counts = [shots for shots in options.shots if any(line["shots"] == shots for line in own)]
        for name, field in fields.items():
            shots = {
                str(count): shot_figures([line for line in own if line["shots"] == count], field, options.seed)
                for count in counts
            }
            steps = zip(counts, counts[1:], strict=False)
            changes = [{"from": a, "to": b, **compare_groups(shots[str(a)], shots[str(b)])} for a, b in steps]
            found[name] = {"choice": options.choice, "shots": shots, "changes": changes}
    return found


def format_few_shot(result: Mapping[str, Any]) -> str:
    """A table: a row for each task, a column for each number of shots, accuracies with their intervals."""
    tasks = result["few_shot"]
    counts = sorted({int(count) for task in tasks.values() for count in task["shots"]})
    rows = [("task", "n", *(f"{count} shots" for count in counts))]
    for name, task in tasks.items():
        cells = [_cell(task["shots"].get(str(count))) for count in counts]
        rows.append((name, str(max(shots["n"] for shots in task["shots"].values())), *cells))
    return "\n".join(align(rows))


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{percent(found['accuracy'])} ({100 * found['low']:.1f} .. {100 * found['high']:.1f})"
