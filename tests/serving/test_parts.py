"""The parts below the endpoints: sound at other rates, the thread that computes, what is told of a conversation."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.ops.filter_bank import resample
from vita_jax.serving.problems import Problem
from vita_jax.serving.responses import StreamedResponse
from vita_jax.serving.sounds import Resampler, from_bytes, to_bytes
from vita_jax.serving.worker import UNREAD, Worker


@settings(max_examples=30, deadline=None)
@given(
    rates=st.sampled_from([(24_000, 16_000), (16_000, 24_000), (16_000, 16_000)]),
    cuts=st.lists(st.integers(0, 700), max_size=6),
)
def test_a_stream_is_resampled_as_the_whole(rates: tuple[int, int], cuts: list[int]):
    wave = np.random.default_rng(len(cuts)).normal(0, 0.1, 700).astype(np.float32)
    resampler = Resampler(*rates)
    parts = [resampler.push(part) for part in np.split(wave, sorted(cuts))] + [resampler.flush()]
    np.testing.assert_allclose(np.concatenate(parts), resample(wave, *rates), atol=1e-6)
    assert resampler.seconds == pytest.approx(700 / rates[0])
    np.testing.assert_allclose(from_bytes(to_bytes(wave)), wave, atol=2**-15)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(running=2, waiting=1)
    yield made
    made.close()
    assert not made.alive


async def items(stream, count: int) -> list:
    return [await anext(stream) for _ in range(count)]


def test_jobs_take_turns_and_those_beyond_the_room_are_refused(worker: Worker):
    order, go = [], threading.Event()

    def job(name: str) -> Iterator[str]:
        go.wait(10)
        for number in range(3):
            order.append(name)
            yield f"{name}{number}"

    async def run() -> None:
        streams = [worker.stream(lambda name=name: job(name)) for name in "abc"]
        with pytest.raises(Problem) as refused:
            worker.stream(lambda: job("d"))
        assert refused.value.status == 503 and refused.value.retry_after > 0
        go.set()
        got = [[item async for item in stream] for stream in streams]
        assert got == [[f"{name}{number}" for number in range(3)] for name in "abc"]

    asyncio.run(run())
    assert order[:6] == list("ababab") and order[6:] == list("ccc") and worker.load == (0, 0)


def test_a_job_that_is_not_read_waits_and_one_that_is_left_ends(worker: Worker):
    closed, given = threading.Event(), itertools.count()

    def job() -> Iterator[int]:
        try:
            while True:
                yield next(given)
        finally:
            closed.set()

    async def run() -> None:
        stream = worker.stream(job)
        async with aclosing(stream):
            assert await items(stream, 3) == [0, 1, 2]
            for _ in range(20):
                assert await worker.call(lambda: 5) == 5  # something short comes in between
        assert await asyncio.to_thread(closed.wait, 10)

    asyncio.run(run())
    assert next(given) <= 3 + UNREAD + 1


def test_a_client_that_takes_nothing_is_left():
    closed = []

    async def pieces():
        while True:
            yield b"x"

    async def close() -> None:
        closed.append(True)

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def run() -> None:
        response = StreamedResponse(pieces(), "audio/pcm", 0.05, close)
        with pytest.raises(TimeoutError):
            await response({"type": "http"}, None, send)

    asyncio.run(run())
    assert closed == [True]


def test_a_mistake_within_a_stream_of_events_is_one_of_them():
    sent = []

    async def pieces():
        yield b"data: 1\n\n"
        raise Problem(504, "too slow", code="timeout")

    async def close() -> None:
        pass

    async def send(message: dict) -> None:
        sent.append(message.get("body", b""))

    asyncio.run(StreamedResponse(pieces(), "text/event-stream", 1, close)({"type": "http"}, None, send))
    assert sent[1] == b"data: 1\n\n" and b'"code": "timeout"' in sent[2] and sent[3] == b""


def test_errors_are_the_readers(worker: Worker):
    def job() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    def fail() -> None:
        raise KeyError("none")

    async def run() -> None:
        stream = worker.stream(job)
        assert await anext(stream) == 1
        with pytest.raises(ValueError, match="no"):
            await anext(stream)
        with pytest.raises(KeyError):
            await worker.call(fail)
        assert [item async for item in worker.stream(lambda: iter([1, 2]))] == [1, 2]

    asyncio.run(run())


def test_sessions_have_turns_as_long_as_they_last(worker: Worker):
    turns = threading.Semaphore(0)

    def turn() -> bool:
        turns.release()
        return False

    async def run() -> None:
        await worker.call(lambda: worker.attach("me", turn))
        for _ in range(5):  # without anything to do, too
            assert await asyncio.to_thread(turns.acquire, True, 10)
        await worker.call(lambda: worker.detach("me"))

    asyncio.run(run())


def test_what_waits_when_the_worker_stops_is_told():
    worker, go, begun = Worker(running=1, waiting=1), threading.Event(), threading.Event()

    def job() -> Iterator[int]:
        begun.set()
        go.wait(10)
        yield 1

    async def run() -> None:
        first, second = worker.stream(job), worker.stream(lambda: iter([2]))
        await asyncio.to_thread(begun.wait, 10)
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        await asyncio.sleep(0.05)
        go.set()
        await closing
        with pytest.raises(Problem, match="is stopping"):
            await anext(second)
        assert await anext(first) == 1

    asyncio.run(run())
