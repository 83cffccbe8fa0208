"""The model's side of a duplex conversation: two streams that share its weights, and what each says.

A stream is a seat at an engine: one may answer while the other is asked. What tells a query from noise is the first
token of the answer (VITA-1.0 `<1> <2> <3>`, VITA-1.5 its three symbols), or a state head, which is read where it was
trained: at the last position before the answer (three classes) or at the end of the sound (two classes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from vita_jax.data.ctc_vocabulary import load_ctc_vocabulary
from vita_jax.data.prompts import state_symbol_ids, stop_ids
from vita_jax.data.records import Media
from vita_jax.data.spoken_words import language_of
from vita_jax.data.tokenizer import TextStream
from vita_jax.errors import UserError
from vita_jax.inference.engine import Answer, AnswerOptions, Engine, Seat
from vita_jax.inference.prefix import LIVE, Prompt
from vita_jax.inference.session import Session
from vita_jax.inference.transcription import transcribe
from vita_jax.models.state_head import INPUT_CLASSES, StateHead, StateHeadConfig

TOKEN, HEAD = "token", "head"
# Classes of a state head under the names that the symbols have, by where it is read; others mean nothing.
HEAD_STATES = {
    "answer": tuple("audio" if name == "speech" else name for name in INPUT_CLASSES),
    "audio": ("audio", "noise"),
}

Turns = Sequence[Mapping[str, str]]


@partial(jax.jit, static_argnames="head")
def _head_logits(head: StateHead, params: Any, hidden: jax.Array) -> jax.Array:
    return head.apply({"params": params}, hidden)


def how_to_decide(decide: str, symbols: Mapping[int, str], head: StateHeadConfig | None, trained: bool) -> str:
    """What tells queries from noise: "token" or "head".

    Args:
      decide: "token", "head", or "auto": the token where there are symbols.
      symbols: state symbols by token.
      head: of the model.
      trained: whether the head is not as it was drawn.

    Raises:
      UserError: the model has nothing of the kind, or a head for something else.
    """
    if decide in ("auto", TOKEN) and "noise" in symbols.values():
        return TOKEN
    if decide == TOKEN:
        raise UserError("decide='token', but the model's template has no state symbols; use decide='head'")
    if head is None or not trained:
        raise UserError(
            "the model cannot tell what is meant for it: "
            + ("" if symbols else "its template has no state symbols, and ")
            + "it has no trained state head; use one trained up to stage 2.2"
        )
    if head.num_classes != len(INPUT_CLASSES):
        raise UserError(
            f"the state head has {head.num_classes} classes, but queries and noise are told apart by one of "
            f"{len(INPUT_CLASSES)}; use decide='token'"
        )
    return HEAD


class Sound:
    """An utterance as the model hears it. media: its name in prompts. num_tokens: heard so far."""

    def __init__(self, media: Media) -> None:
        self.media = media
        self._pieces: list[np.ndarray] = []

    @property
    def num_tokens(self) -> int:
        return sum(len(piece) for piece in self._pieces)

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """More tokens (p d) -> all of them."""
        self._pieces.append(tokens)
        return np.concatenate(self._pieces)


class Reply:
    """An answer as it comes. Reading it drives nothing; the rounds of `Streams.step` do.

    Attributes:
      stream: that gives it.
      decided: whether it is known what the question was taken for.
      state: that: "audio", "text", "noise", or None where the model does not say.
      symbol: the state symbol that it began with, "" for none.
      done: whether it has been read to its end.
    """

    def __init__(
        self,
        streams: Streams,
        stream: int,
        prompt: Prompt,
        options: AnswerOptions,
        *,
        decided: bool = False,
        state: str | None = None,
    ) -> None:
        """
        Args:
          streams, stream: who gives it.
          prompt: to what.
          options: how it is drawn.
          decided, state: see `Streams.ask`.
        """
        self.stream, self.state, self.decided = stream, state, decided
        self.symbol, self.done = "", False
        self._streams, self._seat = streams, streams.seats[stream]
        self._prompt, self._options = prompt, options
        self._decoder, self._text, self._read, self._given = TextStream(streams.tokenizer), "", 0, 0
        self._first: Answer | None = None  # the prompt as far as the state head has to see it
        self._work: Answer | None = None
        if streams.decides == HEAD and not decided:
            self._first = self._seat.prepare(streams.head_prompt(prompt), needs_last=True)
        else:
            self._ask()

    def _ask(self) -> None:
        self._work = self._seat.answer(self._prompt, self._options)

    def update(self) -> None:
        """Takes in what the stream has said since the last time."""
        if self.done or (self._work is None and not self._read_head()):
            return
        for token in self._work.tokens[self._read :]:
            self._take(token)
        self._read = len(self._work.tokens)
        if self._work.reason is not None:
            self._text += self._decoder.flush()
            self.done = True

    def poll(self) -> str:
        """The text that is new, without the symbol. Nothing comes before it is decided, and nothing of noise."""
        self.update()
        if self.state == "noise" or not self.decided:
            return ""
        text = self._text.lstrip()  # a space after the symbol does not belong to it
        new, self._given = text[self._given :], len(text)
        return new

    def stop(self) -> None:
        """Ends it where it is."""
        if self._seat.work is not None and self._seat.work in (self._work, self._first):
            self._seat.interrupt()
        self.done = True

    def _read_head(self) -> bool:
        """Whether there is an answer to be read."""
        if self._first.reason is None:
            return False
        self.state, self.decided = self._streams.read_head(self._first.hidden), True
        if self.state == "noise":
            self.done = True
            return False
        self._ask()
        return True

    def _take(self, token: int) -> None:
        symbols, tokenizer = self._streams.symbols, self._streams.tokenizer
        if token in symbols and not self.symbol and not self._text.strip():
            self.symbol = tokenizer.decode([token])
            if not self.decided:
                self.state, self.decided = symbols[token], True
        elif token < tokenizer.vocab_size:  # the model's table may have more rows; those spell nothing
            self._text += self._decoder.push(token)
            self.decided = self.decided or bool(self._text.strip())


class Streams:
    """Two seats of one engine, ears, eyes, and what decides."""

    def __init__(self, session: Session, decide: str = "auto", devices: int = 1) -> None:
        """
        Args:
          session: whose model it is; see `Duplex.of`.
          decide: see `how_to_decide`.
          devices: 2 puts a copy of the language model on a second device, for the second stream.

        Raises:
          UserError: see `Duplex.of`.
        """
        self._session, self.tokenizer = session, session.tokenizer
        session.listener  # noqa: B018 (says at once that a model does not hear)
        context, self._head_config = session.context, session.config.model.state_head
        symbols = context.options.state_symbols and context.template.state_symbols is not None
        self.symbols = state_symbol_ids(self.tokenizer, context.template) if symbols else {}
        self.decides = how_to_decide(decide, self.symbols, self._head_config, session.has("state_head"))
        stops = stop_ids(self.tokenizer, context.template)
        self._options = AnswerOptions(session.max_new_tokens, stops, session.sampler, session.penalties, session.seed)
        self.engines = _engines(session, devices)
        self.seats: tuple[Seat, Seat] = (self.engines[0].join(), self.engines[-1].join())
        self._pool = ThreadPoolExecutor(1) if devices == 2 else None

    # ---- hearing and seeing -----------------------------------------------------------------------------------------

    def begin_sound(self) -> Sound:
        """Somebody begins to speak; one at a time."""
        self._session.listener.begin()
        return Sound(self._session.known.begin_sound())

    def hear(self, sound: Sound, block: np.ndarray) -> None:
        """More of it, (n,) float32 at 16 kHz."""
        self._add(sound, self._session.listener.hear(block))

    def end_sound(self, sound: Sound) -> bool:
        """It is over; whether there was enough of it to be heard."""
        self._add(sound, self._session.listener.end())
        return sound.num_tokens > 0

    def _add(self, sound: Sound, tokens: np.ndarray) -> None:
        if len(tokens):
            self._session.known.grow_sound(sound.media, sound.add(tokens))

    def forget(self, sound: Sound) -> None:
        """No prompt will ask for it any more."""
        self._session.known.forget_sound(sound.media)

    def look(self, picture: Media) -> None:
        """Sees a picture ahead of its question."""
        self._session.known.look(picture)

    def language(self, wave: np.ndarray | None, answer: str) -> str:
        """In which language an answer is spoken: that of the question, as the recogniser hears it; of a typed one, or
        without a recogniser, that of the answer.
        """
        file = self._session.ctc_vocabulary_file
        if wave is None or file is None:
            return language_of(answer)
        heard = transcribe(self._session.model, self._session.params, load_ctc_vocabulary(file), [wave], batch=1)[0]
        return language_of(heard or answer)

    # ---- asking -----------------------------------------------------------------------------------------------------

    def prompt(self, turns: Turns, media: Sequence[Media]) -> Prompt:
        """A conversation that ends with a question. Raises UserError if it leaves no room for an answer."""
        prompt, slots = self._session.known.prompt(turns, media), self.engines[0].num_slots
        room = min(self._session.max_new_tokens, slots // 4)
        if len(prompt) + room > slots:
            raise UserError(
                f"the conversation has {len(prompt)} positions and its answer {room}, the model has room for {slots}; "
                "say less at a time, or start a new one"
            )
        return prompt

    def prepare(self, stream: int, turns: Turns, media: Sequence[Media], sound: Sound) -> None:
        """Computes the conversation up to what has been heard of a sound, its last medium; not while another sound's
        is being computed.
        """
        if self.seats[stream].work is None and sound.num_tokens:
            prompt, name = self.prompt(turns, media), self._session.known.sound_name(sound.media)
            last = max(i for i, key in enumerate(prompt.keys) if not isinstance(key, int) and key[0] == name)
            self.seats[stream].prepare(prompt.cut(last + 1))

    def ask(
        self, stream: int, turns: Turns, media: Sequence[Media], *, decided: bool = False, state: str | None = None
    ) -> Reply:
        """Begins an answer.

        Args:
          stream: 0 or 1; what it did before ends.
          turns, media: the conversation, with the question as its last turn.
          decided: whether it is known already what the question is taken for: `state`.

        Raises:
          UserError: see `prompt`; nothing has been done then.
        """
        prompt = self.prompt(turns, media)
        self.seats[stream].interrupt()
        options = dataclasses.replace(self._options, seed=self._session.seed + len(turns) - 1)
        return Reply(self, stream, prompt, options, decided=decided, state=state)

    def head_prompt(self, prompt: Prompt) -> Prompt:
        """The part of a prompt at whose end the state head is read."""
        if self._head_config.place == "answer":
            return prompt
        kinds = (LIVE, "clip")
        sounds = [i for i, key in enumerate(prompt.keys) if not isinstance(key, int) and key[0][0] in kinds]
        return prompt.cut(max(sounds) + 1)

    def read_head(self, hidden: jax.Array) -> str:
        """What the state head takes the input for, (1 d) -> "audio", "noise" or "text"."""
        states = HEAD_STATES[self._head_config.place]
        head = StateHead(self._head_config, self._session.model.dtype)
        logits = np.asarray(_head_logits(head, self._session.params["state_head"], hidden))[0]
        return states[int(np.argmax(logits[: len(states)]))]

    def step(self) -> bool:
        """One round of the engines; whether there was anything to do."""
        working = [engine for engine in self.engines if any(s.engine is engine and s.work for s in self.seats)]
        if len(working) < 2:
            return any([engine.step() for engine in working])
        other = self._pool.submit(working[1].step)  # each device has a thread of its own as long as the round takes
        return any([working[0].step(), other.result()])

    def close(self) -> None:
        """Gives the seats back."""
        for seat in self.seats:
            seat.leave()
        if self._pool is not None:
            self._pool.shutdown()


def _engines(session: Session, devices: int) -> list[Engine]:
    """One engine, or two on two devices. Raises UserError if there are not enough rows or devices."""
    engine = session.engine
    if devices == 1:
        if engine.num_rows < 2:
            raise UserError("a duplex conversation needs two rows of the engine; load the model with num_rows=2")
        return [engine]
    here = next(iter(jax.tree.leaves(session.params["language"])[0].devices()))
    others = [device for device in jax.devices() if device != here]
    if not others:
        raise UserError(f"duplex devices=2, but there is only one: {here}; use devices=1")
    language = jax.device_put(session.params["language"], others[0])
    options = {"num_slots": engine.num_slots, "cache_dtype": engine.cache_dtype}
    return [engine, Engine(session.model, {"language": language}, **options)]
