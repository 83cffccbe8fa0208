"""What happens in a duplex conversation, as values.

The order for one utterance u and the response r to it:

    SpeechStarted(u)  SpeechStopped(u)  then exactly one of Ignored(u) and Recognised(u)
    Recognised(u)     [ResponseDone of the response before it, "cancelled"]  ResponseStarted(r)
    ResponseStarted(r)  TextDelta(r) ...  AudioDelta(r) ...  ResponseSent(r)  ResponseDone(r)

`ResponseDone` comes exactly once for every `ResponseStarted`, "cancelled" possibly before `ResponseSent`. A later
utterance may start before an earlier one is decided; decisions come in the order of the utterances.

`at` is the conversation's clock in seconds when the event was made. Samples are counted at 16 kHz from the first one
that was heard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COMPLETED, CANCELLED = "completed", "cancelled"

# Why an utterance is ignored besides "noise": what the model said of it.
SHORT, EMPTY, FAILED = "short", "empty", "failed"


@dataclass(frozen=True)
class SpeechStarted:
    """Somebody began to speak. sample: where the utterance begins, some sound before the speech included."""

    at: float
    utterance: int
    sample: int


@dataclass(frozen=True)
class SpeechStopped:
    """The utterance is over. start, end: its samples, [start, end); `at` is later than its end by the silence that
    ends an utterance.
    """

    at: float
    utterance: int
    start: int
    end: int


@dataclass(frozen=True)
class Ignored:
    """An utterance changes nothing: what is being said goes on, the conversation forgets it.

    state: "noise", not meant for the model, as it says itself; "short", too little to be heard; "empty", the model has
    nothing to say to it; "failed", there is no room for it (`reason` says more).
    """

    at: float
    utterance: int
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Recognised:
    """An utterance (or a typed question) is meant for the model: what is being said stops here.

    state: "audio" or "text", as the model says; None where it says nothing of the kind.
    """

    at: float
    utterance: int
    state: str | None


@dataclass(frozen=True)
class ResponseStarted:
    """An answer begins. stream: which of the two streams writes it, 0 or 1; the other one listens now."""

    at: float
    response: int
    utterance: int
    stream: int


@dataclass(frozen=True)
class TextDelta:
    """More of the answer as text, without state symbols."""

    at: float
    response: int
    text: str


@dataclass(frozen=True)
class AudioDelta:
    """More of the answer as sound, (n,) float32 in -1 .. 1, to be played after what came before. text: the piece of the
    answer that it belongs to.
    """

    at: float
    response: int
    samples: np.ndarray
    sampling_rate: int
    text: str


@dataclass(frozen=True)
class ResponseSent:
    """All text and sound of the answer have been handed out; the sound may still be playing. text: all of it."""

    at: float
    response: int
    text: str


@dataclass(frozen=True)
class ResponseDone:
    """The answer is over: played to its end ("completed"), or broken off ("cancelled": stop playing at once).

    text: all that was written; heard: what the user heard of it, as far as is known now. That is what the conversation
    remembers; `Duplex.played` may still correct it.
    """

    at: float
    response: int
    status: str
    text: str
    heard: str


Event = (
    SpeechStarted
    | SpeechStopped
    | Ignored
    | Recognised
    | ResponseStarted
    | TextDelta
    | AudioDelta
    | ResponseSent
    | ResponseDone
)
