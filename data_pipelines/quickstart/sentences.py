"""What the quickstart's voices say: sentences of daily life, digits, and questions and answers as they are spoken.

Which sentences are held out is a property of their text (a hash), so no other seed or set of the data can bring one
into training.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np

from data_pipelines.quickstart.vocabulary import FILLERS, TEMPLATES
from vita_jax.data.spoken_words import digits_aloud
from vita_jax.errors import UserError

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 10  # one text in so many
# Recited digits. Fewer are answers, too few to hold any out.
MIN_DIGITS, MAX_DIGITS = 3, 6
# Share of recited digits among drawn sentences: spoken answers are mostly digits.
DIGITS_SHARE = 0.2
# Words in no order. Whoever writes sentences of few shapes down soon guesses half of a sentence; these must be heard.
MIN_WORDS, MAX_WORDS = 3, 7
MAX_UNITS = 12  # of them; no longer to say than the longest sentence

_SLOT = re.compile(r"\{(\w+)\}")
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


@functools.cache
def vocabulary_words(language: str) -> tuple[str, ...]:
    """All words of the sentences, in Chinese the pieces that they are made of. Raises UserError as others."""
    _check_language(language)
    pieces = {piece for template in TEMPLATES[language] for piece in _SLOT.split(template)[::2]}
    pieces |= {filler for fillers in FILLERS[language].values() for filler in fillers}
    words = {word for piece in pieces for word in piece.split()} if language == "en" else pieces
    return tuple(sorted(words - {""}))


def draw_words(language: str, split: Split, rng: np.random.Generator) -> str:
    """`MIN_WORDS` to `MAX_WORDS` words in no order, of `MAX_UNITS` English words or Chinese characters at most."""
    words, gap = vocabulary_words(language), " " if language == "en" else ""
    while True:
        text = gap.join(words[i] for i in rng.integers(0, len(words), rng.integers(MIN_WORDS, MAX_WORDS + 1)))
        if len(list(units(text, language))) <= MAX_UNITS and split_of(text) == split:
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
