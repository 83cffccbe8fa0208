"""The output vocabulary of the CTC recogniser: Chinese characters, frequent words, letters; the blank is id 0.

An encoder frame is 40 ms, and CTC needs one for every unit. A Chinese syllable takes several; but the letters of a
word that is said fast are more than its frames, so frequent words are units of their own, as word pieces are in the
recipes of WeNet. Rarer words are spelt.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vita_jax.errors import UserError
from vita_jax.storage import place

BLANK = 0
GAP = " "  # in front of every word that is written with gaps
WORD_COUNT = 10  # how often a word must occur to become a unit
# Of Unicode's categories, those of letters, marks and digits: what is heard. Everything else is a gap.
HEARD = ("L", "M", "N")


def normalise_transcript(text: str) -> str:
    """What a transcript is compared as: NFKC, lower case, no punctuation, single spaces, none between Chinese."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] in HEARD or c == "'" else " " for c in text).split()
    joined = words[:1]
    for word in words[1:]:
        joined += [word] if is_chinese(joined[-1][-1]) or is_chinese(word[0]) else [" ", word]
    return "".join(joined)


def is_chinese(character: str) -> bool:
    """Whether a character is a Chinese one, written without gaps."""
    return "\u3400" <= character <= "\u9fff"


@dataclass(frozen=True)
class CtcVocabulary:
    """`units[i]` has id i + 1; 0 is the blank. A unit is a character, the gap, or the gap and a word behind it."""

    units: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.units) + 1

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {unit: i for i, unit in enumerate(self.units, start=BLANK + 1)}

    def encode(self, text: str) -> list[int]:
        """Ids of a transcript, normalised first.

        Raises:
          UserError: a character that the vocabulary does not have; names it.
        """
        text = normalise_transcript(text)
        units = [unit for part in split_words(text) for unit in ([part] if part in self._ids else part)]
        unknown = sorted(set(units) - self._ids.keys())
        if unknown:
            raise UserError(f"{text!r} has {''.join(unknown)!r}, which the CTC vocabulary lacks; build it again")
        return [self._ids[unit] for unit in units]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without blanks; ids outside the vocabulary (unused rows of the head) are dropped."""
        return "".join(self.units[i - 1] for i in ids if BLANK < i < len(self)).strip()

    def save(self, path: str | Path) -> None:
        """Writes the units as JSON."""
        Path(path).write_text(json.dumps(self.units, ensure_ascii=False), encoding="utf-8")


def split_words(text: str) -> list[str]:
    """A normalised transcript as Chinese characters, and words with the gap in front of them."""
    parts: list[str] = []
    for character in text:
        if is_chinese(character):
            parts.append(character)
        elif character == GAP or not parts or is_chinese(parts[-1]):
            parts.append(GAP + character.strip())
        else:
            parts[-1] += character
    return parts


def build_ctc_vocabulary(texts: Iterable[str], size: int) -> CtcVocabulary:
    """All characters of the normalised texts, and the words among them that are frequent, as many as there is room for.

    Args:
      size: rows of the CTC head; the vocabulary may be smaller.

    Raises:
      UserError: more characters than rows, or none.
    """
    parts = Counter(part for text in texts for part in split_words(normalise_transcript(text)))
    characters = sorted({character for part in parts for character in part})
    if not characters:
        raise UserError("the transcripts hold no characters; there is nothing to recognise")
    if len(characters) + 1 > size:
        raise UserError(
            f"the transcripts have {len(characters)} characters, with the blank more than the {size} rows of the CTC "
            f"head; set model.ctc_vocab_size to at least {len(characters) + 1}"
        )
    words = [part for part, count in parts.items() if len(part) > 1 and count >= WORD_COUNT]
    words.sort(key=lambda word: (-parts[word], word))
    return CtcVocabulary((*characters, *sorted(words[: size - 1 - len(characters)])))


def load_ctc_vocabulary(path: str | Path) -> CtcVocabulary:
    """Reads what `save` wrote. Raises UserError for a file that is missing or of another form."""
    try:
        units = json.loads(place(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"CTC vocabulary {path} cannot be read: {error}") from None
    if not isinstance(units, list) or not all(isinstance(u, str) and u for u in units) or len(set(units)) < len(units):
        raise UserError(f"CTC vocabulary {path} is not a JSON list of different texts")
    return CtcVocabulary(tuple(units))
