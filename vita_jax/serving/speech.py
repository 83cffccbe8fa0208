"""`/v1/audio/transcriptions`: what is said in a file; `/v1/audio/speech`: text aloud."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from vita_jax.data.audio import read_audio
from vita_jax.data.spoken_words import language_of
from vita_jax.serving.fields import Fields, read_json, whole_text
from vita_jax.serving.limits import Limits
from vita_jax.serving.problems import Problem, invalid
from vita_jax.serving.responses import StreamedResponse, json_response, read_body
from vita_jax.serving.service import Service, until_left
from vita_jax.serving.sounds import FORMATS, PCM, PCM_TYPE, RATE, Resampler, encoded, to_bytes

MAX_FIELDS = 20
MIN_SECONDS = 0.1  # less sound than this is no word


async def transcriptions(request: Request) -> Response:
    """Writes down what is said, by the model's recogniser. Raises `Problem`."""
    service: Service = request.app.state.service
    name, data, wanted = await read_form(request, service)
    config = service.session.config.audio
    wave = await service.outside(lambda: read_audio(data, config, name=name), "file")
    seconds = len(wave) / config.sample_rate
    if seconds < MIN_SECONDS:
        raise invalid(f"{name} lasts {seconds:.3f} s; at least {MIN_SECONDS} s are needed", "file")
    service.metrics.heard_seconds.inc(seconds)
    stream = service.start(lambda: iter([service.transcript(wave)]))
    pieces = until_left(request, stream, service.limits.request_seconds)
    async with aclosing(pieces):
        text = await anext(pieces)
    if wanted == "text":
        return PlainTextResponse(text + "\n")
    usage = {"usage": {"type": "duration", "seconds": round(seconds)}}
    if wanted == "json":
        return json_response({"text": text} | usage)
    words = {"task": "transcribe", "language": language_of(text), "duration": round(seconds, 2)}
    return json_response({"text": text} | words | usage)


async def read_form(request: Request, service: Service) -> tuple[str, bytes, str]:
    """Name and content of the file, and the format of the answer. Raises `Problem`."""
    form = await _form(request, service.limits)
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise invalid("file is missing; send the sound as a file of the form", "file", "missing_required_parameter")
    texts = {}
    for key, value in form.multi_items():
        if key != "file":
            if isinstance(value, UploadFile):
                raise invalid(f"{key[:80]} is a file; only the sound is expected", key[:80])
            texts[key] = whole_text(value, key)
    fields = Fields(texts)
    service.check_model(fields)
    wanted = fields.text("response_format", "json", choices=("json", "text", "verbose_json"))
    # The recogniser takes neither hints nor chances.
    fields.ignore("language", "prompt", "temperature")
    fields.only("stream", "false", "False")
    fields.finish()
    return (file.filename or "file")[:80], await file.read(), wanted


async def _form(request: Request, limits: Limits) -> FormData:
    """The parts of the body, which is read whole first, so that it is bounded and in time."""
    body = await read_body(request, limits, "multipart/form-data")

    async def pieces() -> AsyncGenerator[bytes]:
        yield body
        yield b""

    try:
        parser = MultiPartParser(
            request.headers, pieces(), max_files=1, max_fields=MAX_FIELDS, max_part_size=limits.text_characters
        )
        return await parser.parse()
    except (MultiPartException, ValueError, KeyError, LookupError) as error:
        raise invalid(f"the form is damaged: {getattr(error, 'message', error)}") from None


async def speech(request: Request) -> Response:
    """Says a text; samples come as they are made, files when they are whole. Raises `Problem`."""
    service: Service = request.app.state.service
    fields = Fields(read_json(await read_body(request, service.limits, "application/json")))
    service.check_model(fields)
    text = fields.text("input")
    if not text.strip():
        raise invalid("input is empty; write what is to be said", "input")
    if len(text) > service.limits.text_characters:
        raise Problem(
            400,
            f"input has {len(text)} characters, {service.limits.text_characters} are allowed (limit text_characters)",
            code="limit_exceeded",
            param="input",
        )
    voice = service.voice(fields)
    name = fields.text("response_format", "mp3", choices=(*FORMATS, PCM))
    fields.only("speed", 1, 1.0)
    fields.only("instructions", "")
    fields.only("stream_format", "audio")
    fields.finish()
    stream = service.start(lambda: say(service, text, service.language(voice, text)))
    pieces = until_left(request, stream, service.limits.request_seconds)
    if name == PCM:
        first = await anext(pieces)
        return StreamedResponse(_all(first, pieces), PCM_TYPE, service.limits.send_seconds, stream.aclose)
    sound = b"".join([piece async for piece in pieces])
    data = await service.outside(lambda: encoded(sound, name), "response_format")
    return Response(data, media_type=FORMATS[name][2])


async def _all(first: bytes, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece


def say(service: Service, text: str, language: str) -> Iterator[bytes]:
    """A text as 16-bit samples at `RATE`, piece by piece; in the worker's thread.

    Raises:
      Problem: 400, nothing of it can be said.
    """
    session = service.conversation()
    external = session.external
    rate = external(language).sampling_rate if external is not None else session.speaker(language).sampling_rate
    resampler, said = Resampler(rate, RATE), False
    for sound in session.aloud([text], language):
        said = said or len(sound.samples) > 0
        data = to_bytes(resampler.push(sound.samples))
        if data:
            yield data
    if not said:
        raise invalid("the voice makes no sound of this input; write words of its language", "input")
    data = to_bytes(resampler.flush())
    if data:
        yield data
    service.metrics.spoken_seconds.inc(resampler.seconds)
