"""A conversation with a trained model: load a checkpoint once, then ask about pictures, videos or nothing but text, in
writing or aloud, from a file or while it is spoken.

Several conversations share a model by `beside`: one engine answers them side by side.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.examples import ExampleContext, media_from_file
from vita_jax.data.prompts import split_state_symbol, stop_ids, stop_text, with_media
from vita_jax.data.records import Media
from vita_jax.data.tokenizer import TextStream, Tokenizer, load_tokenizer, until
from vita_jax.errors import UserError
from vita_jax.inference.engine import Answer, AnswerOptions, Engine, Seat
from vita_jax.inference.generate import Params
from vita_jax.inference.listen import Listener, ListenOptions
from vita_jax.inference.media import KnownMedia
from vita_jax.inference.prefix import Prompt
from vita_jax.inference.quantization import FLOATS, QuantizationConfig, describe_memory
from vita_jax.inference.row_sampling import NO_PENALTIES, Penalties
from vita_jax.inference.sampling import GREEDY, Sampler
from vita_jax.inference.speak import Speaker, voices
from vita_jax.inference.talk import ModelVoice, Spoken, Voice, talk
from vita_jax.inference.timings import FIRST_TOKEN, Timeline
from vita_jax.storage import place
from vita_jax.training.checkpoint import LoadedModel, load_params
from vita_jax.training.experiment import (
    CTC_VOCABULARY,
    ExperimentConfig,
    build_model,
    data_folder,
    example_context,
)
from vita_jax.training.families import Model, family_of
from vita_jax.training.stages import flatten, trained_so_far

File = str | Path | Media  # of a question: where it lies, or what is in it

# Positions that a conversation has room for where the model was trained for more.
MAX_SLOTS = 4096


@dataclasses.dataclass
class Session:
    """A model and what has been said so far.

    Attributes:
      model, params, config, tokenizer: the loaded model; `config.run_dir` is where its run lies now.
      turns: questions and answers in order; answers as generated, state symbol included.
      media: the files of all questions, in order.
      max_new_tokens: the longest answer.
      trained: components that its stages have trained; None if it is not known.
      last_state: what the last answer's state symbol said was asked: "audio", "noise" (sound that is not meant for the
        model) or "text"; None without a symbol.
      sampler, penalties, seed: how answers are drawn.
      listening: how sound is heard that is still being spoken.
      external: language -> what speaks instead of the model's own voice; None = nothing does.
      engine: what answers; its own if None.
    """

    model: Model
    params: Params
    config: ExperimentConfig
    tokenizer: Tokenizer
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)
    media: list[Media] = dataclasses.field(default_factory=list)
    max_new_tokens: int = 256
    trained: frozenset[str] | None = None
    last_state: str | None = None
    sampler: Sampler = GREEDY
    penalties: Penalties = NO_PENALTIES
    seed: int = 0
    listening: ListenOptions = ListenOptions()
    external: Callable[[str], Voice] | None = None
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if self.engine is None:
            self.engine = Engine(self.model, self.params, num_slots=_slots(self.config))
        self._seat: Seat = self.engine.join()
        self._answered: Asked | None = None  # the last question, as long as its answer can be broken off
        self.timeline = Timeline()  # of the last exchange
        self.work: Answer | None = None  # the engine's part of it: what was computed, what was known

    @classmethod
    def load(
        cls, checkpoint_dir: str | Path, *, num_rows: int = 1, quantization: QuantizationConfig = FLOATS
    ) -> Session:
        """From a run or one of its checkpoints.

        Args:
          checkpoint_dir: the folder.
          num_rows: conversations that are answered at a time, see `beside`.
          quantization: what is int8 from then on.

        Raises:
          UserError: there is no checkpoint, or it is damaged; or int8 weights for a model with LoRA adapters.
        """
        return cls.of(
            load_params(checkpoint_dir, change=quantization.change), num_rows=num_rows, quantization=quantization
        )

    @classmethod
    def of(cls, loaded: LoadedModel, *, num_rows: int = 1, quantization: QuantizationConfig = FLOATS) -> Session:
        """From a checkpoint that is loaded, its weights already as `quantization` says; see `load`."""
        config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
        family = family_of(config.model)
        if family.in_context:
            raise UserError(
                f"{loaded.run_dir} is a {family.title}, which continues documents and holds no conversations; ask it "
                "by python -m vita_jax.chat"
            )
        tokenizer = load_tokenizer(loaded.run_dir / "tokenizer")
        paths = trained_so_far(config.stage(loaded.stage), config.stages, list(flatten(loaded.params)))
        trained = frozenset(path.split("/")[0] for path in paths)
        model = build_model(config)
        params = jax.tree.map(jnp.asarray, loaded.params)  # once, for engine, towers and voice
        engine = Engine(
            model, params, num_rows=num_rows, num_slots=_slots(config), cache_dtype=quantization.cache_dtype
        )
        return cls(model, params, config, tokenizer, trained=trained, engine=engine)

    @property
    def memory(self) -> str:
        """What weights and cache take, in words; see `describe_memory`."""
        engine = self.engine
        return describe_memory(self.params, engine.decoder, engine.num_rows, engine.num_slots, engine.cache_dtype)

    @property
    def context(self) -> ExampleContext:
        """How conversations become arrays."""
        return example_context(self.config, self.tokenizer)

    def has(self, component: str) -> bool:
        """Whether the model has a component, and it is not as it was drawn."""
        return component in self.params and (self.trained is None or component in self.trained)

    @cached_property
    def speakers(self) -> dict[str, Speaker]:
        """The model's own voice by language. Raises `UserError` if it does not speak, or its voice is unknown."""
        missing = [name for name in ("codec", "speech") if not self.has(name)]
        if missing:
            raise UserError(
                f"this model does not speak: it has no trained {' and '.join(missing)}; use one that was trained up to "
                "stage 3.2"
            )
        codes = voices(self.config, self.params)
        return {language: Speaker(self.config.model, self.params, voice) for language, voice in codes.items()}

    def speaker(self, language: str) -> Speaker:
        """The voice for a language, or the first there is if it has none of its own. Raises as `speakers`."""
        return self.speakers.get(language) or next(iter(self.speakers.values()))

    @property
    def ctc_vocabulary_file(self) -> Path | None:
        """The characters of the model's recogniser, in the data folder of its run or beside its weights; None for a
        model without a recogniser.
        """
        folders = (data_folder(self.config), place(self.config.run_dir))
        files = (folder / CTC_VOCABULARY for folder in folders if self.has("ctc_head"))
        return next((file for file in files if file.is_file()), None)

    def say(self, text: str, language: str) -> tuple[np.ndarray, int]:
        """A reply as sound: (n,) float32 samples in -1 .. 1, none if there is nothing to say; and Hz.

        Args:
          text: the reply, as it is written.
          language: "en" or "zh", in which it is said.

        Raises:
          UserError: an unknown language, or see `speakers`.
        """
        if self.external is not None:
            voice = self.external(language)
            samples = [sound.samples for sound in self.aloud([text], language)]
            return np.concatenate([np.zeros((0,), np.float32), *samples]), voice.sampling_rate
        speaker = self.speaker(language)
        return speaker.speak(text, self.tokenizer, language), speaker.sampling_rate

    def beside(self, **changes: Any) -> Session:
        """Another conversation with the same model, answered by the same engine.

        changes: attributes that are others there, such as `sampler` and `seed`.
        """
        other = dataclasses.replace(self, **{"turns": [], "media": [], "last_state": None, **changes})
        if "speakers" in self.__dict__:  # worked out once
            other.__dict__["speakers"] = self.speakers
        return other

    @cached_property
    def known(self) -> KnownMedia:
        """What has been seen and heard."""
        return KnownMedia(self.model, self.params, self.context)

    @cached_property
    def listener(self) -> Listener:
        """Hears what is spoken. Raises `UserError` if the model does not hear."""
        bank = self.config.audio.filter_bank
        return Listener(self.config.model, self.params, self.listening, dtype=self.model.dtype, filter_bank=bank)

    def reset(self) -> None:
        """Forgets the conversation."""
        self._seat.interrupt()
        self.turns, self.media, self.last_state, self._answered = [], [], None, None

    def close(self) -> None:
        """Ends the conversation and gives its place at the engine back."""
        self.reset()
        self._seat.leave()

    def ask(
        self,
        question: str,
        images: Sequence[File] = (),
        videos: Sequence[File] = (),
        audio: Sequence[File] = (),
    ) -> Iterator[str]:
        """Answers in pieces of text as they are produced, without the state symbol in front.

        The turn becomes part of the conversation when the answer has been read to its end; an answer that is broken off
        leaves no trace, unless `interrupt` says what was heard of it. Neither does sound that the model takes not to be
        meant for it: that has no answer.

        Args:
          question: plain text; the files are put in front of it. May be empty if there is sound, which then asks.
          images, videos, audio: paths of files that this question brings along, or what was in them; those of earlier
            turns are still there.

        Raises:
          UserError: at once, before any text: an empty question, a file that cannot be used, or a conversation that has
            become too long.
        """
        if not question.strip() and not audio:
            raise UserError("the question is empty; write what you want to know, or give a sound file that asks it")
        return self._begin(self._asked(question, images, videos, audio))

    def ask_aloud(self, images: Sequence[File] = (), videos: Sequence[File] = ()) -> SpokenQuestion:
        """A question that is about to be spoken; the files are those of `ask`. Raises as `ask`."""
        return SpokenQuestion(self, self._asked("", images, videos))

    def interrupt(self, heard: str = "") -> None:
        """Breaks the last answer off, while it is written or still being spoken. The conversation goes on from what was
        heard of it.

        Args:
          heard: the beginning of the answer that reached the user (`history.heard_text`); if nothing did, the question
            is forgotten as well.
        """
        self._seat.interrupt()
        asked, self._answered = self._answered, None
        if asked is None:
            return
        if asked.remembered:
            self.turns, self.media = self.turns[:-2], self.media[: len(self.media) - len(asked.media)]
        if heard.strip():
            symbol = asked.raw[: len(asked.raw) - len(asked.text)].lstrip()
            self._remember(asked, symbol + heard)

    def aloud(self, reply: Iterable[str], language: str) -> Iterator[Spoken]:
        """A reply as sound while it is being written.

        Args:
          reply: strings, such as `ask` gives.
          language: "en" or "zh", in which it is said.

        Raises:
          UserError: at once, see `speakers`.
        """
        if self.external is not None:
            return talk(reply, self.external(language), timeline=self.timeline)
        speaker = copy.copy(self.speaker(language))  # other conversations speak with it at the same time
        speaker.timeline = self.timeline
        return talk(reply, ModelVoice(speaker, self.tokenizer, language), timeline=self.timeline)

    def _asked(
        self,
        question: str,
        images: Sequence[File],
        videos: Sequence[File],
        audio: Sequence[File] = (),
    ) -> Asked:
        self._seat.interrupt()
        self._answered, self.timeline = None, Timeline()
        files = (("image", images), ("video", videos), ("audio", audio))
        media = [
            file if isinstance(file, Media) else media_from_file(file, kind) for kind, given in files for file in given
        ]
        turn = {"from": "human", "value": with_media(question, *(len(paths) for _, paths in files))}
        return Asked(turn, media)

    def _prompt(self, asked: Asked) -> Prompt:
        """The conversation up to the question. Raises `UserError` if it is too long."""
        prompt = self.known.prompt([*self.turns, asked.turn], [*self.media, *asked.media])
        if len(prompt) >= self.engine.num_slots:
            raise UserError(
                f"the conversation has {len(prompt)} positions, the model has room for {self.engine.num_slots}; start "
                "a new one"
            )
        return prompt

    def _begin(self, asked: Asked) -> Iterator[str]:
        return self._answer(asked, self._prompt(asked))  # what is wrong with the question is said before it is asked

    def _answer(self, asked: Asked, prompt: Prompt) -> Iterator[str]:
        context = self.context
        self.last_state, self._answered = None, asked
        decoder, symbol_done = TextStream(self.tokenizer), False
        options = AnswerOptions(
            self.max_new_tokens,
            stop_ids(self.tokenizer, context.template),
            self.sampler,
            self.penalties,
            self.seed + len(self.turns),
        )
        tokens = self.work = self._seat.answer(prompt, options)
        try:
            # The model's table may have more rows than the tokenizer has entries; those spell nothing.
            spelt = (token for token in self._marked(tokens) if token < self.tokenizer.vocab_size)
            for text in until(self._pieces(spelt, decoder), stop_text(self.tokenizer, context.template)):
                if self._answered is not asked:  # interrupted, or something else was asked
                    return
                asked.raw += text
                if not symbol_done and asked.raw.strip():
                    # The symbol is one character, so the first one decides.
                    self.last_state, text = split_state_symbol(asked.raw.lstrip(), context.template)
                    symbol_done = True
                    if self.last_state == "noise" and any(item.kind == "audio" for item in asked.media):
                        self._answered = None
                        return
                if text and symbol_done:
                    asked.text += text
                    yield text
            if self._answered is asked:
                self._remember(asked, asked.raw.lstrip())
        finally:
            if tokens is self._seat.work:
                self._seat.interrupt()

    def _remember(self, asked: Asked, answer: str) -> None:
        self.turns = [*self.turns, asked.turn, {"from": "gpt", "value": answer}]
        self.media = [*self.media, *asked.media]
        asked.remembered = True

    def _marked(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.timeline.mark(FIRST_TOKEN)
            yield token

    @staticmethod
    def _pieces(tokens: Iterator[int], decoder: TextStream) -> Iterator[str]:
        for token in tokens:
            yield decoder.push(token)
        yield decoder.flush()


def _slots(config: ExperimentConfig) -> int:
    return min(config.model.language.max_positions, MAX_SLOTS)


@dataclasses.dataclass(eq=False)
class Asked:
    """A question and its files.

    Attributes:
      turn, media: as in `Session`.
      raw, text: what has been answered so far, with and without the state symbol.
      remembered: whether it is part of the conversation.
    """

    turn: dict[str, str]
    media: list[Media]
    raw: str = ""
    text: str = ""
    remembered: bool = False


class SpokenQuestion:
    """A question while it is spoken: what has been heard is encoded and put before the language model at once, so that
    little is left to do when it ends. One at a time per session.
    """

    def __init__(self, session: Session, asked: Asked) -> None:
        self._session, self._asked = session, asked
        session.listener.begin()
        session.listener.timeline = session.timeline
        self._sound = session.known.begin_sound()
        asked.media.append(self._sound)
        images, videos = (sum(item.kind == kind for item in asked.media) for kind in ("image", "video"))
        asked.turn["value"] = with_media("", images, videos, 1)
        self._tokens: list[np.ndarray] = []
        self._prepare()

    def hear(self, block: np.ndarray) -> int:
        """One more block of sound, (n,) float32 samples at 16 kHz in -1 .. 1, any n.

        Returns:
          How many tokens the sound has so far; 0 until its end where it is not heard in chunks.

        Raises:
          UserError: the conversation has become too long.
        """
        self._add(self._session.listener.hear(block))
        return sum(len(tokens) for tokens in self._tokens)

    def end(self) -> Iterator[str]:
        """The question is over: its answer, as `Session.ask` gives it.

        Raises:
          UserError: at once: too little sound to be heard, or the conversation has become too long.
        """
        self._add(self._session.listener.end(), feed=False)
        if not self._tokens:
            raise UserError("the sound is too short to be heard; at least 0.1 s are needed")
        return self._session._begin(self._asked)

    def _add(self, tokens: np.ndarray, feed: bool = True) -> None:
        if len(tokens):
            self._tokens.append(tokens)
            self._session.known.grow_sound(self._sound, np.concatenate(self._tokens))
            if feed:
                self._prepare()

    def _prepare(self) -> None:
        """Feeds the conversation up to what has been heard."""
        prompt = self._session._prompt(self._asked)
        name, heard = self._session.known.sound_name(self._sound), sum(len(tokens) for tokens in self._tokens)
        start = next(i for i, key in enumerate(prompt.keys) if not isinstance(key, int) and key[0] == name)
        if start + heard:
            self._session._seat.feed(prompt.cut(start + heard))
