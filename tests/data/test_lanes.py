"""Streams that processes share and workers read: what a batch holds does not depend on either."""

from __future__ import annotations

import json

import grain
import numpy as np
import pytest

from tests.data.batches import SIZES, assert_equal, batches_of
from vita_jax.data.lanes import Examples, Joined, Lanes, Reading, lanes_of_process, merge_states
from vita_jax.data.loader import SourceConfig, make_loader
from vita_jax.errors import UserError

LANES = 4


def loader_of(folder, ctx, process=0, processes=1, **changes):
    """A loader of one of several processes that share four lanes and batches of eight rows."""
    lanes = lanes_of_process(LANES, process, processes)
    settings = {**SIZES, "row_tiles": 3, "max_bad_fraction": 1.0, "reading": Reading(0), **changes}
    sources = [SourceConfig(folder, split_rounds=True)]
    return make_loader(sources, ctx, **{**settings, "batch_size": 8 // processes, "lanes": lanes})


def together(loaders, count):
    """The batches of processes side by side, as a model sees them."""
    parts = [batches_of(loader, count) for loader in loaders]
    return [{name: np.concatenate([b[name] for b in batches]) for name in batches[0]} for batches in zip(*parts)]  # noqa: B905


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(mixed, ctx, processes):
    folder, _ = mixed
    whole = batches_of(loader_of(folder, ctx), 6)
    assert_equal(together([loader_of(folder, ctx, i, processes) for i in range(processes)], 6), whole)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_a_run_goes_on_with_another_number_of_processes(mixed, ctx, before, after):
    folder, _ = mixed
    expected = batches_of(loader_of(folder, ctx), 9)
    first = [loader_of(folder, ctx, i, before) for i in range(before)]
    head = together(first, 4)
    state = merge_states([json.loads(json.dumps(loader.get_state())) for loader in first])
    second = [loader_of(folder, ctx, i, after) for i in range(after)]
    for loader in second:
        loader.set_state(state)
    assert_equal(head + together(second, 5), expected)


@pytest.mark.slow
def test_workers_read_the_same_and_a_run_goes_on_without_them(mixed, ctx):
    """In the middle of an epoch, with bad records on the way, and the other way round."""
    folder, _ = mixed
    plain, workers = {"lanes": Lanes()}, {"lanes": Lanes(), "reading": Reading(num_workers=2)}

    def loader(options):
        sources = [SourceConfig(folder, split_rounds=True)]
        settings = {**SIZES, "row_tiles": 3, "max_bad_fraction": 1.0, "reading": Reading(0)}
        return make_loader(sources, ctx, **{**settings, **options})

    expected = batches_of(loader(plain), 12)
    for first, second in ((workers, plain), (plain, workers)):
        begun, gone_on = loader(first), loader(second)
        head = batches_of(begun, 5)
        gone_on.set_state(json.loads(json.dumps(begun.get_state())))
        assert_equal(head + batches_of(gone_on, 7), expected)
        begun.close()
        gone_on.close()


def test_lanes_that_have_ended_are_left_out():
    lanes = {n: Examples(grain.MapDataset.range(10 * n, 10 * n + length), Reading()) for n, length in ((1, 3), (2, 5))}
    joined = Joined(lanes, 2)
    assert list(joined) == [10, 11, 20, 21, 12, 22, 23, 24]
    for taken in range(9):
        begun, gone_on = iter(joined), iter(joined)
        for _ in range(taken):
            next(begun)
        gone_on.set_state(begun.get_state())
        assert list(gone_on) == list(joined)[taken:]


def test_examples_begin_anywhere():
    iterator = iter(Examples(grain.MapDataset.range(5).repeat(None), Reading(2)))
    assert [next(iterator) for _ in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    iterator.set_state({"taken": 3})
    assert [next(iterator) for _ in range(4)] == [3, 4, 0, 1] and iterator.get_state() == {"taken": 7}
    iterator.close()


def test_lanes_must_fit(mixed, ctx):
    with pytest.raises(UserError, match="data.lanes is 4, but there are 3 processes"):
        lanes_of_process(4, 0, 3)
    assert lanes_of_process(None, 1, 3) == Lanes(3, (1,))
    with pytest.raises(UserError, match="do not exist"):
        Lanes(2, (2,))
    with pytest.raises(UserError, match="num_workers is -1"):
        Reading(num_workers=-1)
    state = loader_of(mixed[0], ctx).get_state()
    with pytest.raises(UserError, match="went in 4 lanes, this run has 1; go on with --config.data.lanes=4"):
        make_loader([SourceConfig(mixed[0])], ctx, **SIZES).set_state(state)
    with pytest.raises(UserError, match="start the stage anew"):
        make_loader([SourceConfig(mixed[0])], ctx, **SIZES).set_state({"parent": 3})
