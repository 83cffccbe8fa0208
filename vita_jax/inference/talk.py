"""An answer aloud while it is still being written, in the model's own voice or that of another synthesiser.

    text, string by string -> pieces that can be spoken -> a voice -> sound

A piece is spoken as soon as its punctuation mark is written; the tail without one is spoken, too. Whoever reads the
sound drives the writing, so closing the stream ends both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.speak import Speaker, piece_ids
from vita_jax.inference.speech_text import MIN_PIECE_LENGTH, remove_markers, speakable_pieces
from vita_jax.inference.timings import FIRST_PIECE, FIRST_SAMPLE, Timeline
from vita_jax.ops.filter_bank import resample


@dataclass(frozen=True)
class Spoken:
    """Some sound of an answer.

    Attributes:
      samples: (n,) float32 in -1 .. 1; none at the end of a piece that has no more.
      text: the piece that it is of, as it was written.
      ends: whether the piece has no more.
    """

    samples: np.ndarray
    text: str
    ends: bool


class Voice(Protocol):
    """What speaks. `sampling_rate`: Hz of what it gives."""

    sampling_rate: int

    def say(self, piece: str, number: int, opening: bool) -> Iterator[np.ndarray]:
        """The sound of one piece, (n,) float32 each, as soon as there is some; none where nothing can be said.

        number: of the piece in the answer. opening: nothing has been said before it.
        """


class Synthesiser(Protocol):
    """Another program that turns text into speech."""

    def __call__(self, text: str) -> tuple[np.ndarray, int]:
        """(n,) float32 samples in -1 .. 1 and their rate in Hz. Raises UserError where nothing can be said."""


@dataclass(frozen=True)
class ModelVoice:
    """The model's own decoders and codec; language: in which text is written out in words, None leaves it."""

    speaker: Speaker
    tokenizer: Tokenizer
    language: str | None = None

    @property
    def sampling_rate(self) -> int:
        return self.speaker.sampling_rate

    def say(self, piece: str, number: int, opening: bool) -> Iterator[np.ndarray]:
        ids = piece_ids(piece, self.tokenizer, self.language)
        if ids:
            yield from self.speaker.stream_ids(ids, number, opening)


@dataclass(frozen=True)
class ExternalVoice:
    """A synthesiser for models without speech decoders; every piece is one sound."""

    synthesiser: Synthesiser
    sampling_rate: int = 16_000

    def say(self, piece: str, number: int, opening: bool) -> Iterator[np.ndarray]:
        words = remove_markers(piece).strip()
        if not any(character.isalnum() for character in words):
            return
        samples, rate = self.synthesiser(words)
        yield resample(np.asarray(samples, np.float32), rate, self.sampling_rate)


def talk(
    text: Iterable[str], voice: Voice, *, min_piece: int = MIN_PIECE_LENGTH, timeline: Timeline | None = None
) -> Iterator[Spoken]:
    """The sound of an answer that is still being written.

    Args:
      text: the answer in strings of any length.
      voice: what speaks.
      min_piece: characters; a shorter piece waits for the next punctuation mark.
      timeline: notes when there is a first piece and a first sample.

    Raises:
      UserError: min_piece is below 1.
    """
    if min_piece < 1:
        raise UserError(f"min_piece {min_piece} must be at least 1")
    timeline, opening = Timeline() if timeline is None else timeline, True
    try:
        for number, piece in enumerate(speakable_pieces(text, min_piece)):
            timeline.mark(FIRST_PIECE)
            for samples in voice.say(piece, number, opening):
                timeline.mark(FIRST_SAMPLE)
                opening = False
                yield Spoken(samples, piece, ends=False)
            yield Spoken(np.zeros((0,), np.float32), piece, ends=True)
    finally:
        close = getattr(text, "close", None)
        if close is not None:
            close()


def spoken_pieces(spoken: Iterable[Spoken], sampling_rate: int) -> list[tuple[str, float]]:
    """Pieces with the seconds of sound that each has become, for `history.heard_text`."""
    pieces: list[tuple[str, float]] = []
    begun = False
    for sound in spoken:
        if not begun:
            pieces.append((sound.text, 0.0))
        text, seconds = pieces[-1]
        pieces[-1] = (text, seconds + len(sound.samples) / sampling_rate)
        begun = not sound.ends
    return pieces
