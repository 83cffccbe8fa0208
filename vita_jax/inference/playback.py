"""How much of an answer a user has heard.

Who plays the sound knows best and may say so; where nobody does, it is assumed that sound is played as soon as it is
handed out, without gaps as long as there is some.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vita_jax.inference.history import heard_text

# What a piece is taken to last while it is still being made, by word and by character of Chinese: as in a slow voice,
# about half as fast as most, since a word too few in the history is better than one that was never heard.
SECONDS_PER_WORD, SECONDS_PER_CHARACTER = 0.6, 0.4
_WORDS, _CHARACTERS = re.compile(r"[^\s\u3400-\u9fff]+"), re.compile(r"[\u3400-\u9fff]")


@dataclass
class Playback:
    """The sound of one answer on its way to the user. Times are in seconds, those called `now` of a clock.

    Attributes:
      pieces: text and seconds of sound of each piece of the answer, in order.
      complete: whether the last of them has no more.
      until: when all sound handed out so far has been played, if nobody says otherwise.
      reported: what a player said last of how much it has played; None = nothing.
    """

    pieces: list[tuple[str, float]] = field(default_factory=list)
    complete: bool = True
    until: float = 0.0
    reported: float | None = None

    def begin(self, text: str) -> None:
        """The next piece of the answer is about to be spoken."""
        self.pieces.append((text, 0.0))
        self.complete = False

    def add(self, seconds: float, now: float) -> None:
        """Some sound of the last piece has been handed out."""
        text, before = self.pieces[-1]
        self.pieces[-1] = text, before + seconds
        self.until = max(self.until, now) + seconds

    def end(self) -> None:
        """The last piece has no more sound."""
        self.complete = True

    @property
    def sent(self) -> float:
        """Seconds handed out."""
        return sum(seconds for _, seconds in self.pieces)

    def position(self, now: float) -> float:
        """Seconds played."""
        if self.reported is not None:
            return min(self.reported, self.sent)
        return self.sent - min(max(self.until - now, 0.0), self.sent)

    def ahead(self, now: float) -> float:
        """Seconds handed out that have not been played."""
        return self.sent - self.position(now)

    def heard(self, now: float) -> str:
        """The text that has been heard, see `history.heard_text`."""
        return self.heard_until(self.position(now))

    def heard_until(self, position: float) -> str:
        """The text that had been heard when so many seconds had been played."""
        pieces = list(self.pieces)
        if not self.complete:
            text, seconds = pieces[-1]
            pieces[-1] = text, max(seconds, expected_seconds(text))
        return heard_text(pieces, position)


def expected_seconds(text: str) -> float:
    """How long it takes to say a text slowly."""
    return SECONDS_PER_WORD * len(_WORDS.findall(text)) + SECONDS_PER_CHARACTER * len(_CHARACTERS.findall(text))
