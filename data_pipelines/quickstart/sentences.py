"""What the quickstart's voices say: sentences of daily life, digits, and questions and answers as they are spoken.

Which sentences are held out is a property of their text (a hash), so no other seed or set of the data can bring one
into training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np

from data_pipelines.quickstart.vocabulary import FILLERS, TEMPLATES
from vita_jax.errors import UserError

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 10  # one text in so many
# Recited digits. Fewer are answers, too few to hold any out.
MIN_DIGITS, MAX_DIGITS = 3, 6
# Share of recited digits among drawn sentences: spoken answers are mostly digits.
DIGITS_SHARE = 0.2

_SLOT = re.compile(r"\{(\w+)\}")
_PUNCTUATION = re.compile(r"[.,!?:;。，！？：；、]")
_DIGITS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": tuple("零一二三四五六七八九"),
}
_TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# Asked in writing about something to be heard.
TRANSCRIBE = {
    "en": ("Write down what you hear.", "What is being said?", "Write what the voice says."),
    "zh": ("写下你听到的内容。", "录音里说了什么？", "把听到的话写下来。"),
}
# The text behind the noise state: never spoken, and the same whatever was heard.
REFUSAL = {"en": "Not for me.", "zh": "不是问我。"}


def _check_language(language: str) -> None:
    if language not in TEMPLATES:
        raise UserError(f"there are no sentences in language {language!r}; known: {', '.join(TEMPLATES)}")


def split_of(text: str) -> Split:
    """The split a sentence belongs to, wherever it comes from: one text in `HELD_OUT_SHARE` is held out.

    Spaces do not count, so that a sentence written differently stays where it is.
    """
    digest = hashlib.sha256("".join(text.split()).encode("utf-8")).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0 else "train"


def _fill(template: str, language: str, rng: np.random.Generator) -> str:
    fillers = FILLERS[language]
    return _SLOT.sub(lambda slot: str(rng.choice(fillers[slot[1]])), template)


def draw_statement(language: str, split: Split, rng: np.random.Generator) -> str:
    """Something people say to each other, never a question to the model; lower case, no punctuation.

    Args:
      language: "en" or "zh".
      split: which texts may be drawn, see `split_of`.

    Raises:
      UserError: an unknown language.
    """
    _check_language(language)
    while True:
        text = _fill(str(rng.choice(TEMPLATES[language])), language, rng)
        if split_of(text) == split:
            return text


def draw_digits(language: str, split: Split, rng: np.random.Generator) -> str:
    """Digits recited one by one, `MIN_DIGITS` to `MAX_DIGITS` of them, as words."""
    _check_language(language)
    while True:
        text = digits_aloud(rng.integers(0, 10, rng.integers(MIN_DIGITS, MAX_DIGITS + 1)), language)
        if split_of(text) == split:
            return text


def draw_sentence(language: str, split: Split, rng: np.random.Generator) -> str:
    """A statement, or (`DIGITS_SHARE`) recited digits."""
    if rng.random() < DIGITS_SHARE:
        return draw_digits(language, split, rng)
    return draw_statement(language, split, rng)


def distinct_sentences(
    language: str, split: Split, count: int, rng: np.random.Generator, statements_only: bool = False
) -> list[str]:
    """`count` different sentences, in the order they were drawn."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[(draw_statement if statements_only else draw_sentence)(language, split, rng)] = None
    return list(texts)


def units(text: str, language: str) -> Iterator[str]:
    """The words of an English text, the characters of a Chinese one."""
    return iter(text.split() if language == "en" else [c for c in text if not c.isspace()])


# ---- how things are said ---------------------------------------------------------------------------------------------


def digits_aloud(digits: np.ndarray | list[int] | tuple[int, ...], language: str) -> str:
    """Digits one by one: (3, 4) -> "three four", "三四"."""
    return (" " if language == "en" else "").join(_DIGITS[language][int(digit)] for digit in digits)


def number_aloud(number: int, language: str) -> str:
    """A number from 0 to 99 as one says it: 14 -> "fourteen", "十四".

    Raises:
      UserError: a number out of that range.
    """
    if not 0 <= number <= 99:
        raise UserError(f"numbers are spoken from 0 to 99, got {number}")
    tens, ones = divmod(number, 10)
    if tens == 0:
        return _DIGITS[language][ones]
    if language == "zh":
        return (_DIGITS["zh"][tens] if tens > 1 else "") + "十" + (_DIGITS["zh"][ones] if ones else "")
    if tens == 1:
        return _TEENS[ones]
    return _TENS[tens - 2] + (f" {_DIGITS['en'][ones]}" if ones else "")


def heard(text: str) -> str:
    """A written sentence as a listener would write it: lower case, without punctuation, single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())


def answer_aloud(answer: str, language: str) -> str:
    """A written answer in spoken words.

    "3486" is read digit by digit; of a running sum, "7+0=7+7=14", the result is said, as a number; colours are words:
    "red/grey: 707" is "red grey seven zero seven".

    Args:
      answer: as the quickstart's answers are written.
      language: in which digits are said.

    Raises:
      UserError: an unknown language.
    """
    _check_language(language)
    if "=" in answer:
        return number_aloud(int(answer.rsplit("=", 1)[1]), language)
    gap = " " if language == "en" else ""
    aloud = re.sub(r"\d+", lambda run: f"{gap}{digits_aloud([int(d) for d in run[0]], language)}{gap}", answer)
    text = heard(aloud.replace("/", " "))
    return text if language == "en" else text.replace(" ", "")
