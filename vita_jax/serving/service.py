"""What all endpoints share: the model, the thread that computes, limits and figures."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from vita_jax.data.ctc_vocabulary import CtcVocabulary, load_ctc_vocabulary
from vita_jax.data.records import Media
from vita_jax.data.spoken_words import LANGUAGES, language_of
from vita_jax.data.templates import SystemTexts
from vita_jax.errors import UserError
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.session import Session
from vita_jax.inference.transcription import transcribe
from vita_jax.serving.fields import Fields
from vita_jax.serving.limits import Limits, Rate
from vita_jax.serving.metrics import Metrics
from vita_jax.serving.problems import SERVER, Problem, invalid, not_supported
from vita_jax.serving.worker import Stream, Worker

T = TypeVar("T")

DECODERS = 2  # threads that unpack pictures and sounds
AUTO = "auto"  # the voice of the language that is spoken


@dataclasses.dataclass(eq=False)
class Service:
    """A served model.

    Attributes:
      session: a conversation with it that is never held; others are made beside it.
      name: what requests call the model.
      limits: of requests.
      token: what requests must bring; None where nothing is asked.
      origins: web pages besides the server's own that may use it, such as "https://example.org".
      answers: how many requests are answered at a time.
      stopping: whether nothing new is begun.
    """

    session: Session = dataclasses.field(repr=False)
    name: str
    limits: Limits = Limits()
    token: str | None = dataclasses.field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    answers: int = 4
    stopping: bool = False

    def __post_init__(self) -> None:
        audio = self.session.config.audio
        longest = min(audio.max_seconds, self.limits.audio_seconds)
        config = dataclasses.replace(self.session.config, audio=dataclasses.replace(audio, max_seconds=longest))
        self.session = self.session.beside(config=config)
        self.created = int(time.time())
        self.worker = Worker(running=self.answers, waiting=self.limits.waiting)
        self.metrics, self.rate = Metrics(), Rate(self.limits.requests_per_minute)
        self.sessions: set[Any] = set()  # realtime sessions
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self.metrics.watch("jobs_running", "Answers that are being made", lambda: self.worker.load[0])
        self.metrics.watch("jobs_waiting", "Requests that wait for their turn", lambda: self.worker.load[1])

    # ---- what the model can do --------------------------------------------------------------------------------------

    @property
    def hears(self) -> bool:
        """Whether it understands sound."""
        return self.session.config.model.audio is not None and self.session.has("audio")

    @cached_property
    def voices(self) -> tuple[str, ...]:
        """What `voice` may be; none where the model does not speak."""
        if self.session.external is not None:
            return (AUTO, *LANGUAGES)
        if not (self.session.has("codec") and self.session.has("speech")):
            return ()
        return (AUTO, *sorted(self.session.speakers))

    @cached_property
    def recogniser(self) -> CtcVocabulary | None:
        """The characters of the model's recogniser; None where it has none."""
        file = self.session.ctc_vocabulary_file
        return None if file is None else load_ctc_vocabulary(file)

    @cached_property
    def mute_reason(self) -> str | None:
        """Why there are no realtime sessions with this model; None: there are."""
        try:
            Duplex.of(self.conversation(), speak=bool(self.voices)).close()
        except UserError as error:
            return str(error)
        return None

    def conversation(self, *, system: str | None = None, **settings: Any) -> Session:
        """A new conversation; system: text that replaces the model's own. settings: of `Session`."""
        if system is not None:
            texts = SystemTexts(system, system, system)
            settings["config"] = dataclasses.replace(self.session.config, system_texts=texts)
        return self.session.beside(**settings)

    def transcript(self, wave: np.ndarray) -> str:
        """What is said, by the recogniser, which must be there: (n,) float32 at 16 kHz. In the worker's thread."""
        return transcribe(self.session.model, self.session.params, self.recogniser, [wave], batch=1)[0]

    # ---- requests ---------------------------------------------------------------------------------------------------

    def check_model(self, fields: Fields) -> None:
        """Raises `Problem` unless the request is for this model."""
        name = fields.text("model")
        if name != self.name:
            raise Problem(
                404,
                f"there is no model {name[:80]!r} here; use {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def voice(self, fields: Fields, default: Any = AUTO) -> str:
        """The voice that a request asks for, see `voices`. Raises `Problem`, too, if the model does not speak."""
        if fields.has("voice") and not self.voices:
            raise not_supported("this model does not speak; leave voice out", fields.param("voice"))
        return fields.text("voice", default, choices=self.voices)

    def language(self, voice: str, text: str) -> str:
        """In which language a text is spoken."""
        return language_of(text) if voice == AUTO else voice

    async def decode(self, session: Session, media: Sequence[Media]) -> None:
        """Unpacks pictures and sounds in another thread. Raises `Problem` 400 for one that cannot be."""
        for item in media:
            await self.outside(lambda item=item: session.known.decode(item), item.name)

    async def outside(self, function: Callable[[], T], param: str) -> T:
        """Does something with a file of the request in a thread for it; its `UserError` becomes a `Problem`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, function)
        except UserError as error:
            raise invalid(str(error), param) from None

    def start(self, make: Callable[[], Iterator[T]]) -> Stream[T]:
        """Starts a job, see `Worker.stream`."""
        return self.worker.stream(make)

    def close(self) -> None:
        """Ends everything."""
        self.worker.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)


async def until_left(request: Request, stream: Stream[T], seconds: float) -> AsyncGenerator[T]:
    """The items of a job for a client that is still there; the job ends with it.

    Raises:
      Problem: 504, the answer takes longer than `seconds`.
      ClientDisconnect: the client has gone.
    """
    gone = asyncio.ensure_future(_left(request))
    end = asyncio.get_running_loop().time() + seconds
    try:
        while True:
            item = asyncio.ensure_future(anext(stream))
            left = end - asyncio.get_running_loop().time()
            await asyncio.wait({item, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                item.cancel()
                if gone.done():
                    raise ConnectionResetError("the client has gone")
                raise Problem(
                    504, f"the answer takes longer than {seconds:g} s (limit request_seconds)", kind=SERVER,
                    code="timeout",
                )  # fmt: skip
            try:
                yield item.result()
            except StopAsyncIteration:
                return
    finally:
        gone.cancel()
        await stream.aclose()


async def _left(request: Request) -> None:
    """Returns when the client has gone; the request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
