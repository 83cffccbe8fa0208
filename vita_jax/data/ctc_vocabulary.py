"""The output vocabulary of the CTC recogniser: characters, with the blank as id 0.

Characters serve English and Chinese alike, need no training, and never join what was said with how often it is said.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vita_jax.errors import UserError

BLANK = 0
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
    """`characters[i]` has id i + 1; 0 is the blank."""

    characters: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.characters) + 1

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters, start=BLANK + 1)}

    @property
    def gap(self) -> int | None:
        """Id of the space between words, None in a vocabulary without."""
        return self._ids.get(" ")

    def encode(self, text: str) -> list[int]:
        """Ids of a transcript, normalised first.

        Raises:
          UserError: a character that the vocabulary does not have; names it.
        """
        text = normalise_transcript(text)
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise UserError(f"{text!r} has {''.join(unknown)!r}, which the CTC vocabulary lacks; build it again")
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without blanks; ids outside the vocabulary (unused rows of the head) are dropped."""
        return "".join(self.characters[i - 1] for i in ids if BLANK < i < len(self))

    def save(self, path: str | Path) -> None:
        """Writes the characters as JSON."""
        Path(path).write_text(json.dumps(self.characters, ensure_ascii=False), encoding="utf-8")


def build_ctc_vocabulary(texts: Iterable[str], size: int) -> CtcVocabulary:
    """All characters of the normalised texts, sorted.

    Args:
      size: rows of the CTC head; the vocabulary may be smaller.

    Raises:
      UserError: more characters than rows, or none.
    """
    characters = tuple(sorted({c for text in texts for c in normalise_transcript(text)}))
    if not characters:
        raise UserError("the transcripts hold no characters; there is nothing to recognise")
    if len(characters) + 1 > size:
        raise UserError(
            f"the transcripts have {len(characters)} characters, with the blank more than the {size} rows of the CTC "
            f"head; set model.ctc_vocab_size to at least {len(characters) + 1}"
        )
    return CtcVocabulary(characters)


def load_ctc_vocabulary(path: str | Path) -> CtcVocabulary:
    """Reads what `save` wrote. Raises UserError for a file that is missing or of another form."""
    try:
        characters = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"CTC vocabulary {path} cannot be read: {error}") from None
    if not _is_character_list(characters):
        raise UserError(f"CTC vocabulary {path} is not a JSON list of single, different characters")
    return CtcVocabulary(tuple(characters))


def _is_character_list(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(c, str) and len(c) == 1 for c in value) and len(set(value)) == len(value)
