"""Utterances are cut from a stream without losing or mixing anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.errors import UserError
from vita_jax.inference.utterances import Begun, CutState, Ended, Sound, UtteranceOptions, cut, end

CHUNK = 512
OPTIONS = UtteranceOptions()


def run(probabilities, options=OPTIONS, closed=True):
    """[(start, samples, Ended or None)] of a stream whose sample i has the value i."""
    state, found = CutState(), []
    for number, probability in enumerate(probabilities):
        chunk = np.arange(number * CHUNK, (number + 1) * CHUNK, dtype=np.float64)
        state, cuts = cut(state, chunk, probability, options)
        take(found, cuts)
    if closed:
        take(found, end(state, options)[1])
    return found


def take(found, cuts):
    for what in cuts:
        match what:
            case Begun(start):
                assert not found or found[-1][2] is not None
                found.append([start, np.zeros((0,)), None])
            case Sound(samples):
                found[-1][1] = np.concatenate([found[-1][1], samples])
            case Ended():
                assert found[-1][2] is None
                found[-1][2] = what


PROBABILITIES = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.6, 0.71, 1.0]), st.integers(1, 40)), max_size=12).map(
    lambda runs: [probability for probability, count in runs for _ in range(count)]
)


@given(PROBABILITIES, st.sampled_from([1.0, 2.5, 30.0]), st.sampled_from([0, 300]))
@settings(max_examples=150, deadline=None)
def test_every_utterance_is_one_stretch_of_sound_that_ends_once(probabilities, max_seconds, before_ms):
    options = UtteranceOptions(max_seconds=max_seconds, before_ms=before_ms)
    last = 0
    for start, sound, ended in run(probabilities, options):
        assert (ended.start, ended.end) == (start, start + len(sound)) and start >= last
        np.testing.assert_array_equal(sound, np.arange(start, ended.end))
        assert 0 < ended.speech <= len(sound) <= max_seconds * 16000 + CHUNK + before_ms * 16
        last = ended.end


@given(PROBABILITIES)
@settings(max_examples=100, deadline=None)
def test_no_speech_is_outside_of_all_utterances(probabilities):
    found = run(probabilities)
    for number, probability in enumerate(probabilities):
        if probability >= OPTIONS.vad.threshold:
            assert any(start <= number * CHUNK and (number + 1) * CHUNK <= ended.end for start, _, ended in found)


@given(PROBABILITIES)
@settings(max_examples=50, deadline=None)
def test_silence_ends_it_without_being_told(probabilities):
    quiet = [0.0] * (OPTIONS.vad.min_silence_ms * 16 // CHUNK + 2)
    assert [ended for _, _, ended in run([*probabilities, *quiet], closed=False)].count(None) == 0


def test_what_belongs_to_it():
    # Speech in chunks 20 to 39, with a pause in the middle, then silence.
    probabilities = [0.0] * 20 + [1.0] * 8 + [0.0] * 10 + [0.9] * 2 + [0.0] * 20
    ((start, sound, ended),) = run(probabilities)
    assert start == 20 * CHUNK - 4800 and ended.speech == 10 * CHUNK
    # The silence is noticed at the end of its first chunk; 200 ms more of it belong to the utterance.
    assert ended.end == 41 * CHUNK + 3200 == start + len(sound)


def test_what_comes_before_is_never_of_the_utterance_before():
    probabilities = [1.0] * 5 + [0.0] * 18 + [1.0] * 5
    first, second = run(probabilities)
    assert first[0] == 0 and first[2].end <= second[0] and second[0] == 23 * CHUNK - 4800


def test_speech_that_does_not_end_is_cut():
    options = UtteranceOptions(max_seconds=1.0)
    found = run([1.0] * 100, options)
    assert len(found) == 4 and all(later[0] == earlier[2].end for earlier, later in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after_ms": 500}, "after_ms 500"),
        ({"max_seconds": 0.5}, "max_seconds 0.5"),
        ({"before_ms": -1}, "before_ms -1"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        UtteranceOptions(**changes)
