"""An answer on its way to the user: text as it is written, pieces of it as sound, what of it has been heard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from vita_jax.inference.playback import Playback
from vita_jax.inference.remembered import Exchange
from vita_jax.inference.speech_text import PieceCutter
from vita_jax.inference.streams import Reply
from vita_jax.inference.talk import Voice

# A player that says it is so close to the end has reached it: rates and buffers do not divide evenly.
NEARLY_SECONDS = 0.05


class Response:
    """One answer. Nothing in it waits; each call does one piece of work.

    Attributes:
      number: of the response.
      exchange: that it belongs to.
      reply: the stream's answer.
      text: of it so far.
      playback: of its sound.
      told: whether it has been said that all of it was handed out.
    """

    def __init__(self, number: int, exchange: Exchange, reply: Reply, voice_for: Callable[[str], Voice] | None) -> None:
        """
        Args:
          number, exchange, reply: see the class.
          voice_for: the answer's first piece -> what speaks it; None = nothing does.
        """
        self.number, self.exchange, self.reply = number, exchange, reply
        self.text, self.playback, self.told = "", Playback(), False
        self._voice_for, self._voice, self._written = voice_for, None, False
        self._cutter, self._pieces, self._spoken = PieceCutter(), deque[str](), 0
        self._sound: Iterator[np.ndarray] | None = None

    def write(self) -> str:
        """The text that is new."""
        if self._written:
            return ""
        new = self.reply.poll()
        self.text += new
        self.exchange.symbol, self._written = self.reply.symbol, self.reply.done
        if self._voice_for is not None:
            self._pieces.extend(self._cutter.push(new))
            if self._written:
                self._pieces.extend(self._cutter.flush())
        return new

    def speak(self, now: float, lead_seconds: float) -> tuple[bool, np.ndarray | None]:
        """Makes some sound, unless there is enough of it ahead of the player or nothing to be said yet.

        Returns:
          Whether it did anything, and the sound (n,) if there is any; it is part of `piece`, at `sampling_rate`.
        """
        if self._sound is None:
            if not self._pieces or self.playback.ahead(now) >= lead_seconds:
                return False, None
            piece = self._pieces.popleft()
            self._voice = self._voice or self._voice_for(piece)
            self.playback.begin(piece)
            self._sound = self._voice.say(piece, self._spoken, self.playback.sent == 0)
            self._spoken += 1
        elif self.playback.ahead(now) >= lead_seconds:
            return False, None
        samples = next(self._sound, None)
        if samples is None:
            self.playback.end()
            self._sound = None
        elif len(samples):
            self.playback.add(len(samples) / self.sampling_rate, now)
            return True, samples
        return True, None

    @property
    def piece(self) -> str:
        """What is being spoken."""
        return self.playback.pieces[-1][0]

    @property
    def sampling_rate(self) -> int:
        """Hz of the sound."""
        return self._voice.sampling_rate

    @property
    def sent(self) -> bool:
        """Whether all of it has been handed out."""
        return self._written and not self._pieces and self._sound is None

    def over(self, now: float) -> bool:
        """Whether all of it has been heard."""
        return self.sent and self.playback.ahead(now) <= (0 if self.playback.reported is None else NEARLY_SECONDS)

    def heard(self, now: float) -> str:
        """What of it has been heard; what is not spoken has been read."""
        return self.text if self._voice_for is None else self.playback.heard(now)

    def stop(self) -> None:
        """Ends it where it is."""
        self.reply.stop()
        self._pieces.clear()
        close = getattr(self._sound, "close", None)
        if close is not None:
            close()
        self._sound = None
