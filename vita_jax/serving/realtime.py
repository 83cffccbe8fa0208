"""`/v1/realtime`: one conversation over a WebSocket, in which both sides may speak at any time.

The event loop reads messages, sends events and looks at the clock; the conversation itself (`Duplex`) is given its
turns by the worker's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from vita_jax.inference.duplex import Duplex
from vita_jax.inference.duplex_events import Event, Recognised
from vita_jax.inference.session import Session
from vita_jax.inference.silero import Button
from vita_jax.inference.vad import SAMPLE_RATE
from vita_jax.serving.content import decoded, picture, plain_text
from vita_jax.serving.fields import Fields, read_json
from vita_jax.serving.guard import subprotocols
from vita_jax.serving.limits import Rate
from vita_jax.serving.problems import LIMITED, SERVER, Problem, as_problem, invalid, overloaded
from vita_jax.serving.realtime_events import Narrator, Said, ServerEvent, new_id, user_item
from vita_jax.serving.realtime_settings import AUDIO, first_settings, updated
from vita_jax.serving.responses import problem_response
from vita_jax.serving.service import Service
from vita_jax.serving.sounds import Resampler, from_bytes

PROTOCOL = "realtime"
MAX_QUEUED = 4000  # events that a client may be behind
MAX_UNHEARD = 10.0  # seconds of sound that the model may be behind
KEPT_SECONDS = 90.0  # of sound, for transcripts
AT_ONCE = 15.0  # seconds' worth of sound that may come at once
LEAST_SECONDS = 0.1  # less than this is not committed
MAX_ID = 64  # characters
CLOCK_SECONDS = 0.25
RETRY_SECONDS = 10.0
NORMAL, GOING_AWAY, FAILURE = 1000, 1001, 1011  # codes of a close


async def realtime(socket: WebSocket) -> None:
    """Serves one session from its beginning to its end."""
    service: Service = socket.app.state.service
    problem = _refusal(socket, service)
    if problem is not None:
        service.metrics.refused.labels(problem.code).inc()
        await socket.send_denial_response(problem_response(problem))
        return
    session = Realtime(socket, service)
    service.sessions.add(session)  # before anything is waited for, so that there are never too many
    service.metrics.sessions.set(len(service.sessions))
    try:
        await session.run()
    finally:
        service.sessions.discard(session)
        service.metrics.sessions.set(len(service.sessions))


def _refusal(socket: WebSocket, service: Service) -> Problem | None:
    name = socket.query_params.get("model", service.name)
    if name != service.name:
        return Problem(404, f"there is no model {name[:80]!r} here; use {service.name!r}", code="model_not_found")
    if len(service.sessions) >= service.limits.sessions:
        return overloaded(f"{len(service.sessions)} sessions run already (limit sessions)", RETRY_SECONDS)
    return None


class Realtime:
    """One session."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.id = new_id("sess")
        self._socket, self._service, self._limits = socket, service, service.limits
        self._settings = first_settings(service)
        self._narrator = Narrator(service.metrics, self._settings.output)
        self._session: Session | None = None
        self._duplex: Duplex | None = None
        self._led: tuple[object, ...] | None = None  # settings that `_duplex` was made with
        self._queued: asyncio.Queue[ServerEvent | int] = asyncio.Queue()  # events, and the code of a close
        self._heard: deque[tuple[int, np.ndarray]] = deque()  # sound of late, with the number of its first sample
        self._samples = 0  # taken by `_duplex`
        self._resampler = Resampler(self._settings.rate, SAMPLE_RATE)
        self._texts: list[str] = []  # typed and not asked yet
        self._item: str | None = None  # what is being said, where the client says when it has spoken
        self._buffered, self._committed = 0.0, False  # seconds of it, and whether it is complete
        self._images = 0
        self._rate = Rate(self._limits.messages_per_minute, "messages_per_minute")
        self._unheard = 0.0  # seconds
        self._sound_room, self._sound_since = AT_ONCE * self._limits.audio_speed, time.monotonic()
        self._began = self._last = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._bug: Exception | None = None

    # ---- the connection ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until one side ends it."""
        offered = subprotocols(self._socket.headers)
        await self._socket.accept(PROTOCOL if PROTOCOL in offered else None)
        self._send({"type": "session.created", "session": self._settings.shown(self._service, self.id)})
        parts = [asyncio.ensure_future(part()) for part in (self._read, self._write, self._watch)]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*parts, *self._tasks, return_exceptions=True)
            await self._service.worker.call(self._close)
        if self._bug is not None:
            raise self._bug

    async def stop(self) -> None:
        """The server stops: what is being said may be finished, then the client is told."""
        while self._narrator.active is not None:
            await asyncio.sleep(0.05)
        self._end("the server is stopping", "server_shutdown", GOING_AWAY)

    def _send(self, event: ServerEvent) -> None:
        self._queued.put_nowait({"event_id": new_id("event"), **event})

    def _fail(self, problem: Problem, event_id: str | None = None) -> None:
        """Says what is wrong with a message."""
        self._service.metrics.refused.labels(problem.code or str(problem.status)).inc()
        self._send({"type": "error", "error": problem.body["error"] | {"event_id": event_id}})

    def _end(self, message: str, code: str, close: int) -> None:
        """Says why the session is over, and ends it."""
        self._fail(Problem(503, message, kind=SERVER, code=code))
        self._queued.put_nowait(close)

    def _break(self, bug: Exception) -> None:
        """A mistake of the server ends the session."""
        self._bug = bug
        self._fail(as_problem(bug))
        self._queued.put_nowait(FAILURE)

    async def _write(self) -> None:
        while True:
            event = await self._queued.get()
            if self._queued.qsize() > MAX_QUEUED:
                return
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    if isinstance(event, int):
                        await self._socket.close(event)
                        return
                    await self._socket.send_json(event)
            except (OSError, RuntimeError, WebSocketDisconnect):  # gone, or too slow (TimeoutError)
                return

    async def _watch(self) -> None:
        """Ends a session that lasts too long or in which nothing happens, as `_write` then does."""
        while True:
            await asyncio.sleep(CLOCK_SECONDS)
            now, limits = time.monotonic(), self._limits
            if now - self._began > limits.session_seconds:
                message = f"the session has lasted {limits.session_seconds:g} s (limit session_seconds)"
                self._end(message, "session_expired", NORMAL)
            elif now - self._last > limits.idle_seconds:
                message = f"nothing was sent for {limits.idle_seconds:g} s (limit idle_seconds)"
                self._end(message, "idle_timeout", NORMAL)
            else:
                continue
            await asyncio.Event().wait()

    async def _read(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] != "websocket.receive" or self._socket.client_state == WebSocketState.DISCONNECTED:
                return
            self._last = time.monotonic()
            event_id = None
            try:
                self._rate.take(self.id)
                data = message.get("text") or message.get("bytes") or b""
                if len(data) > self._limits.message_bytes:
                    raise invalid(
                        f"the message has more than {self._limits.message_bytes} bytes (limit message_bytes)",
                        code="limit_exceeded",
                    )
                fields = Fields(read_json(data))
                event_id = fields.text("event_id", None)
                await self._take(fields)
            except Exception as error:
                problem = as_problem(error)
                if problem.status == 500:
                    self._break(error)
                    await asyncio.Event().wait()  # until that is sent
                self._fail(problem, event_id and event_id[:512])

    async def _take(self, fields: Fields) -> None:
        """Does what a message asks for. Raises `Problem`."""
        kind = fields.text("type")
        handler = HANDLERS.get(kind)
        if handler is None:
            raise invalid(f"the event {kind[:80]!r} is unknown; use one of {', '.join(HANDLERS)}", "type")
        await handler(self, fields)

    # ---- the conversation -------------------------------------------------------------------------------------------

    async def _lead(self) -> Duplex:
        """The conversation, set up for the settings."""
        if self._duplex is None or self._led != self._settings.lead:
            await self._service.worker.call(self._begin)
            self._narrator.output, self._narrator.tells_turns = self._settings.output, self._settings.detects
            self._resampler = Resampler(self._settings.rate, SAMPLE_RATE)
            self._heard.clear()
            self._samples, self._unheard = 0, 0.0
            self._item, self._buffered, self._committed = None, 0.0, False
        return self._duplex

    def _begin(self) -> None:
        """Sets the conversation up, or anew, in which case it goes on from what was said. In the worker's thread."""
        settings, service = self._settings, self._service
        if self._session is None:
            self._session = service.conversation(system=settings.instructions)
        self._leave()
        self._session.max_new_tokens = settings.max_tokens
        self._duplex = Duplex.of(
            self._session,
            settings.options(self._limits.audio_seconds),
            speak=settings.output == AUDIO,
            detector=None if settings.detects else Button(),
        )
        self._led = settings.lead
        service.worker.attach(self, self._turn)

    def _turn(self) -> bool:
        """One round. In the worker's thread."""
        unheard, events, error, busy = self._unheard, [], None, False
        try:
            busy = self._duplex.advance()
            events = self._duplex.events()
        except Exception as caught:
            error = caught
            self._service.worker.detach(self)
        if events or unheard or error:
            self._later(self._told, events, unheard, error)
        return busy

    def _leave(self) -> None:
        """Ends the conversation as it is set up, if it is. In the worker's thread."""
        self._service.worker.detach(self)
        if self._duplex is not None:
            self._duplex.close()
            self._later(self._told, self._duplex.events(), 0.0, None)
            self._later(self._narrator.begin)
            self._duplex = self._led = None

    def _close(self) -> None:
        """The session is over. In the worker's thread."""
        self._leave()
        if self._session is not None:
            self._session.close()

    def _later(self, function: Callable[..., None], *given: object) -> None:
        """Calls it in the event loop."""
        try:
            self._loop.call_soon_threadsafe(function, *given)
        except RuntimeError:  # the loop is closed
            pass

    def _told(self, events: Sequence[Event], heard: float, error: Exception | None) -> None:
        """What has happened, and how many seconds of sound have been taken in."""
        self._unheard = max(0.0, self._unheard - heard)
        for event in events:
            said = self._narrator.said.get(event.utterance) if isinstance(event, Recognised) else None
            for message in self._narrator.tell(event):
                self._send(message)
            if said is not None and self._settings.transcribes:
                task = asyncio.ensure_future(self._transcribe(said, self._wave(said)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if error is not None:
            self._break(error)

    def _wave(self, said: Said) -> np.ndarray:
        """The sound of an utterance, as far as it is still there."""
        pieces = [block[max(said.start - first, 0) : max(said.end - first, 0)] for first, block in self._heard]
        return np.concatenate([np.zeros((0,), np.float32), *pieces])

    async def _transcribe(self, said: Said, wave: np.ndarray) -> None:
        place = {"item_id": said.item, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"
        try:
            stream = self._service.start(lambda: iter([self._service.transcript(wave)]))
            async with aclosing(stream):
                text = await anext(stream)
        except Exception as error:
            self._send({"type": f"{kind}.failed", **place, "error": as_problem(error).body["error"]})
            return
        usage = {"type": "duration", "seconds": round(len(wave) / SAMPLE_RATE, 2)}
        self._send({"type": f"{kind}.completed", **place, "transcript": text, "usage": usage})

    # ---- what a client may say --------------------------------------------------------------------------------------

    async def _update(self, fields: Fields) -> None:
        settings = updated(self._settings, fields.take("session"), self._service)
        fields.finish()
        if self._session is not None and settings.instructions != self._settings.instructions:
            raise invalid("instructions can be changed before anything has been said only", "session.instructions")
        if settings.rate != self._settings.rate:
            self._resampler = Resampler(settings.rate, SAMPLE_RATE)
        self._settings = settings
        if self._duplex is not None:
            await self._lead()
        self._send({"type": "session.updated", "session": settings.shown(self._service, self.id)})

    async def _append(self, fields: Fields) -> None:
        data = decoded(fields.text("audio"), "audio")
        fields.finish()
        if len(data) % 2:
            raise invalid(f"audio has {len(data)} bytes; samples of pcm16 have two", "audio")
        seconds = len(data) / 2 / self._settings.rate
        self._pace(seconds)
        if self._unheard > MAX_UNHEARD:
            raise overloaded(f"the model is more than {MAX_UNHEARD:g} s behind; this sound is dropped", MAX_UNHEARD)
        if not self._settings.detects and self._buffered + seconds > self._limits.audio_seconds:
            raise invalid(
                f"the buffer would hold more than {self._limits.audio_seconds:g} s (limit audio_seconds)",
                "audio",
                "limit_exceeded",
            )
        duplex = await self._lead()
        if not self._settings.detects:
            if self._committed:
                raise invalid("what was committed has not been answered; send response.create first", "audio")
            if self._item is None:
                self._item = new_id("item")
                self._narrator.open_items.append(self._item)
            self._buffered += seconds
        self._service.metrics.heard_seconds.inc(seconds)
        self._hear(duplex, self._resampler.push(from_bytes(data)))

    def _hear(self, duplex: Duplex, block: np.ndarray) -> None:
        if self._settings.transcribes:
            self._heard.append((self._samples, block))
            while self._heard[0][0] < self._samples - KEPT_SECONDS * SAMPLE_RATE:
                self._heard.popleft()
        self._samples += len(block)
        self._unheard += len(block) / SAMPLE_RATE
        duplex.hear(block)
        self._service.worker.wake()

    def _pace(self, seconds: float) -> None:
        """Sound must not come much faster than it is spoken. Raises `Problem`."""
        now, speed = time.monotonic(), self._limits.audio_speed
        self._sound_room = min(AT_ONCE * speed, self._sound_room + (now - self._sound_since) * speed)
        self._sound_since = now
        if seconds > self._sound_room:
            raise Problem(
                429,
                f"sound comes more than {speed:g} times as fast as it is spoken (limit audio_speed); this block is "
                "dropped",
                kind=LIMITED,
                code="rate_limit_exceeded",
                param="audio",
            )
        self._sound_room -= seconds

    async def _commit(self, fields: Fields) -> None:
        fields.finish()
        self._needs_manual()
        if self._item is None or self._buffered < LEAST_SECONDS:
            raise invalid(
                f"the buffer holds {0 if self._item is None else self._buffered:.3f} s of sound; at least "
                f"{LEAST_SECONDS} s are needed",
                code="input_audio_buffer_commit_empty",
            )
        self._hear(self._duplex, self._resampler.flush())
        self._resampler = Resampler(self._settings.rate, SAMPLE_RATE)
        self._committed = True
        self._send(self._narrator.commit(self._item))
        self._add(user_item(self._item, [{"type": "input_audio", "transcript": None}]))

    async def _clear(self, fields: Fields) -> None:
        fields.finish()
        self._needs_manual()
        if self._item is not None:
            self._led = None  # set up anew, what was said before stays
            self._committed = False
            await self._lead()
        self._send({"type": "input_audio_buffer.cleared"})

    def _needs_manual(self) -> None:
        if self._settings.detects:
            raise invalid("the server hears when somebody speaks; set audio.input.turn_detection to null for this")

    async def _create_item(self, fields: Fields) -> None:
        fields.only("previous_item_id")
        item = Fields(fields.take("item"), "item")
        fields.finish()
        item_id = item.text("id", None) or new_id("item")
        item.text("type", choices=("message",))
        item.text("role", choices=("user",))
        item.ignore("status", "object")
        content = item.items("content")
        item.finish()
        if len(item_id) > MAX_ID or not content:
            raise invalid("item needs content, and an id of at most 64 characters if any", "item")
        texts, shown = [], []
        for number, part in enumerate(content):
            text, image = self._part(Fields(part, f"item.content[{number}]"))
            texts += [text] if text is not None else []
            shown += [image] if image is not None else []
        if sum(map(len, self._texts + texts)) > self._limits.text_characters:
            raise invalid(
                f"more than {self._limits.text_characters} characters (limit text_characters)", code="limit_exceeded"
            )
        if self._images + len(shown) > self._limits.session_images:
            raise invalid(
                f"{self._limits.session_images} pictures may be shown in a session (limit session_images)",
                code="limit_exceeded",
            )
        duplex = await self._lead()
        for image in shown:
            await self._service.outside(lambda image=image: duplex.show(image), "item.content")
        self._images += len(shown)
        self._texts += texts
        kept = [{"type": "input_text", "text": text} for text in texts] + [{"type": "input_image"} for _ in shown]
        self._add(user_item(item_id, kept))

    def _part(self, part: Fields) -> tuple[str | None, bytes | None]:
        """Text or picture of an item's content."""
        kind = part.text("type", choices=("input_text", "input_image"))
        text = image = None
        if kind == "input_text":
            text = plain_text(part.text("text"), part.param("text"))
            if not text.strip():
                raise invalid(f"{part.param('text')} is empty", part.param("text"))
        else:
            part.ignore("detail")
            image = picture(part.text("image_url"), part.param("image_url"), self._limits).data
        part.finish()
        return text, image

    def _add(self, item: ServerEvent) -> None:
        for message in self._narrator.add_item(item):
            self._send(message)

    async def _respond(self, fields: Fields) -> None:
        wanted = fields.nested("response")
        fields.finish()
        wanted.only("output_modalities", [self._settings.output])
        wanted.only("conversation", "auto")
        wanted.only("instructions", "", self._settings.instructions)
        wanted.ignore("metadata")
        wanted.finish()
        if not self._texts and not self._committed:
            raise invalid(
                "there is nothing to answer; add text by conversation.item.create, or sound, and commit it",
                code="nothing_to_answer",
            )
        duplex = await self._lead()
        if self._committed:
            self._committed, self._item, self._buffered = False, None, 0.0
            duplex.end_utterance()
        if self._texts:
            texts, self._texts = self._texts, []
            duplex.ask("\n".join(texts))
        self._service.worker.wake()

    async def _cancel(self, fields: Fields) -> None:
        fields.ignore("response_id")
        fields.finish()
        if self._narrator.current is None:
            raise invalid("there is no answer that could be broken off", code="response_cancel_not_active")
        self._narrator.cancelled = True
        self._duplex.cancel()
        self._service.worker.wake()

    async def _truncate(self, fields: Fields) -> None:
        item_id, index = fields.text("item_id"), fields.whole("content_index", 0, 0)
        milliseconds = fields.whole("audio_end_ms", 0, 10**7)
        fields.finish()
        answer = next((a for a in self._narrator.answers.values() if a.item == item_id), None)
        if answer is None:
            raise invalid(f"there is no answer {item_id[:80]!r} (any more)", "item_id", "item_not_found")
        self._duplex.played(milliseconds / 1000, answer.number)
        if answer is self._narrator.current:  # its player has stopped
            self._narrator.cancelled = True
            self._duplex.cancel()
        self._service.worker.wake()
        truncated = {"item_id": item_id, "content_index": index, "audio_end_ms": milliseconds}
        self._send({"type": "conversation.item.truncated", **truncated})


HANDLERS: dict[str, Callable[[Realtime, Fields], Awaitable[None]]] = {
    "session.update": Realtime._update,
    "input_audio_buffer.append": Realtime._append,
    "input_audio_buffer.commit": Realtime._commit,
    "input_audio_buffer.clear": Realtime._clear,
    "conversation.item.create": Realtime._create_item,
    "conversation.item.truncate": Realtime._truncate,
    "response.create": Realtime._respond,
    "response.cancel": Realtime._cancel,
}
