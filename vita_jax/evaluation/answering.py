"""Asks a model every question of a benchmark: batches of questions and the answers to them.

Every file is decoded once and goes through its tower once, however many questions there are about it; the questions
then read its features as `extra_features`. Batches are padded to one length per number of tile slots and tokens of
sound, so only a handful of programs is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vita_jax.data.audio import pad_clips
from vita_jax.data.examples import (
    Example,
    ExampleContext,
    TileTable,
    join_tables,
    media_from_file,
    prompt_example,
    tile_table,
)
from vita_jax.data.prompts import stop_ids, stop_text
from vita_jax.data.tokenizer import until
from vita_jax.inference.generate import LENGTH_BUCKETS, TILE_BUCKETS, Params, bucket, generate
from vita_jax.inference.sampling import GREEDY, Sampler
from vita_jax.models.vita import VitaInputs
from vita_jax.parallel.mesh import batch_sharding, num_batch_shards
from vita_jax.parallel.rules import use_mesh
from vita_jax.training.families import Model

Progress = Callable[[int, int], None]

# Tiles that go through the tower at a time.
TILES_AT_ONCE = 32
# Sounds that go through the audio tower at a time, and the multiple of frames they are padded to.
CLIPS_AT_ONCE, CLIP_FRAMES = 8, 128
# Round numbers of tokens of sound in a question.
SOUND_BUCKETS = (0, 16, 32, 64, 128, 256)


class Asked(Protocol):
    """What can be asked: an item of a benchmark, or a user's question.

    Attributes:
      question: a text, or turns that end with the user's, see `prompt_example`.
      media: (kind, path) of the files that come with it, pictures and videos before sounds.
    """

    @property
    def question(self) -> str | Sequence[Mapping[str, str]]: ...

    @property
    def media(self) -> tuple[tuple[str, str], ...]: ...


@dataclasses.dataclass(frozen=True)
class _Question:
    """An item ready to be asked; `index`: its place in the caller's list, `files`: what it is about.

    `sound` is the number of tokens of sound.
    """

    index: int
    example: Example
    files: tuple[tuple[str, str], ...]
    sound: int


def question_batches(
    model: Model,
    params: Params,
    context: ExampleContext,
    items: Sequence[Asked],
    root: str | Path,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Iterator[tuple[list[int], VitaInputs]]:
    """The questions as batches for the model, all features computed.

    Args:
      root: the folder that the items' media paths start from.
      batch_size: rows of every batch.
      mesh: devices that the rows are spread over; they divide into its parts. It must be the current one.

    Yields:
      Places in `items` of a batch's first rows, and its inputs (batch_size s); the rows beyond are empty.

    Raises:
      UserError: a file is missing or damaged.
    """
    files = dict.fromkeys(file for item in items for file in item.media)
    tables = {file: tile_table([media_from_file(Path(root) / file[1], file[0])], context) for file in files}
    groups: dict[tuple[int, int], list[_Question]] = {}
    for index, item in enumerate(items):
        question = _question(index, item, tables, root, context)
        slots = bucket(len(question.example["tiles"]), TILE_BUCKETS)
        groups.setdefault((slots, bucket(question.sound, SOUND_BUCKETS)), []).append(question)
    for (slots, sound), questions in sorted(groups.items()):
        # Questions about one file next to each other: they share a batch, and its features.
        questions.sort(key=lambda question: (question.files, question.index))
        num_features = slots * context.layout.features_per_slot + sound
        length = bucket(max(len(question.example["tokens"]) for question in questions), LENGTH_BUCKETS)
        features: dict[tuple[str, str], np.ndarray] = {}
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            features = _batch_features(model, params, batch, tables, features, mesh)
            inputs = _batch_inputs(batch, features, num_features, length, batch_size)
            yield [question.index for question in batch], spread(inputs, mesh)


def spread(rows: VitaInputs | np.ndarray, mesh: Mesh | None) -> VitaInputs | np.ndarray:
    """Arrays (b ...) over the devices of the mesh; rows that do not divide into its parts stay as they are."""
    if mesh is None or jax.tree.leaves(rows)[0].shape[0] % num_batch_shards(mesh):
        return rows
    return jax.device_put(rows, batch_sharding(mesh))


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Makes a mesh the current one, where there is one."""
    return nullcontext() if mesh is None else use_mesh(mesh)


def answer_items(
    model: Model,
    params: Params,
    context: ExampleContext,
    items: Sequence[Asked],
    root: str | Path,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
    cache_dtype: jnp.dtype | None = None,
    sampler: Sampler = GREEDY,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> list[str]:
    """The model's answers, in the order of `items`; a state symbol is still in front.

    Args:
      root: the folder that the items' media paths start from.
      batch_size: questions per call.
      max_new_tokens: the longest answer.
      progress: called with (answered, total) after every batch.
      cache_dtype: of keys and values, see `generate`.
      sampler, key: how tokens are chosen; `key` is needed unless that is greedily.
      mesh: see `question_batches`.

    Raises:
      UserError: a file is missing or damaged.
    """
    answers = [""] * len(items)
    answered, end = 0, stop_text(context.tokenizer, context.template)
    for indices, inputs in question_batches(model, params, context, items, root, batch_size, mesh):
        generated = generate(
            model,
            params,
            inputs,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_ids(context.tokenizer, context.template),
            sampler=sampler,
            key=None if key is None else jax.random.fold_in(key, answered),
            pad_token=context.tokenizer.pad_id,
            cache_dtype=cache_dtype,
        )
        tokens, lengths = jax.device_get((generated.tokens, generated.lengths))
        for row, index in enumerate(indices):
            # A model's table may have more rows than its tokenizer has entries; those spell nothing.
            ids = [i for i in tokens[row, : lengths[row]].tolist() if i < context.tokenizer.vocab_size]
            answers[index] = "".join(until([context.tokenizer.decode(ids)], end))
        answered += len(indices)
        if progress is not None:
            progress(answered, len(items))
    return answers


def _question(
    index: int,
    item: Asked,
    tables: Mapping[tuple[str, str], TileTable],
    root: str | Path,
    context: ExampleContext,
) -> _Question:
    media = [media_from_file(Path(root) / path, kind) for kind, path in item.media]
    table = join_tables([tables[file] for file in item.media], context)
    sound = sum(clip.num_tokens for clip in table.clips)
    return _Question(index, prompt_example(item.question, media, context, table=table), item.media, sound)


@partial(jax.jit, static_argnames="model")
def _encode_tiles(model: Model, params: Params, tiles: jax.Array) -> jax.Array:
    """tiles: (n S S 3) -> (n k d), each tile's part of the feature table."""
    return model.apply({"params": params}, tiles[:, None], method="encode_tiles")


@partial(jax.jit, static_argnames="model")
def _encode_clips(model: Model, params: Params, features: jax.Array, lengths: jax.Array) -> jax.Array:
    """features (n f m), lengths (n,) -> (n p d), each clip's part of the feature table."""
    return model.apply({"params": params}, features[:, None], lengths[:, None], method="encode_audio")


def _batch_features(
    model: Model,
    params: Params,
    batch: Sequence[_Question],
    tables: Mapping[tuple[str, str], TileTable],
    known: Mapping[tuple[str, str], np.ndarray],
    mesh: Mesh | None,
) -> dict[tuple[str, str], np.ndarray]:
    """(t*k d), or (tokens d) of a sound, of every file of the batch; those of `known` are not computed again."""
    files = list(dict.fromkeys(file for question in batch for file in question.files))
    features = {file: known[file] for file in files if file in known}
    features |= _clip_features(model, params, [f for f in files if f not in known and f[0] == "audio"], tables)
    new = [file for file in files if file not in known and file[0] != "audio"]
    if not new:
        return features
    tiles = np.concatenate([tables[file].tiles for file in new])
    padded = np.pad(tiles, ((0, -len(tiles) % TILES_AT_ONCE), (0, 0), (0, 0), (0, 0)))
    chunks = np.split(padded, len(padded) // TILES_AT_ONCE)
    encoded = np.concatenate([jax.device_get(_encode_tiles(model, params, spread(chunk, mesh))) for chunk in chunks])
    start = 0
    for file in new:
        count = len(tables[file].tiles)
        features[file] = encoded[start : start + count].reshape(-1, encoded.shape[-1])
        start += count
    return features


def _clip_features(
    model: Model, params: Params, files: Sequence[tuple[str, str]], tables: Mapping[tuple[str, str], TileTable]
) -> dict[tuple[str, str], np.ndarray]:
    """(tokens d) of every sound; those of similar length go through the tower together."""
    features: dict[tuple[str, str], np.ndarray] = {}
    waiting = sorted(files, key=lambda file: len(tables[file].clips[0].features))
    for start in range(0, len(waiting), CLIPS_AT_ONCE):
        part = waiting[start : start + CLIPS_AT_ONCE]
        clips = [tables[file].clips[0] for file in part]
        frames = -(-len(clips[-1].features) // CLIP_FRAMES) * CLIP_FRAMES
        lengths = np.zeros(CLIPS_AT_ONCE, np.int32)
        lengths[: len(clips)] = [len(clip.features) for clip in clips]
        padded = pad_clips([clip.features for clip in clips], frames, clips[0].features.shape[1])
        padded = np.pad(padded, ((0, CLIPS_AT_ONCE - len(clips)), (0, 0), (0, 0)))
        encoded = jax.device_get(_encode_clips(model, params, padded, lengths))
        features |= {f: row[: clip.num_tokens] for f, row, clip in zip(part, encoded, clips, strict=False)}
    return features


def _batch_inputs(
    batch: Sequence[_Question],
    features: Mapping[tuple[str, str], np.ndarray],
    num_features: int,
    length: int,
    batch_size: int,
) -> VitaInputs:
    """(batch_size length) arrays and (batch_size num_features d) features; rows beyond the questions are empty."""

    def rows(name: str, fill: int) -> np.ndarray:
        out = np.full((batch_size, length), fill, np.int32)
        for row, question in enumerate(batch):
            values = question.example[name]
            out[row, : len(values)] = values
        return out

    extra = None
    if num_features:
        first = next(iter(features.values()))
        extra = np.zeros((batch_size, num_features, first.shape[-1]), first.dtype)
        for row, question in enumerate(batch):
            if question.files:
                table = np.concatenate([features[file] for file in question.files])
                extra[row, : len(table)] = table
    tiles = batch[0].example["tiles"]
    return VitaInputs(
        tokens=rows("tokens", 0),
        positions=rows("positions", 0),
        segment_ids=rows("segment_ids", 0),
        feature_index=rows("feature_index", -1),
        tiles=np.zeros((batch_size, 0, *tiles.shape[1:]), tiles.dtype),
        extra_features=extra,
    )
