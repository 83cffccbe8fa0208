"""A conversation with a trained model: load a checkpoint once, then ask about pictures, videos or nothing but text, in
writing or aloud.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vita_jax.data.examples import Example, ExampleContext, media_from_file, prompt_example
from vita_jax.data.prompts import split_state_symbol, stop_ids, with_media
from vita_jax.data.records import Media
from vita_jax.data.tokenizer import TextStream, Tokenizer, load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.generate import Params, stream
from vita_jax.models.vita import Vita, VitaInputs
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import ExperimentConfig, build_model, example_context


@dataclasses.dataclass
class Session:
    """A model and what has been said so far.

    Attributes:
      model, params, config, tokenizer: the loaded model.
      turns: questions and answers in order; answers as generated, state symbol included.
      media: the files of all questions, in order.
      max_new_tokens: the longest answer.
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
    last_state: str | None = None

    @classmethod
    def load(cls, checkpoint_dir: str | Path) -> Session:
        """From a run or one of its checkpoints. Raises `UserError` if there is none, or it is damaged."""
        loaded = load_params(checkpoint_dir)
        tokenizer = load_tokenizer(loaded.run_dir / "tokenizer")
        return cls(build_model(loaded.config), loaded.params, loaded.config, tokenizer)

    @property
    def context(self) -> ExampleContext:
        """How conversations become arrays."""
        return example_context(self.config, self.tokenizer)

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
                # The symbol is one character, so the first one decides.
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
