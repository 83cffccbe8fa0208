"""Written answers as they are said: digits, numbers, results of sums, in English and Mandarin.

Speech decoders say the words they were trained on, and a digit alone does not tell in which language; so a reply is
written out before it is spoken, in the language of its question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from vita_jax.errors import UserError

Language = Literal["en", "zh"]
LANGUAGES = ("en", "zh")

_CHINESE = re.compile("[\u3400-\u9fff]")
_PUNCTUATION = re.compile(r"[.,!?:;。，！？：；、]")
_DIGITS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": tuple("零一二三四五六七八九"),
}
_TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
# A sum spelt out step by step; only its result is said.
_SUM = re.compile(r"[0-9+=]*=([0-9]{1,2})")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def language_of(text: str) -> Language:
    """ "zh" for a text with any Chinese character, else "en"."""
    return "zh" if _CHINESE.search(text) else "en"


def check_language(language: str) -> None:
    """Raises UserError for a language that is not spoken here."""
    if language not in LANGUAGES:
        raise UserError(f"language {language!r} is not spoken; use one of {', '.join(LANGUAGES)}")


def digits_aloud(digits: Sequence[int], language: str) -> str:
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
      answer: text with digits.
      language: in which digits are said.

    Raises:
      UserError: an unknown language.
    """
    check_language(language)
    if sum_ := _SUM.fullmatch(answer.strip()):
        return number_aloud(int(sum_[1]), language)
    gap = " " if language == "en" else ""
    aloud = re.sub(r"\d+", lambda run: f"{gap}{digits_aloud([int(d) for d in run[0]], language)}{gap}", answer)
    text = heard(aloud.replace("/", " "))
    return text if language == "en" else text.replace(" ", "")
