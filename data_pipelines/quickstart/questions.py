"""Questions and answers about a scene, in English and Chinese.

The six typed kinds of the benchmark (`KINDS`) and captions share their answers between pictures and written scenes: the
language model first learns them from words, and the picture later takes the place of the words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_pipelines.quickstart.scenes import INKS, PAPERS, Scene

KINDS = ("count", "kth", "largest", "sum", "read", "colour")
LANGUAGES = ("en", "zh")

_ORDINALS = {"en": ("first", "second", "third", "fourth"), "zh": ("一", "二", "三", "四")}

# kind -> language -> phrasings; {ordinal} is filled for `kth`.
_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "count": {
        "en": ("How many digits are there?", "How many digits are written here?", "Count the digits."),
        "zh": ("有几个数字？", "这里写了几个数字？", "数一数有几个数字。"),
    },
    "kth": {
        "en": ("What is the {ordinal} digit?", "Which digit is {ordinal}?", "Name the {ordinal} digit."),
        "zh": ("第{ordinal}个数字是什么？", "第{ordinal}个数字是几？", "说出第{ordinal}个数字。"),
    },
    "largest": {
        "en": ("What is the largest digit?", "Which digit is the largest?", "Name the largest digit."),
        "zh": ("最大的数字是什么？", "哪个数字最大？", "说出最大的数字。"),
    },
    "sum": {
        "en": ("What is the sum of the digits?", "Add up all the digits.", "What do the digits add up to?"),
        "zh": ("数字之和是多少？", "把所有数字加起来。", "所有数字加起来是多少？"),
    },
    "read": {
        "en": ("Read all the digits.", "What digits are written, in order?", "Read the digits from first to last."),
        "zh": ("读出所有数字。", "按顺序写了哪些数字？", "从头到尾读出数字。"),
    },
    "ink": {
        "en": ("What colour are the digits?", "What colour is the ink?", "Name the colour of the digits."),
        "zh": ("数字是什么颜色？", "墨水是什么颜色？", "说出数字的颜色。"),
    },
    "paper": {
        "en": ("What colour is the paper?", "What colour is the background?", "Name the colour of the paper."),
        "zh": ("纸是什么颜色？", "背景是什么颜色？", "说出纸的颜色。"),
    },
    "order": {
        "en": (
            "In which order do the digits appear?",
            "Which digits appear, in order?",
            "Read the digits as they appear.",
        ),
        "zh": ("数字按什么顺序出现？", "依次出现了哪些数字？", "按出现的顺序读出数字。"),
    },
    "caption": {
        "en": ("Describe the picture.", "What does the picture show?", "Describe what you see."),
        "zh": ("描述这张图。", "图里有什么？", "描述你看到的内容。"),
    },
    "clip_caption": {
        "en": ("Describe the clip.", "What does the clip show?", "Describe what happens."),
        "zh": ("描述这段视频。", "视频里有什么？", "描述发生了什么。"),
    },
}


@dataclass(frozen=True)
class Question:
    """One question with its answer. `kind` is one of `KINDS`, or "order", "caption", "clip_caption"."""

    kind: str
    language: str
    text: str
    answer: str


def _digits(scene: Scene) -> str:
    return "".join(str(d) for d in scene.digits)


def _running_sum(digits: tuple[int, ...]) -> str:
    """The addition spelt out as on a calculator's tape, "3+4=7+8=15"; only the number after the last "=" is scored."""
    text = str(digits[0])
    for count, digit in enumerate(digits[1:], start=2):
        text += f"+{digit}={sum(digits[:count])}"
    return text


def _answer(kind: str, language: str, scene: Scene, k: int) -> str:
    name = 0 if language == "en" else 1
    ink, paper = INKS[scene.ink][name], PAPERS[scene.paper][name]
    if kind == "count":
        return str(len(scene.digits))
    if kind == "kth":
        return str(scene.digits[k])
    if kind == "largest":
        return str(max(scene.digits))
    if kind == "sum":
        return _running_sum(scene.digits)
    if kind in ("read", "order"):
        return _digits(scene)
    if kind == "ink":
        return ink
    if kind == "paper":
        return paper
    if kind == "caption":
        return f"{ink}/{paper}: {_digits(scene)}"
    if kind == "clip_caption":
        return f"one by one: {_digits(scene)}" if language == "en" else f"依次出现: {_digits(scene)}"
    raise ValueError(f"unknown question kind {kind!r}")


def ask(scene: Scene, kind: str, language: str, rng: np.random.Generator, k: int | None = None) -> Question:
    """Asks one question of `kind` about the scene.

    Args:
      kind: one of `KINDS` ("colour" asks for ink or paper, drawn at random), "order", "caption" or "clip_caption".
      k: for "kth", which digit (0-based); drawn at random if None.
    """
    detail = str(rng.choice(("ink", "paper"))) if kind == "colour" else kind
    variants = _QUESTIONS[detail][language]
    text = variants[rng.integers(len(variants))]
    if k is None:
        k = int(rng.integers(len(scene.digits)))
    return Question(kind, language, text.format(ordinal=_ORDINALS[language][k]), _answer(detail, language, scene, k))


def phrasings(kinds: Iterable[str], language: str) -> list[str]:
    """Every question of these kinds ("colour" stands for "ink" and "paper"), as written; each once."""
    details = [detail for kind in kinds for detail in (("ink", "paper") if kind == "colour" else (kind,))]
    texts = [
        text.format(ordinal=ordinal)
        for detail in details
        for text in _QUESTIONS[detail][language]
        for ordinal in _ORDINALS[language]
    ]
    return list(dict.fromkeys(texts))
