"""When an answer counts as right."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from vita_jax.data.ctc_vocabulary import normalise_transcript
from vita_jax.data.prompts import split_state_symbol
from vita_jax.data.templates import Template
from vita_jax.evaluation.items import Item


def normalise(text: str, template: Template | None = None) -> str:
    """The part of an answer that is compared: no state symbol, full-width forms as ASCII, lower case, single spaces, no
    full stop at the end.

    Args:
      template: whose state symbol is dropped; None keeps everything.
    """
    if template is not None:
        text = split_state_symbol(text.strip(), template)[1]
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).rstrip(".。 ")


def answer_key(kind: str, text: str, template: Template | None = None) -> str:
    """What must be equal for two answers to a question of this kind to be the same.

    A sum may be written out ("3+4=7"); only the number after the last "=" counts.
    """
    text = normalise(text, template)
    return text.rsplit("=", 1)[-1].strip() if kind == "sum" else text


def is_right(kind: str, answer: str, truth: str, template: Template | None = None) -> bool:
    """Exact match of the two keys."""
    return answer_key(kind, answer, template) == answer_key(kind, truth, template)


def is_refusal(answer: str, template: Template | None) -> bool:
    """Whether the answer begins with the state symbol of sound that is not meant for the model."""
    return template is not None and split_state_symbol(answer.strip(), template)[0] == "noise"


def edit_distance(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Fewest insertions, deletions and replacements that turn one sequence into the other (Levenshtein)."""
    return Levenshtein.distance(left, right)


def character_errors(answer: str, truth: str, template: Template | None = None) -> tuple[int, int]:
    """(wrong characters, characters of the truth), both texts as recognition normalises them."""
    if template is not None:
        answer = split_state_symbol(answer.strip(), template)[1]
    answer, truth = normalise_transcript(answer), normalise_transcript(truth)
    return edit_distance(answer, truth), len(truth)


def error_rate(errors: Iterable[tuple[int, int]]) -> float:
    """Character error rate of several texts together: all wrong characters by all true ones."""
    pairs = list(errors)
    return sum(wrong for wrong, _ in pairs) / max(sum(total for _, total in pairs), 1)


def answer_prior(items: Sequence[Item], template: Template | None = None) -> float:
    """Accuracy of a model that has not looked: the best constant answer per kind and language, mean over kinds."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for item in items:
        counts[item.kind][item.language][answer_key(item.kind, item.answer, template)] += 1
    shares = [
        sum(max(answers.values()) for answers in languages.values())
        / sum(answers.total() for answers in languages.values())
        for languages in counts.values()
    ]
    return sum(shares) / len(shares) if shares else 0.0
