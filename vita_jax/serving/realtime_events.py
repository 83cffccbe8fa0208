"""What happens in a duplex conversation, in the words of the realtime API.

Two events are this server's own, because the API has nothing of the kind: `vita_jax.input_audio_buffer.ignored`,
somebody spoke and the model took it not to be meant for it; `vita_jax.response.interrupted`, an answer that had been
sent whole is still being played and has to stop.
"""

from __future__ import annotations

import base64
import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vita_jax.inference.duplex_events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    AudioDelta,
    Event,
    Ignored,
    Recognised,
    ResponseDone,
    ResponseSent,
    ResponseStarted,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
)
from vita_jax.inference.vad import SAMPLE_RATE
from vita_jax.serving.metrics import Metrics
from vita_jax.serving.sounds import RATE, Resampler, to_bytes

ENDPOINT = "/v1/realtime"
IGNORED_EVENT, INTERRUPTED_EVENT = "vita_jax.input_audio_buffer.ignored", "vita_jax.response.interrupted"
KEPT = 16  # utterances and responses that are remembered

ServerEvent = dict[str, Any]


def new_id(kind: str) -> str:
    """A name such as "item_4b1f..."."""
    return f"{kind}_{secrets.token_hex(10)}"


def user_item(item_id: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """What a user said, as an item of the conversation."""
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": content,
    }


@dataclass
class Said:
    """An utterance. start, end: its samples; at: when it was over, on the conversation's clock."""

    item: str
    start: int = 0
    end: int = 0
    at: float | None = None


@dataclass
class Answer:
    """A response.

    Attributes:
      response, item: its ids.
      number: in its conversation.
      output: "audio" or "text".
      asked: when its question was over.
      text: of it so far.
      marks: milliseconds from there to its first text and first sound.
      done: whether all of it has been sent.
      over: whether it has been played, or broken off.
    """

    response: str
    item: str
    number: int
    output: str
    asked: float
    text: str = ""
    marks: dict[str, str] = field(default_factory=dict)
    done: bool = False
    over: bool = False
    resampler: Resampler | None = None

    @property
    def part(self) -> dict[str, Any]:
        """Its content."""
        if self.output == "audio":
            return {"type": "output_audio", "transcript": self.text}
        return {"type": "output_text", "text": self.text}

    def shown(self, status: str) -> dict[str, Any]:
        """As an item of the conversation."""
        return {
            "id": self.item,
            "object": "realtime.item",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [self.part] if status != "in_progress" else [],
        }


class Narrator:
    """Tells what happens. The conversation may be begun anew (`begin`), which starts its numbers again.

    Attributes:
      output: of the responses that begin from now on, "audio" or "text".
      tells_turns: whether it says when somebody speaks; a client that does so itself is not told.
      open_items: ids of what is being said, where the client says so.
      cancelled: whether the client wants the answer to stop.
      said: utterances by number. answers: responses by number.
    """

    def __init__(self, metrics: Metrics, output: str) -> None:
        self.conversation, self.output, self.tells_turns = new_id("conv"), output, True
        self.open_items: deque[str] = deque()
        self.cancelled = False
        self._metrics, self._last_item = metrics, None
        self.begin()

    def begin(self) -> None:
        """The conversation is set up anew."""
        self.said: dict[int, Said] = {}
        self.answers: dict[int, Answer] = {}
        self.open_items.clear()

    @property
    def active(self) -> Answer | None:
        """The response that is being sent."""
        return next((answer for answer in self.answers.values() if not answer.done), None)

    @property
    def current(self) -> Answer | None:
        """The response that is being sent or played."""
        return next((answer for answer in self.answers.values() if not answer.over), None)

    def add_item(self, item: dict[str, Any]) -> Iterator[ServerEvent]:
        """An item becomes part of the conversation, complete."""
        previous, self._last_item = self._last_item, item["id"]
        for kind in ("added", "done"):
            yield {"type": f"conversation.item.{kind}", "previous_item_id": previous, "item": item}

    def commit(self, item_id: str) -> ServerEvent:
        """What was said is complete."""
        return {"type": "input_audio_buffer.committed", "previous_item_id": self._last_item, "item_id": item_id}

    def tell(self, event: Event) -> Iterator[ServerEvent]:
        """The events of the API for one of a `Duplex`."""
        match event:
            case SpeechStarted():
                yield from self._started(event)
            case SpeechStopped():
                yield from self._stopped(event)
            case Ignored():
                yield from self._ignored(event)
            case Recognised(utterance=number):
                self._metrics.utterances.labels("answered").inc()
                if number in self.said and self.tells_turns:  # who is not told has committed it
                    item = self.said[number].item
                    yield self.commit(item)
                    yield from self.add_item(user_item(item, [{"type": "input_audio", "transcript": None}]))
            case ResponseStarted():
                yield from self._response(event)
            case TextDelta(at=at, response=number, text=text):
                yield from self._text(self.answers[number], at, text)
            case AudioDelta():
                yield from self._sound(self.answers[event.response], event)
            case ResponseSent(response=number):
                yield from self._finish(self.answers[number], COMPLETED)
            case ResponseDone(response=number, status=status, heard=heard):
                answer = self.answers[number]
                answer.over = True
                if not answer.done:
                    answer.text = heard if status == CANCELLED else answer.text
                    yield from self._finish(answer, status)
                elif status == CANCELLED:
                    yield {"type": INTERRUPTED_EVENT, "response_id": answer.response, "item_id": answer.item}
                self.cancelled = False

    def _started(self, event: SpeechStarted) -> Iterator[ServerEvent]:
        item = self.open_items.popleft() if self.open_items else new_id("item")
        self.said[event.utterance] = Said(item, start=event.sample)
        _keep(self.said)
        if self.tells_turns:
            yield {
                "type": "input_audio_buffer.speech_started",
                "audio_start_ms": _milliseconds(event.sample),
                "item_id": item,
            }

    def _stopped(self, event: SpeechStopped) -> Iterator[ServerEvent]:
        said = self.said[event.utterance]
        said.start, said.end, said.at = event.start, event.end, event.at
        if self.tells_turns:
            yield {
                "type": "input_audio_buffer.speech_stopped",
                "audio_end_ms": _milliseconds(event.end),
                "item_id": said.item,
            }

    def _ignored(self, event: Ignored) -> Iterator[ServerEvent]:
        self._metrics.utterances.labels(event.state).inc()
        said = self.said.get(event.utterance)
        if said is not None:
            yield {"type": IGNORED_EVENT, "item_id": said.item, "reason": event.state}
        if event.state == FAILED:
            error = {"type": "invalid_request_error", "code": "too_long", "message": event.reason, "param": None}
            yield {"type": "error", "error": error | {"event_id": None}}
        if said is None or not self.tells_turns:  # somebody waits for a response
            failed = event.state == FAILED
            answer = Answer(new_id("resp"), "", -1, self.output, event.at)
            yield {"type": "response.created", "response": self._shown(answer, "in_progress")}
            status = "failed" if failed else "completed"
            yield {"type": "response.done", "response": self._shown(answer, status, event.reason or event.state)}

    def _response(self, event: ResponseStarted) -> Iterator[ServerEvent]:
        said = self.said.get(event.utterance)
        asked = event.at if said is None or said.at is None else said.at
        answer = Answer(new_id("resp"), new_id("item"), event.response, self.output, asked)
        self.answers[event.response] = answer
        _keep(self.answers)
        previous, self._last_item = self._last_item, answer.item
        place = {"response_id": answer.response, "output_index": 0}
        yield {"type": "response.created", "response": self._shown(answer, "in_progress")}
        yield {"type": "response.output_item.added", **place, "item": answer.shown("in_progress")}
        yield {
            "type": "conversation.item.added",
            "previous_item_id": previous,
            "item": answer.shown("in_progress"),
        }
        part = answer.part | {"type": "audio" if answer.output == "audio" else "text"}
        yield {"type": "response.content_part.added", **_place(answer), "part": part}

    def _text(self, answer: Answer, at: float, text: str) -> Iterator[ServerEvent]:
        answer.text += text
        if "first_text_ms" not in answer.marks:
            answer.marks["first_text_ms"] = str(round(1000 * (at - answer.asked)))
            self._metrics.first_text.labels(ENDPOINT).observe(at - answer.asked)
        kind = "output_audio_transcript" if answer.output == "audio" else "output_text"
        yield {"type": f"response.{kind}.delta", **_place(answer), "delta": text}

    def _sound(self, answer: Answer, event: AudioDelta) -> Iterator[ServerEvent]:
        if "first_audio_ms" not in answer.marks:
            answer.marks["first_audio_ms"] = str(round(1000 * (event.at - answer.asked)))
            self._metrics.first_audio.labels(ENDPOINT).observe(event.at - answer.asked)
        self._metrics.spoken_seconds.inc(len(event.samples) / event.sampling_rate)
        answer.resampler = answer.resampler or Resampler(event.sampling_rate, RATE)
        yield from self._audio(answer, to_bytes(answer.resampler.push(event.samples)))

    def _audio(self, answer: Answer, data: bytes) -> Iterator[ServerEvent]:
        if data:
            delta = base64.b64encode(data).decode("ascii")
            yield {"type": "response.output_audio.delta", **_place(answer), "delta": delta}

    def _finish(self, answer: Answer, status: str) -> Iterator[ServerEvent]:
        """All of a response has been sent, or it was broken off."""
        answer.done = True
        place = _place(answer)
        if answer.output == "audio":
            if answer.resampler is not None and status == COMPLETED:
                yield from self._audio(answer, to_bytes(answer.resampler.flush()))
            yield {"type": "response.output_audio.done", **place}
            yield {"type": "response.output_audio_transcript.done", **place, "transcript": answer.text}
        else:
            yield {"type": "response.output_text.done", **place, "text": answer.text}
        part = answer.part | {"type": "audio" if answer.output == "audio" else "text"}
        yield {"type": "response.content_part.done", **place, "part": part}
        item = answer.shown("completed" if status == COMPLETED else "incomplete")
        yield {
            "type": "response.output_item.done",
            "response_id": answer.response,
            "output_index": 0,
            "item": item,
        }
        yield {"type": "conversation.item.done", "previous_item_id": None, "item": item}
        yield {"type": "response.done", "response": self._shown(answer, status)}

    def _shown(self, answer: Answer, status: str, reason: str = "") -> dict[str, Any]:
        """The response object. reason: why there is no answer."""
        details: dict[str, Any] | None = None
        if status == CANCELLED:
            details = {"type": "cancelled", "reason": "client_cancelled" if self.cancelled else "turn_detected"}
        elif status == "failed":
            details = {"type": "failed", "error": {"type": "invalid_request_error", "code": "too_long"}}
        over, has_item = status != "in_progress", bool(answer.item)
        item = answer.shown("completed" if status == COMPLETED else "incomplete")
        return {
            "id": answer.response,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [item] if over and has_item else [],
            "conversation_id": self.conversation,
            "output_modalities": [answer.output],
            "metadata": answer.marks | ({"ignored": reason[:512]} if reason else {}),
            "usage": None,
        }


def _place(answer: Answer) -> dict[str, Any]:
    return {"response_id": answer.response, "item_id": answer.item, "output_index": 0, "content_index": 0}


def _milliseconds(samples: int) -> int:
    return samples * 1000 // SAMPLE_RATE


def _keep(known: dict[int, Any]) -> None:
    """Forgets the oldest."""
    while len(known) > KEPT:
        del known[next(iter(known))]
