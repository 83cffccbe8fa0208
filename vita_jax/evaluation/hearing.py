"""What the parts that hear make of sound: the input head's three classes, and the recogniser of stage 2.1a."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.audio import read_audio
from vita_jax.evaluation.answering import question_batches
from vita_jax.evaluation.benchmarks import Group
from vita_jax.evaluation.figures import Outcome, group_figures, outcome_lines
from vita_jax.evaluation.items import ITEMS, Item, read_items, stratified
from vita_jax.evaluation.recognition import Recogniser
from vita_jax.evaluation.scoring import character_errors
from vita_jax.evaluation.subject import Subject, benchmark_folder
from vita_jax.inference.generate import Params
from vita_jax.models.language.cache import last_valid
from vita_jax.models.state_head import INPUT_CLASSES
from vita_jax.models.vita import Vita, VitaInputs

# Groups of the speech benchmark whose items are speech and noise, and those of the written one that are text.
SPEECH_GROUP, NOISE_GROUP = "spoken", "noise"
TEXT_BENCHMARK, TEXT_GROUPS = "quickstart", ("typed", "text")
# Frames of 40 ms that a streaming encoder hears at a time, and how many such chunks it remembers.
CHUNK, LEFT_CHUNKS = 16, 4


# ---- input head -----------------------------------------------------------------------------------------------------


def why_no_input_head(subject: Subject) -> str | None:
    """Why the three classes cannot be measured; None if they can."""
    head = subject.config.model.state_head
    if subject.config.model.audio is None:
        return "the model does not hear"
    if head is None:
        return "the model has no state head"
    if head.place != "answer" or head.num_classes != len(INPUT_CLASSES):
        return f"its state head does not tell {', '.join(INPUT_CLASSES)} apart before an answer"
    if not (benchmark_folder(subject.config, TEXT_BENCHMARK) / ITEMS).is_file():
        return f"the data has no benchmark {TEXT_BENCHMARK!r}, whose questions are the text"
    return None


Lines = list[dict[str, Any]]


def input_head_figures(subject: Subject, group: Group, items: Sequence[Item]) -> tuple[dict[str, Any], Lines]:
    """How often the head names the class of the input, right before the answer would begin.

    Args:
      items: of the speech benchmark, those that are asked; speech and noise are taken from them.

    Returns:
      The group's figures, kinds being the classes, with "confusion": {"classes", "counts": rows are what it was,
      columns what it was taken for}; and its lines.
    """
    parts = {
        "speech": [item for item in items if item.group == SPEECH_GROUP],
        "noise": [item for item in items if item.group == NOISE_GROUP],
    }
    texts = _written_questions(subject, max(len(part) for part in parts.values()))
    asked = [(name, item) for name, part in parts.items() for item in part]
    taken_for = classify(subject, [item for _, item in asked], subject.benchmark)
    taken_for += classify(subject, texts, TEXT_BENCHMARK)
    asked += [("text", item) for item in texts]
    counts = confusion([name for name, _ in asked], taken_for)
    outcomes = [
        Outcome(item.id, name, item.language, name == taken, prompt=item.question, text=taken, truth=name)
        for (name, item), taken in zip(asked, taken_for, strict=True)
    ]
    figures = group_figures(group, outcomes, confusion={"classes": list(INPUT_CLASSES), "counts": counts})
    return figures, outcome_lines(group, outcomes)


def _written_questions(subject: Subject, wanted: int) -> list[Item]:
    """About `wanted` questions, half of them about pictures, evenly over kinds and languages."""
    items = read_items(benchmark_folder(subject.config, TEXT_BENCHMARK) / ITEMS)
    present = [name for name in TEXT_GROUPS if any(item.group == name for item in items)]
    chosen: list[Item] = []
    for name in present:
        part = [item for item in items if item.group == name]
        kinds = len({item.kind for item in part})
        chosen += stratified(part, max(1, -(-wanted // (len(present) * kinds))))
    return chosen


def classify(subject: Subject, items: Sequence[Item], benchmark: str) -> list[str]:
    """What the input head takes each item for, of INPUT_CLASSES."""
    root = benchmark_folder(subject.config, benchmark)
    taken_for = [""] * len(items)
    batches = question_batches(subject.model, subject.params, subject.context, items, root, subject.batch_size)
    for indices, inputs in batches:
        classes = np.asarray(_classes(subject.model, subject.params, inputs))
        for index, number in zip(indices, classes, strict=False):
            taken_for[index] = INPUT_CLASSES[number]
    return taken_for


@partial(jax.jit, static_argnames="model")
def _classes(model: Vita, params: Params, inputs: VitaInputs) -> jax.Array:
    """The likeliest class at the last position of every prompt, (b,) int32."""
    hidden = model.apply({"params": params}, inputs)
    last = jnp.maximum(last_valid(inputs.segment_ids), 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return jnp.argmax(model.apply({"params": params}, hidden, method="state_logits")[:, 0], axis=-1)


def confusion(truths: Sequence[str], taken_for: Sequence[str]) -> list[list[int]]:
    """How often each class was taken for each: counts[truth][taken], in the order of INPUT_CLASSES."""
    counts = [[0] * len(INPUT_CLASSES) for _ in INPUT_CLASSES]
    for truth, taken in zip(truths, taken_for, strict=True):
        counts[INPUT_CLASSES.index(truth)][INPUT_CLASSES.index(taken)] += 1
    return counts


# ---- recogniser -----------------------------------------------------------------------------------------------------


def recogniser_figures(
    subject: Subject, groups: Sequence[Group], items: Sequence[Item], recogniser: Recogniser
) -> tuple[dict[str, dict[str, Any]], Lines]:
    """Character error rates of the recogniser, over whole clips or in chunks, as each group's name says; and the lines.

    Args:
      groups: of the measure "recogniser"; all are made of `items`.
      items: clips, whose answers are what is said in them; those without sound do not count.
    """
    items = [item for item in items if item.audio is not None]
    waves = [read_audio(subject.root / item.audio, subject.config.audio) for item in items]
    figures, lines = {}, []
    for group in groups:
        # A model may be configured to stream; "full" is then still the whole clip.
        chunk, left = (CHUNK, LEFT_CHUNKS) if group.name.endswith("_chunked") else (-1, -1)
        heard = recogniser.in_chunks(chunk, left).hear(waves, subject.config.audio.sample_rate)
        outcomes = _read_back(items, heard)
        figures[group.name] = group_figures(group, outcomes)
        lines += outcome_lines(group, outcomes)
    return figures, lines


def _read_back(items: Sequence[Item], heard: Sequence[str]) -> list[Outcome]:
    outcomes = []
    for item, text in zip(items, heard, strict=True):
        errors = character_errors(text, item.answer)
        heard_as = {"text": text, "truth": item.answer, "errors": errors}
        outcomes.append(Outcome(item.id, item.kind, item.language, errors[0] == 0, **heard_as))
    return outcomes
