"""LLaVA's conversations for a Flamingo: the same text, labels and order, with a picture's tag for its visual tokens.

A row of a LLaVA whose pictures are one token has one position where a picture stands. There the tag goes, and from it
on the text sees the picture. Axes: b rows, s positions, t pictures, S side of a picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vita_jax.data.examples import Example, ExampleContext, media_from_file, prompt_example
from vita_jax.data.loader import Loader, RecordCounts
from vita_jax.data.prompts import stop_ids
from vita_jax.data.splice import TEXT_INDEX
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.evaluation.items import Item
from vita_jax.inference.generate import LENGTH_BUCKETS, Params, bucket
from vita_jax.inference.generate_flamingo import generate_flamingo
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.flamingo import Flamingo, FlamingoInputs
from vita_jax.training import loop
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder
from vita_jax.training.stages import Stage


def one_position(config: ExperimentConfig) -> ExperimentConfig:
    """The run of a LLaVA that gives every picture one position; it is only read by, and its rows are as long as they
    are.
    """
    resampler = ResamplerConfig(config.model.vision.hidden_size, num_latents=1)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, resampler=resampler))


def as_flamingo(batch: Mapping[str, np.ndarray], tag: int) -> dict[str, np.ndarray]:
    """The fields of `FlamingoInputs` of LLaVA's rows.

    Args:
      batch: tokens, positions, segment_ids, feature_index (b s), tiles (b t S S 3); one conversation to a row, with one
        position for each of its pictures.
      tag: id of what stands for a picture.
    """
    is_tag = batch["feature_index"] >= 0
    times = np.where(batch["segment_ids"] > 0, np.cumsum(is_tag, axis=1), 0)
    return {
        "tokens": np.where(is_tag, tag, batch["tokens"]).astype(np.int32),
        "positions": batch["positions"],
        "segment_ids": batch["segment_ids"],
        "media_times": times.astype(np.int32),
        "images": batch["tiles"][:, :, None],
    }


# ---- training -------------------------------------------------------------------------------------------------------


class ConversationBatches:
    """Batches of one data set of the objective `flamingo`, made of LLaVA's; states are those of the loader."""

    def __init__(self, loader: Loader, name: str, tag: int) -> None:
        self._loader, self._name, self._tag = loader, name, tag

    @property
    def counts(self) -> RecordCounts:
        """How many records were read, and how many of them were bad."""
        return self._loader.counts

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._loader)
        fields = {**as_flamingo(batch, self._tag), "labels": batch["labels"]}
        return {f"{self._name}/{field}": array for field, array in fields.items()}

    def get_state(self) -> dict[str, Any]:
        """Of the last batch that was handed out."""
        return self._loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that the state belongs to."""
        self._loader.set_state(state)

    def close(self) -> None:
        """Ends threads and workers."""
        self._loader.close()


def conversation_batches(written: ExperimentConfig, stage: Stage, tag: int) -> ConversationBatches:
    """What a stage of a Flamingo trains on.

    Args:
      written: the run of a LLaVA with one position for each picture and one stage, whose records these are.
      stage: of the Flamingo; has one data set.
    """
    loader = loop.record_batches(written, written.stages[0], tokenizer=load_tokenizer(tokenizer_folder(written)))
    return ConversationBatches(loader, stage.sets[0].name, tag)


# ---- answering ------------------------------------------------------------------------------------------------------


def flamingo_answers(
    model: Flamingo,
    params: Params,
    context: ExampleContext,
    items: Sequence[Item],
    root: Path,
    tag: int,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers in the order of `items`, as `evaluation.answering.answer_items` gives them.

    Args:
      context: of a LLaVA with one position for each picture.
      items: each with one picture or none.
      root: the folder that their paths start from.
    """
    examples = [
        prompt_example(item.question, [media_from_file(root / path, kind) for kind, path in item.media], context)
        for item in items
    ]
    length = bucket(max(len(example["tokens"]) for example in examples), LENGTH_BUCKETS)
    answers, tokenizer = [], context.tokenizer
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        generated = generate_flamingo(
            model,
            params,
            prompt_inputs(batch, batch_size, length, tag),
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_ids(tokenizer, context.template),
            pad_token=tokenizer.pad_id,
        )
        tokens, lengths = jax.device_get((generated.tokens, generated.lengths))
        for row in range(len(batch)):
            # Rows of the table beyond the tokenizer's entries, the tag among them, spell nothing.
            ids = [i for i in tokens[row, : lengths[row]].tolist() if i < tokenizer.vocab_size]
            answers.append(tokenizer.decode(ids))
    return answers


def prompt_inputs(examples: Sequence[Example], batch_size: int, length: int, tag: int) -> FlamingoInputs:
    """(batch_size length) prompts with a picture each, black where the prompt has none; rows beyond them are empty."""
    fill = {"tokens": 0, "positions": 0, "segment_ids": 0, "feature_index": TEXT_INDEX}
    rows = {name: np.full((batch_size, length), value, np.int32) for name, value in fill.items()}
    tiles = np.zeros((batch_size, 1, *examples[0]["tiles"].shape[1:]), np.uint8)
    for row, example in enumerate(examples):
        for name, array in rows.items():
            array[row, : len(example[name])] = example[name]
        tiles[row, : len(example["tiles"])] = example["tiles"]
    return FlamingoInputs(**as_flamingo({**rows, "tiles": tiles}, tag))
