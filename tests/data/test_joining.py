"""The original's greedy packing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vita_jax.data.joining import estimate_tokens, greedy_groups, join_records
from vita_jax.errors import UserError


@given(st.lists(st.integers(0, 120), max_size=40), st.integers(1, 100))
def test_groups_are_consecutive_and_full(counts: list[int], limit: int) -> None:
    groups = greedy_groups(counts, limit)
    assert [index for group in groups for index in group] == list(range(len(counts)))
    for group, following in zip(groups, [*groups[1:], None], strict=False):
        total = sum(counts[index] for index in group)
        assert total <= limit or len(group) == 1
        assert following is None or total + counts[following[0]] > limit


def test_joined_record_has_all_rounds_and_media() -> None:
    first = {"set": "a", "id": 1, "image": "1.png", "conversations": [{"from": "human", "value": "x"}]}
    second = {"set": "b", "id": 2, "image": ["2.png", "3.png"], "audio": "s.wav", "conversations": [{"from": "gpt"}]}
    joined = join_records([first, second])
    assert joined["image"] == ["1.png", "2.png", "3.png"] and joined["audio"] == ["s.wav"]
    assert joined["set"] == ["a", "b"] and joined["id"] == [1, 2] and len(joined["conversations"]) == 2
    assert first["image"] == "1.png"
    for bad in ([], [first | {"inserted_id": 1}], [first | {"video": "v.mp4"}]):
        with pytest.raises(UserError):
            join_records(bad)
    with pytest.raises(UserError, match="max_tokens 0"):
        greedy_groups([1], 0)


def test_sounds_are_counted_in_even_seconds() -> None:
    assert estimate_tokens(10, 2, [0.3, 2.5]) == 10 + 512 + 75
