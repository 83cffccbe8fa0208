"""Questions to a Flamingo: each is a chunk of a document with the pictures that it brings along, and what was asked and
answered before stays in front of it, as demonstrations do. It neither hears nor speaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vita_jax.data.document_examples import DocumentContext, encode_tagged, media_frames, picture_times
from vita_jax.data.examples import ExampleContext, media_from_file
from vita_jax.data.flamingo_prompts import question_prompt
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.records import Media
from vita_jax.data.tokenizer import Tokenizer, load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.generate import LENGTH_BUCKETS, Params, bucket
from vita_jax.inference.generate_flamingo import generate_flamingo
from vita_jax.inference.talk import talk
from vita_jax.models.flamingo import Flamingo, FlamingoInputs
from vita_jax.training.checkpoint import LoadedModel
from vita_jax.training.experiment import ExperimentConfig, build_model, clip_frames, example_context


@dataclasses.dataclass
class FlamingoSession:
    """A Flamingo and the document so far; has what `chat` asks of a `Session`.

    Attributes:
      model, params, config, tokenizer: the loaded model.
      text: the document, with a tag for each of `media`.
      max_new_tokens: the longest answer.
      last_state, external, ctc_vocabulary_file: of models that hear and speak; None.
    """

    model: Flamingo
    params: Params
    config: ExperimentConfig
    tokenizer: Tokenizer
    text: str = ""
    media: list[Media] = dataclasses.field(default_factory=list)
    max_new_tokens: int = 64
    last_state: None = None
    external: Callable[[str], Any] | None = None
    ctc_vocabulary_file: None = None

    @classmethod
    def of(cls, loaded: LoadedModel) -> FlamingoSession:
        """From a checkpoint that is loaded."""
        config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
        return cls(build_model(config), loaded.params, config, load_tokenizer(loaded.run_dir / "tokenizer"))

    @property
    def context(self) -> ExampleContext:
        """How a file is looked at before it is asked about."""
        return example_context(self.config, self.tokenizer)

    def has(self, component: str) -> bool:
        """Whether the model has a component."""
        return component in self.params

    def speaker(self, language: str) -> Any:
        """Raises UserError: there is no voice."""
        raise UserError("a Flamingo does not speak; leave --speak out, or give it a voice by --voice espeak")

    def say(self, text: str, language: str) -> tuple[np.ndarray, int]:
        """A reply as sound by what speaks instead. Raises UserError if nothing does."""
        if self.external is None:
            self.speaker(language)
        voice = self.external(language)
        sounds = [sound.samples for sound in talk([text], voice)]
        return np.concatenate([np.zeros((0,), np.float32), *sounds]), voice.sampling_rate

    def reset(self) -> None:
        """Forgets the document."""
        self.text, self.media = "", []

    def ask(
        self, question: str, images: Sequence[str] = (), videos: Sequence[str] = (), audio: Sequence[str] = ()
    ) -> Iterator[str]:
        """Answers, as a whole; question and answer then belong to the document.

        Args:
          question: plain text.
          images, videos: paths of files that it brings along; without any it is about the last picture.

        Raises:
          UserError: at once, before any text: an empty question, sound, a file that cannot be used, pictures beside
            clips, or a document that has become too long.
        """
        if audio:
            raise UserError("this model does not hear; write the question")
        if not question.strip():
            raise UserError("the question is empty; write what you want to know")
        given = [
            media_from_file(path, kind) for kind, paths in (("image", images), ("video", videos)) for path in paths
        ]
        plain = question.replace(IMAGE, "").replace(END_OF_CHUNK, "").strip()  # typed tags have no pictures
        prompt = question_prompt(plain).removeprefix(IMAGE)
        # Text sees the last picture before it; those of one question stand each in a chunk of its own.
        text = f"{self.text}{END_OF_CHUNK.join([IMAGE] * len(given))}{prompt}"
        inputs = self._inputs(text, [*self.media, *given])
        return self._answer(text, given, inputs)

    def _inputs(self, text: str, media: Sequence[Media]) -> FlamingoInputs:
        context = DocumentContext(self.tokenizer, self.config.image)
        kinds = {item.kind for item in media}
        if len(kinds) > 1:
            raise UserError("a document has pictures or clips, not both; /reset begins a new one")
        frames = clip_frames(self.config) if kinds == {"video"} else 1
        ids = np.asarray(encode_tagged(text, context), np.int32)
        room = self.config.model.language.max_positions - self.max_new_tokens
        if len(ids) > room:
            raise UserError(
                f"the document has {len(ids)} tokens, the model has room for {room}; begin a new one (/reset)"
            )
        times = picture_times(ids == context.tag, next_picture=False)
        side = context.image.image_size
        images = np.zeros((1, len(media), frames, side, side, 3), np.uint8)
        for place, item in enumerate(media):
            images[0, place] = media_frames(item, context.image, frames)
        padding = ((0, 0), (0, bucket(len(ids), LENGTH_BUCKETS) - len(ids)))
        positions = np.arange(len(ids), dtype=np.int32)
        rows = (np.pad(row[None], padding) for row in (ids, positions, np.ones_like(ids), times))
        return FlamingoInputs(*rows, images)

    def _answer(self, text: str, given: Sequence[Media], inputs: FlamingoInputs) -> Iterator[str]:
        end = self.tokenizer.special_tokens[END_OF_CHUNK]
        generated = generate_flamingo(
            self.model,
            self.params,
            inputs,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=(end, self.tokenizer.eos_id),
            pad_token=self.tokenizer.pad_id,
        )
        tokens, lengths = jax.device_get((generated.tokens, generated.lengths))
        # The model's table may have more rows than the tokenizer has entries; those spell nothing.
        ids = [i for i in tokens[0, : lengths[0]].tolist() if i < self.tokenizer.vocab_size]
        answer = self.tokenizer.decode(ids, skip_special=True)
        self.text, self.media = f"{text}{answer}{END_OF_CHUNK}", [*self.media, *given]
        yield answer
