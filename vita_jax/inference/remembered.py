"""What a duplex conversation remembers: of every answer only what was heard.

A question whose answer was not heard at all is forgotten, as `Session.interrupt` does; but the pictures that came with
it were seen and go over to the next question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vita_jax.data.prompts import with_media
from vita_jax.data.records import Media
from vita_jax.inference.streams import Reply, Sound


@dataclass(eq=False)
class Exchange:
    """A question and what was heard of its answer.

    Attributes:
      pictures: shown with it.
      sound: in which it is asked; None for a typed one.
      text: the typed question.
      symbol: the state symbol that the answer began with.
      heard: the answer as far as the user has heard it.
    """

    pictures: Sequence[Media] = ()
    sound: Sound | None = None
    text: str = ""
    symbol: str = ""
    heard: str = ""


@dataclass(eq=False)
class Utterance:
    """Something that was said, or typed.

    Attributes:
      number: of the utterance.
      exchange: with its question.
      wave: blocks (n,) of it.
      prepared: tokens of it that the listening stream has been given ahead.
      asked: turns and media that its decision is made on.
      reply: what the stream says to it.
    """

    number: int
    exchange: Exchange
    wave: list[np.ndarray] = field(default_factory=list)
    prepared: int = 0
    asked: tuple[list[dict[str, str]], list[Media]] | None = None
    reply: Reply | None = None

    @property
    def sound(self) -> Sound | None:
        return self.exchange.sound


@dataclass
class Remembered:
    """A conversation so far.

    Attributes:
      turns, media: what was said before it became duplex, as in `Session`.
      exchanges: since then, in order.
    """

    turns: list[dict[str, str]] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)

    def conversation(self, question: Exchange | None = None) -> tuple[list[dict[str, str]], list[Media]]:
        """Turns and media, in order, with the question as the last turn if there is one."""
        turns, media = list(self.turns), list(self.media)
        seen: list[Media] = []  # with questions that are forgotten
        for exchange in [*self.exchanges, *([] if question is None else [question])]:
            seen += exchange.pictures
            if exchange is not question and not exchange.heard.strip():
                continue
            sounds = [] if exchange.sound is None else [exchange.sound.media]
            turns.append({"from": "human", "value": with_media(exchange.text, len(seen), 0, len(sounds))})
            media += [*seen, *sounds]
            seen = []
            if exchange is not question:
                turns.append({"from": "gpt", "value": exchange.symbol + exchange.heard})
        return turns, media

    def drop_oldest(self) -> list[Exchange] | None:
        """Makes room: forgets what is oldest. Returns the exchanges that are gone, or None if nothing is left."""
        if self.turns:
            self.turns, self.media = [], []
            return []
        if not self.exchanges:
            return None
        return [self.exchanges.pop(0)]
