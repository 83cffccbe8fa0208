"""The original's offline packing: consecutive samples joined into one conversation (`concat_data_patch.py`).

Joined rounds share a system prompt and attend to each other; `packing.py` packs without that. This is for data that is
to look as the released models' did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vita_jax.errors import UserError

ORIGINAL_MAX_TOKENS = 6000
AUDIO_TOKENS_PER_SECOND = 12.5
TOKENS_PER_TILE = 256

# Fields that become lists, one entry per sample or per medium.
LISTED = ("set", "id", "image", "audio")


def estimate_tokens(text_tokens: int, num_tiles: int, audio_seconds: Sequence[float] = ()) -> int:
    """Positions a sample takes, as the original counts them: every sound is rounded up to an even number of seconds."""
    even = sum(2 * math.ceil(math.ceil(seconds) / 2) for seconds in audio_seconds)
    return text_tokens + TOKENS_PER_TILE * num_tiles + math.ceil(AUDIO_TOKENS_PER_SECOND * even)


def greedy_groups(token_counts: Sequence[int], max_tokens: int = ORIGINAL_MAX_TOKENS) -> list[list[int]]:
    """Groups of consecutive samples with at most `max_tokens` together; a longer sample stays alone.

    Args:
      token_counts: length of each sample, in the order they are taken.
      max_tokens: of a group.

    Returns:
      Indices of the samples of each group, in order.

    Raises:
      UserError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens {max_tokens} must be at least 1")
    groups: list[list[int]] = []
    filled = 0
    for index, count in enumerate(token_counts):
        if groups and filled + count <= max_tokens:
            groups[-1].append(index)
            filled += count
        else:
            groups.append([index])
            filled = count
    return groups


def join_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record with the rounds of all, and lists of their sets, ids, images and sounds.

    Raises:
      UserError: no record; a record whose answers are marked by place (`inserted_id`, `end_tag`) or that holds a
        video, none of which can be joined.
    """
    if not records:
        raise UserError("there is no record to join; give at least one")
    joined: dict[str, Any] = {"set": [], "id": [], "conversations": []}
    for record in records:
        for name in ("inserted_id", "end_tag", "video"):
            if name in record:
                raise UserError(f"record {record.get('id')!r} has {name!r} and cannot be joined with others")
        joined["conversations"] += record["conversations"]
        for name in LISTED:
            if name in record:
                value = record[name]
                joined.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    return joined
