"""Where the time of a stage goes: by hand, and over a run that was killed."""

from __future__ import annotations

import io

import pytest

from tests.training.test_loop import Killed, interrupted
from tests.training.tiny import experiment, make_batches
from vita_jax.training import loop
from vita_jax.training.experiment import CheckpointConfig, LogConfig
from vita_jax.training.goodput import Clock, Spent, describe_spent, read_spent, taken_up
from vita_jax.training.metrics import read_metrics


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_start_is_set_up_waits_and_saves() -> None:
    time = Time()
    clock = Clock(time, time)
    time.now += 6
    clock.waited(5)  # the first batch is part of setting up
    time.now += 4
    clock.stepped()
    time.now += 80
    clock.stepped()
    clock.waited(5)
    with clock.saving():
        time.now += 10
    spent = clock.spent()
    assert spent == Spent(elapsed=100, setup=10, saving=10, waiting=5, unix=1100)
    assert (spent.useful, spent.share) == (75, 0.75)
    assert read_spent(spent.numbers() | {"loss": 1.0}) == spent
    assert describe_spent(spent) == (
        "goodput 75.0 % (set-up 10.0 %, saving 10.0 %, waiting for data 5.0 %, repeated steps 0.0 %)"
    )


def test_what_a_killed_process_made_behind_its_checkpoint_is_repeated() -> None:
    checkpoint = Spent(elapsed=100, setup=10, saving=10, waiting=5, unix=1100)
    reports = [
        Spent(elapsed=elapsed, setup=10, saving=10, waiting=5, unix=1000 + elapsed) for elapsed in (50, 130, 160)
    ]
    before = taken_up(checkpoint, [spent.numbers() for spent in reports], now=1260)
    assert before == Spent(elapsed=160, setup=10, saving=10, waiting=5, repeated=60, down=100, unix=1260)
    assert before.useful == checkpoint.useful
    # Killed again behind the same checkpoint: 20 seconds of setting up and 30 of steps more.
    again = Spent(elapsed=210, setup=30, saving=10, waiting=5, repeated=60, down=100, unix=1310)
    assert taken_up(checkpoint, [again.numbers()], now=1310).repeated == 90
    # Stopped by a signal: the checkpoint is newer than all reports.
    assert taken_up(checkpoint, [reports[0].numbers()], now=1100) == checkpoint
    # An older run, which did not say.
    assert taken_up(Spent(), [{"loss": 1.0}], now=5.0) == Spent(unix=5.0)


def test_later_starts_add_to_earlier_ones() -> None:
    time = Time()
    clock = Clock(time, time)
    clock.before = Spent(elapsed=100, setup=10, repeated=20, down=7, unix=990)
    time.now += 5
    assert clock.spent() == Spent(elapsed=105, setup=15, repeated=20, down=7, unix=1005), "still setting up"
    clock.stepped()
    time.now += 95
    assert clock.spent().share == (200 - 15 - 20) / 200


def test_a_run_tells_its_goodput_over_a_kill(tmp_path) -> None:
    config = experiment(tmp_path, checkpoint=CheckpointConfig(every_steps=100), log=LogConfig(every_steps=1))

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        loop.run(config, make_batches=interrupted("naming", 3, die), stream=io.StringIO())
    stream = io.StringIO()
    loop.run(config, make_batches=make_batches, stream=stream)
    naming, joint = ([r for r in read_metrics(tmp_path) if r["stage"] == name] for name in ("naming", "joint"))
    assert stream.getvalue().count(": goodput ") == 2
    assert all(record["repeated_seconds"] > 0 for record in naming[:-1])
    assert all(record["repeated_seconds"] == 0 for record in joint[:-1])
    for records in (naming, joint):
        spent = [read_spent(record) for record in records[:-1]]
        assert all(0 < one.useful < two.useful < two.elapsed for one, two in zip(spent[1:], spent[2:], strict=False))
        assert 0 < records[-1]["goodput_share"] < 1
