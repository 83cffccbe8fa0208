"""`/v1/chat/completions`: text, pictures and sounds in, text or speech out, at once or as it is made."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vita_jax.data.audio import read_audio
from vita_jax.inference.engine import FULL
from vita_jax.inference.row_sampling import Penalties
from vita_jax.inference.sampling import GREEDY, Sampler, Temperature, TopP
from vita_jax.inference.session import Session
from vita_jax.serving.content import Conversation, read_conversation
from vita_jax.serving.fields import Fields, read_json
from vita_jax.serving.problems import invalid, not_supported
from vita_jax.serving.responses import END_OF_EVENTS, StreamedResponse, json_response, read_body, sent_event
from vita_jax.serving.service import Service, until_left
from vita_jax.serving.sounds import FORMATS, PCM, RATE, Resampler, encoded, to_bytes

ENDPOINT = "/v1/chat/completions"
DEFAULT_TOKENS = 256
MAX_STOPS = 4
PCM16 = "pcm16"  # what this endpoint calls `PCM`
# Of the API, without an effect on what is answered here.
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "store")


@dataclass(frozen=True)
class ChatRequest:
    """What is wanted.

    Attributes:
      conversation: what is asked.
      sampler, penalties, seed, max_new_tokens: of `Session`.
      stop: texts that end the answer and are left out.
      voice: what speaks, None for text only.
      sound_format: of speech.
      stream, usage: whether the answer comes in pieces, and its usage as a last one.
    """

    conversation: Conversation
    sampler: Sampler
    penalties: Penalties
    seed: int
    max_new_tokens: int
    stop: tuple[str, ...]
    voice: str | None
    sound_format: str
    stream: bool
    usage: bool


@dataclass
class Piece:
    """More of an answer: text, and where it is spoken sound, 16-bit samples."""

    text: str = ""
    sound: bytes = b""


@dataclass
class Ending:
    """How an answer ended.

    Attributes:
      reason: "stop" or "length".
      state: what the model took the question for, see `Session.last_state`.
      prompt, cached, answer: numbers of tokens.
    """

    reason: str = "stop"
    state: str | None = None
    prompt: int = 0
    cached: int = 0
    answer: int = 0

    @property
    def usage(self) -> dict[str, Any]:
        """As the API has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def read_request(data: bytes, service: Service) -> ChatRequest:
    """A request body. Raises `Problem`."""
    fields = Fields(read_json(data))
    service.check_model(fields)
    limits = service.limits
    conversation = read_conversation(fields.items("messages"), limits)
    if conversation.files and not service.hears and any(file.kind == "audio" for file in conversation.files):
        raise invalid("this model does not hear; leave input_audio out", "messages")
    temperature = fields.number("temperature", 0, 2, None)
    top_p = fields.number("top_p", 0, 1, None)
    penalties = Penalties(
        presence=fields.number("presence_penalty", -2, 2, 0.0), frequency=fields.number("frequency_penalty", -2, 2, 0.0)
    )
    seed = fields.whole("seed", -(2**63), 2**63 - 1, None)
    tokens = [fields.whole(name, 1, limits.new_tokens, None) for name in ("max_tokens", "max_completion_tokens")]
    stream = fields.flag("stream")
    options = fields.nested("stream_options")
    usage = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.finish()
    voice, sound_format = _speech(fields, service, stream)
    request = ChatRequest(
        conversation=conversation,
        sampler=_sampler(temperature, top_p),
        penalties=penalties,
        seed=secrets.randbits(31) if seed is None else seed % 2**31,
        max_new_tokens=next((n for n in reversed(tokens) if n), min(DEFAULT_TOKENS, limits.new_tokens)),
        stop=_stops(fields.take("stop", [])),
        voice=voice,
        sound_format=sound_format,
        stream=stream,
        usage=usage,
    )
    fields.ignore(*IGNORED)
    fields.only("n", 1)
    fields.only("logprobs", False)
    fields.only("tools", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("response_format", {"type": "text"})
    fields.only("logit_bias", {})
    fields.finish()
    return request


def _sampler(temperature: float | None, top_p: float | None) -> Sampler:
    """Without a temperature the most probable tokens are taken, as everywhere in this package."""
    if not temperature and not (temperature is None and top_p is not None):
        return GREEDY
    temperature = 1.0 if temperature is None else max(temperature, 1e-3)
    return Temperature(temperature) if top_p is None or top_p == 1 else TopP(max(top_p, 1e-6), temperature)


def _stops(stop: Any) -> tuple[str, ...]:
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise invalid(f"stop must be a text or a list of at most {MAX_STOPS} texts, none of them empty", "stop")
    return tuple(stop)


def _speech(fields: Fields, service: Service, stream: bool) -> tuple[str | None, str]:
    """Voice and format of a spoken answer; None: it is written."""
    modalities = fields.items("modalities", ["text"])
    audio = fields.nested("audio")
    if sorted(map(str, modalities)) == ["text"]:
        return None, PCM
    if sorted(map(str, modalities)) != ["audio", "text"]:
        raise invalid('modalities must be ["text"] or ["text", "audio"]', "modalities")
    if not service.voices:
        raise not_supported("this model does not speak; leave audio out", "modalities")
    voice = service.voice(audio)
    name = audio.text("format", choices=(PCM16, *FORMATS))
    audio.finish()
    if stream and name != PCM16:
        raise invalid(f"audio.format must be {PCM16} where stream is true", "audio.format")
    return voice, PCM if name == PCM16 else name


# ---- in the worker's thread -----------------------------------------------------------------------------------------


def answer(service: Service, request: ChatRequest, session: Session) -> Iterator[Piece | Ending]:
    """The answer piece by piece, its ending last."""
    said = request.conversation.question
    language = None
    try:
        texts = _until(session.ask(said.text, said.images, audio=said.sounds), request.stop)
        if request.voice is not None:
            language = _language(service, request)
        if request.voice is None:
            yield from (Piece(text) for text in texts)
        else:
            yield from _aloud(session, texts, language or service.language(request.voice, ""))
        work = session.work
        yield Ending(
            "length" if work.reason == FULL else "stop",
            session.last_state,
            len(work.prompt),
            work.reused,
            len(work.tokens),
        )
    finally:
        session.close()


def _language(service: Service, request: ChatRequest) -> str:
    """Of the question, since the answer is spoken before it is there; of sound what the recogniser hears."""
    said = request.conversation.question
    text = said.text
    if not text.strip() and service.recogniser is not None:
        audio = service.session.config.audio
        text = "".join(service.transcript(read_audio(sound.data, audio, name=sound.name)) for sound in said.sounds)
    return service.language(request.voice, text)


def _aloud(session: Session, texts: Iterator[str], language: str) -> Iterator[Piece]:
    """What is said with its sound at `RATE`; the text of a piece comes with its first sound."""
    resampler, begun = None, False
    rate = session.external(language).sampling_rate if session.external else session.speaker(language).sampling_rate
    resampler = Resampler(rate, RATE)
    for sound in session.aloud(texts, language):
        text = "" if begun else sound.text
        begun = not sound.ends
        samples = resampler.push(sound.samples)
        if text or len(samples):
            yield Piece(text, to_bytes(samples))
    rest = resampler.flush()
    if len(rest):
        yield Piece("", to_bytes(rest))


def _until(texts: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """The texts up to the first of the stops; what might be the beginning of one is held back."""
    if not stops:
        yield from texts
        return
    held, room = "", max(map(len, stops)) - 1
    try:
        for text in texts:
            held += text
            found = [held.find(stop) for stop in stops if stop in held]
            if found:
                if min(found):
                    yield held[: min(found)]
                return
            sure = len(held) - room
            if sure > 0:
                yield held[:sure]
                held = held[sure:]
        if held:
            yield held
    finally:
        texts.close()


# ---- the endpoint ---------------------------------------------------------------------------------------------------


async def chat_completions(request: Request) -> Response:
    """Answers one request. Raises `Problem`."""
    service: Service = request.app.state.service
    began = time.perf_counter()
    wanted = read_request(await read_body(request, service.limits, "application/json"), service)
    asked = wanted.conversation
    session = service.conversation(
        system=asked.system,
        turns=asked.turns,
        media=asked.media,
        sampler=wanted.sampler,
        penalties=wanted.penalties,
        seed=wanted.seed,
        max_new_tokens=wanted.max_new_tokens,
    )
    await service.decode(session, asked.files)
    stream = service.start(lambda: answer(service, wanted, session))
    pieces = _counted(until_left(request, stream, service.limits.request_seconds), service, began)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    first = await anext(pieces)  # what is wrong is said with a status of its own
    if not wanted.stream:
        return await _whole(head, [first, *[piece async for piece in pieces]], wanted, service)
    events = _events(head, first, pieces, wanted)
    return StreamedResponse(events, "text/event-stream", service.limits.send_seconds, stream.aclose)


async def _counted(
    pieces: AsyncGenerator[Piece | Ending], service: Service, began: float
) -> AsyncGenerator[Piece | Ending]:
    """The pieces, noted in the figures."""
    metrics, text, sound = service.metrics, False, False
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Ending):
                metrics.prompt_tokens.inc(piece.prompt)
                metrics.reused_tokens.inc(piece.cached)
                metrics.answer_tokens.inc(piece.answer)
            else:
                if piece.text and not text:
                    text = True
                    metrics.first_text.labels(ENDPOINT).observe(time.perf_counter() - began)
                if piece.sound and not sound:
                    sound = True
                    metrics.first_audio.labels(ENDPOINT).observe(time.perf_counter() - began)
                metrics.spoken_seconds.inc(len(piece.sound) / 2 / RATE)
            yield piece


async def _whole(
    head: dict[str, Any], items: Sequence[Piece | Ending], wanted: ChatRequest, service: Service
) -> Response:
    ending = items[-1]
    text = "".join(piece.text for piece in items[:-1])
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "state": ending.state}
    if wanted.voice is not None:
        sound = b"".join(piece.sound for piece in items[:-1])
        sound = await service.outside(lambda: encoded(sound, wanted.sound_format), "audio")
        message |= {"content": None, "audio": _audio(head) | {"data": _base64(sound), "transcript": text}}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ending.reason}
    return json_response(head | {"object": "chat.completion", "choices": [choice], "usage": ending.usage})


async def _events(
    head: dict[str, Any], first: Piece | Ending, pieces: AsyncGenerator[Piece | Ending], wanted: ChatRequest
) -> AsyncGenerator[bytes]:
    head = head | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, **more}
        return sent_event(head | {"choices": [choice]} | ({"usage": None} if wanted.usage else {}))

    async with aclosing(pieces):
        yield chunk({"role": "assistant", "content": "" if wanted.voice is None else None, "refusal": None})
        piece: Piece | Ending | None = first
        while piece is not None:
            if isinstance(piece, Ending):
                yield chunk({"state": piece.state}, piece.reason)
                if wanted.usage:
                    yield sent_event(head | {"choices": [], "usage": piece.usage})
            elif wanted.voice is None:
                yield chunk({"content": piece.text})
            else:
                audio = {"id": _audio(head)["id"]}
                audio |= {"transcript": piece.text} if piece.text else {}
                audio |= {"data": _base64(piece.sound)} if piece.sound else {}
                yield chunk({"audio": audio})
            piece = await anext(pieces, None)
        yield END_OF_EVENTS


def _audio(head: dict[str, Any]) -> dict[str, Any]:
    """Sound is not kept, so it expires when it is made."""
    return {"id": head["id"].replace("chatcmpl", "audio"), "expires_at": head["created"]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
