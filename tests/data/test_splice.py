"""Placeholder expansion against the original's way of doing it: cutting and joining lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.data.splice import FeatureLayout, FeatureSpan, expand_placeholders, pad_rows, shared_positions
from vita_jax.errors import UserError

IMAGE, AUDIO = -200, -500


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.one_of(st.integers(1, 50), st.just(IMAGE), st.just(AUDIO)), max_size=12),
    sizes=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    max_length=st.one_of(st.none(), st.integers(1, 20)),
)
def test_expansion_equals_list_splicing(pieces, sizes, max_length):
    spans = {IMAGE: [], AUDIO: []}
    tokens, labels, index = [], [], []
    for i, piece in enumerate(pieces):
        if piece > 0:
            tokens, labels, index = [*tokens, piece], [*labels, piece + 100], [*index, -1]
        else:
            span = FeatureSpan(10 * i, sizes[i])
            spans[piece].append(span)
            tokens, labels = tokens + [0] * span.count, labels + [-100] * span.count
            index += range(span.start, span.start + span.count)
    given_labels = [piece + 100 for piece in pieces]  # those of placeholders must not survive
    got = expand_placeholders(pieces, given_labels, spans[IMAGE], spans[AUDIO], max_length=max_length)
    np.testing.assert_array_equal(got.tokens, np.array(tokens[:max_length], int))
    np.testing.assert_array_equal(got.labels, np.array(labels[:max_length], int))
    np.testing.assert_array_equal(got.feature_index, np.array(index[:max_length], int))
    np.testing.assert_array_equal(got.positions, np.arange(len(tokens[:max_length])))


@pytest.mark.parametrize(
    ("ids", "images", "word"),
    [([1, IMAGE], [], "1 image placeholders but 0"), ([1], [FeatureSpan(0, 2)], "0 image"), ([1, -7], [], "-7")],
)
def test_mismatches_are_named(ids, images, word):
    with pytest.raises(UserError, match=word):
        expand_placeholders(ids, None, images)


def test_padding_sides():
    rows = [expand_placeholders([5, IMAGE], [5, 0], [FeatureSpan(3, 2)]), expand_placeholders([7], [7])]
    right, left = pad_rows(rows), pad_rows(rows, side="left", length=4)
    np.testing.assert_array_equal(right["tokens"], [[5, 0, 0], [7, 0, 0]])
    np.testing.assert_array_equal(right["segment_ids"], [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(left["feature_index"], [[-1, -1, 3, 4], [-1, -1, -1, -1]])
    np.testing.assert_array_equal(left["labels"], [[-100, 5, -100, -100], [-100, -100, -100, 7]])
    np.testing.assert_array_equal(left["positions"], [[0, 0, 1, 2], [0, 0, 0, 0]])
    with pytest.raises(UserError, match="3 positions but only 2"):
        pad_rows(rows, length=2)


@settings(max_examples=60, deadline=None)
@given(visual=st.lists(st.booleans(), max_size=60), stride=st.integers(1, 6))
def test_shared_positions_follow_the_definition(visual, stride):
    """Ceiling of the running sum of the increments, minus one; in sixtieths, which every increment is a multiple of."""
    runs = np.split(np.arange(len(visual)), np.flatnonzero(np.diff(visual)) + 1) if visual else []
    increments = np.full(len(visual), 60)
    for run in runs:
        if visual[run[0]]:
            rest = len(run) % stride
            increments[run] = 60 // stride
            increments[run[len(run) - rest :]] = 60 // max(rest, 1)
    want = -(-np.cumsum(increments) // 60) - 1
    np.testing.assert_array_equal(shared_positions(np.array(visual, bool), stride), want)


def test_shared_positions_of_text_only_and_of_an_image():
    np.testing.assert_array_equal(shared_positions(np.zeros(4, bool), 4), [0, 1, 2, 3])
    got = expand_placeholders([1, IMAGE, 2], None, [FeatureSpan(0, 5)], visual_position_stride=4).positions
    np.testing.assert_array_equal(got, [0, 1, 1, 1, 1, 2, 3])


def test_layout_with_pooled_copies():
    layout = FeatureLayout(16, (3, 2))
    assert layout.features_per_slot == 29
    assert layout.tile_span(0) == layout.tile_span(0, 16) == FeatureSpan(0, 16)
    assert layout.tile_span(1, 9) == FeatureSpan(29 + 16, 9)
    assert layout.tile_span(1, 4) == FeatureSpan(29 + 25, 4)
    assert layout.extra_start(2) == 58
    with pytest.raises(UserError, match="25 features of a tile"):
        layout.tile_span(0, 25)


def test_state_labels_stand_at_the_last_position_of_each_clip() -> None:
    ids = [5, AUDIO, 6, AUDIO, AUDIO]
    spans = [FeatureSpan(0, 3), FeatureSpan(3, 0), FeatureSpan(3, 2)]
    row = expand_placeholders(ids, [-100, -100, 6, -100, -100], (), spans, audio_labels=[-101, -102, -102])
    assert row.labels.tolist() == [-100, -100, -100, -101, 6, -100, -102]
    with pytest.raises(UserError, match="2 labels were given for 3 audio placeholders"):
        expand_placeholders(ids, None, (), spans, audio_labels=[-101, -102])
