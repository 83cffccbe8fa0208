"""A conversation with a trained model: load a checkpoint once, then ask about pictures, videos or nothing but text, in
writing or aloud.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.examples import Example, ExampleContext, media_from_file, prompt_example
from vita_jax.data.prompts import split_state_symbol, stop_ids, with_media
from vita_jax.data.records import Media
from vita_jax.data.tokenizer import TextStream, Tokenizer, load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.generate import Params, stream
from vita_jax.inference.speak import Speaker, voices
from vita_jax.models.vita import Vita, VitaInputs
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import (
    CTC_VOCABULARY,
    ExperimentConfig,
    build_model,
    data_folder,
    example_context,
)
from vita_jax.training.stages import flatten, trained_so_far


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
    """

    model: Vita
    params: Params
    config: ExperimentConfig
    tokenizer: Tokenizer
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)
    media: list[Media] = dataclasses.field(default_factory=list)
    max_new_tokens: int = 256
    trained: frozenset[str] | None = None
    last_state: str | None = None

    @classmethod
    def load(cls, checkpoint_dir: str | Path) -> Session:
        """From a run or one of its checkpoints. Raises `UserError` if there is none, or it is damaged."""
        loaded = load_params(checkpoint_dir)
        tokenizer = load_tokenizer(loaded.run_dir / "tokenizer")
        config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
        paths = trained_so_far(config.stage(loaded.stage), config.stages, list(flatten(loaded.params)))
        trained = frozenset(path.split("/")[0] for path in paths)
        return cls(build_model(config), loaded.params, config, tokenizer, trained=trained)

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
        places = (data_folder(self.config), Path(self.config.run_dir))
        files = (place / CTC_VOCABULARY for place in places if self.has("ctc_head"))
        return next((file for file in files if file.is_file()), None)

    def say(self, text: str, language: str) -> tuple[np.ndarray, int]:
        """A reply in the model's own voice: (n,) float32 samples in -1 .. 1, none if there is nothing to say; and Hz.

        Args:
          text: the reply, as it is written.
          language: "en" or "zh", in which it is written out in words.

        Raises:
          UserError: an unknown language, or see `speakers`.
        """
        speaker = self.speaker(language)
        return speaker.speak(text, self.tokenizer, language), speaker.sampling_rate

    def reset(self) -> None:
        """Forgets the conversation."""
        self.turns, self.media, self.last_state = [], [], None

    def ask(
        self,
        question: str,
        images: Sequence[str | Path] = (),
        videos: Sequence[str | Path] = (),
        audio: Sequence[str | Path] = (),
    ) -> Iterator[str]:
        """Answers in pieces of text as they are produced, without the state symbol in front.

        The turn becomes part of the conversation when the answer has been read to its end; an answer that is broken off
        leaves no trace. Neither does sound that the model takes not to be meant for it: that has no answer.

        Args:
          question: plain text; the files are put in front of it. May be empty if there is sound, which then asks.
          images, videos, audio: files that this question brings along; those of earlier turns are still there.

        Raises:
          UserError: at once, before any text: an empty question, a file that cannot be used, or a conversation that has
            become too long.
        """
        if not question.strip() and not audio:
            raise UserError("the question is empty; write what you want to know, or give a sound file that asks it")
        files = (("image", images), ("video", videos), ("audio", audio))
        media = [media_from_file(path, kind) for kind, paths in files for path in paths]
        asked = {"from": "human", "value": with_media(question, *(len(paths) for _, paths in files))}
        example = prompt_example([*self.turns, asked], [*self.media, *media], self.context)
        room = self.config.model.language.max_positions - len(example["tokens"])
        if room < 1:
            raise UserError(
                f"the conversation has {len(example['tokens'])} positions, the model has room for "
                f"{self.config.model.language.max_positions}; start a new one"
            )
        return self._answer(asked, media, example, min(room, self.max_new_tokens))

    def _answer(
        self, asked: dict[str, str], media: Sequence[Media], example: Example, max_new_tokens: int
    ) -> Iterator[str]:
        context = self.context
        self.last_state = None
        stops = stop_ids(self.tokenizer, context.template)
        decoder, raw, symbol_done = TextStream(self.tokenizer), "", False
        tokens = stream(self.model, self.params, one_row(example), max_new_tokens=max_new_tokens, stop_tokens=stops)
        # The model's table may have more rows than the tokenizer has entries; those spell nothing.
        spelt = (token for token in tokens if token < self.tokenizer.vocab_size)
        for text in self._pieces(spelt, decoder):
            raw += text
            if not symbol_done and raw.strip():
                # The symbol is one token, so the first text decides.
                self.last_state, text = split_state_symbol(raw.lstrip(), context.template)
                symbol_done = True
                if self.last_state == "noise" and any(item.kind == "audio" for item in media):
                    return
            if text and symbol_done:
                yield text
        self.turns += [asked, {"from": "gpt", "value": raw.lstrip()}]
        self.media += media

    @staticmethod
    def _pieces(tokens: Iterator[int], decoder: TextStream) -> Iterator[str]:
        for token in tokens:
            yield decoder.push(token)
        yield decoder.flush()


def one_row(example: Example) -> VitaInputs:
    """A batch of one: (1 s) arrays and tiles (1 t S S 3)."""
    names = [field.name for field in dataclasses.fields(VitaInputs) if field.name in example]
    arrays: dict[str, Any] = {name: example[name][None] for name in names}
    return VitaInputs(**arrays)
