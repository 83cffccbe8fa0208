"""Prompts as the engine takes them, and how much of one a row of the cache holds already.

Every position has a key that says what is there: the id of a token, or for a position of a picture or a sound which one
and which part of it. Keys and values of a position depend on nothing but the positions up to it, so two prompts share
the cache exactly as far as their keys agree, whatever turn, session or history they come from. What was not heard of
an answer, a system text that changed, a picture that was moved: all of it is found by comparing keys.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vita_jax.data.examples import Example, ExampleContext
from vita_jax.inference.generate import bucket
from vita_jax.inference.rows import Block

# Lengths of blocks (positions); what is longer is fed in several.
BLOCK_LENGTHS = (8, 16, 32, 64, 128, 256, 512)

LIVE = "live"  # kind of sounds that are still being spoken
_LIVE_NUMBERS = itertools.count(1)

MediaId = tuple[str, str]  # kind and digest, or kind and the number of a stream
Key = int | tuple[MediaId, int]  # a token, or position i of a medium


@dataclass(frozen=True)
class Prompt:
    """What a row is to hold.

    Attributes:
      keys: of the s positions.
      positions: (s,) int32 rotary positions.
      features: for every medium of `keys`, (n d) vectors of its positions; there may be more.
    """

    keys: tuple[Key, ...]
    positions: np.ndarray
    features: Mapping[MediaId, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def cut(self, length: int) -> Prompt:
        """The first positions."""
        return Prompt(self.keys[:length], self.positions[:length], self.features)


def text_prompt(ids: Sequence[int]) -> Prompt:
    """A prompt of nothing but tokens."""
    return Prompt(tuple(int(i) for i in ids), np.arange(len(ids), dtype=np.int32))


def media_id(kind: str, content: np.ndarray) -> MediaId:
    """Names a tile or a clip by what it holds."""
    return kind, hashlib.sha1(np.ascontiguousarray(content).tobytes()).hexdigest()


def live_id() -> MediaId:
    """Names a sound that is still being spoken: another one each time, since what it holds is not known yet."""
    return LIVE, str(next(_LIVE_NUMBERS))


def example_prompt(
    example: Example,
    context: ExampleContext,
    features: Mapping[MediaId, np.ndarray],
    tiles: Sequence[MediaId],
    clips: Sequence[MediaId],
) -> Prompt:
    """The prompt of one conversation (`data/examples.py`).

    Args:
      example: a prompt of one segment.
      context: it was made with.
      features: of the media.
      tiles, clips: their names, in order; of a clip that is still being spoken its stream's.
    """
    per_tile = context.layout.features_per_slot
    clips_from = context.layout.extra_start(len(example["tiles"]))
    per_clip = context.audio.num_tokens(example["audio"].shape[1]) if clips else 1

    def key(token: int, index: int) -> Key:
        if index < 0:
            return token
        if index < clips_from:
            return tiles[index // per_tile], index % per_tile
        return clips[(index - clips_from) // per_clip], (index - clips_from) % per_clip

    pairs = zip(example["tokens"].tolist(), example["feature_index"].tolist(), strict=True)
    return Prompt(tuple(key(token, index) for token, index in pairs), example["positions"], features)


def common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many positions two begin with alike."""
    both = min(len(first), len(second))
    for i in range(both):
        if first[i] != second[i]:
            return i
    return both


def blocks(prompt: Prompt, start: int, width: int, dtype: np.dtype, room: int) -> list[tuple[int, Block]]:
    """The positions from `start` on, in as few blocks as possible.

    Args:
      prompt: what the row is to hold.
      start: positions that it holds already.
      width: d.
      dtype: of features.
      room: positions of a row, the longest block there can be.

    Returns:
      For every block how many positions are before it, and the block.
    """
    made = []
    while start < len(prompt):
        stop = min(start + BLOCK_LENGTHS[-1], len(prompt))
        size = min(bucket(stop - start, BLOCK_LENGTHS), room)
        made.append((start, _block(prompt, start, stop, size, width, dtype)))
        start = stop
    return made


def _block(prompt: Prompt, start: int, stop: int, size: int, width: int, dtype: np.dtype) -> Block:
    tokens, positions, real = (np.zeros((1, size), np.int32) for _ in range(3))
    features, is_feature = np.zeros((1, size, width), dtype), np.zeros((1, size), bool)
    positions[0, : stop - start] = prompt.positions[start:stop]
    real[0, : stop - start] = 1
    for i, key in enumerate(prompt.keys[start:stop]):
        if isinstance(key, int):
            tokens[0, i] = key
            continue
        name, part = key
        features[0, i], is_feature[0, i] = prompt.features[name][part], True
    return Block(tokens, positions, real, features, is_feature)
