"""The one thread that computes, and how the event loop gives it work.

A job is an iterator. Its thread takes one item of every running job in turn, so that answers go on side by side (the
engine moves all of them with each of its rounds), and hands items to the event loop, which never waits for a
computation. A job whose items are not read is left alone until they are; one that is left is closed. Jobs beyond
those that run wait in order, and beyond those that may wait are refused. Realtime sessions are no jobs: each is given
a turn in every round, as long as it lasts.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vita_jax.serving.problems import overloaded

T = TypeVar("T")

UNREAD = 64  # items that a job is ahead of its reader
IDLE_SECONDS = 0.01  # after which sessions that had nothing to do are asked again: they look at the clock
FIRST_GUESS = 2.0  # seconds that a job takes, before one has been seen


class Stream(Generic[T]):
    """The items of a job as they come; `aclose` ends it early. To be used in the event loop only."""

    def __init__(self, worker: Worker, make: Callable[[], Iterator[T]]) -> None:
        self._worker, self._make = worker, make
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._items: deque[T] = deque()
        self._iterator: Iterator[T] | None = None
        self._error: Exception | None = None
        self._ended = self._left = False
        self._began = 0.0

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        if len(self._items) == UNREAD - 1:
            self._worker.wake()
        return item

    async def aclose(self) -> None:
        """Ends the job; what it has given and nobody has read is dropped."""
        self._left = True
        self._items.clear()
        self._worker.wake()

    # ---- in the worker's thread -------------------------------------------------------------------------------------

    @property
    def _ready(self) -> bool:
        return self._left or len(self._items) < UNREAD

    def _step(self) -> bool:
        """Takes one item. Returns whether there may be more."""
        try:
            if self._left:
                self._end(None)
            else:
                if self._iterator is None:
                    self._began, self._iterator = time.monotonic(), iter(self._make())
                self._items.append(next(self._iterator))
                self._notify()
        except StopIteration:
            self._end(None)
        except Exception as error:  # whatever it is, it is the reader's
            self._end(error)
        return not self._ended

    def _end(self, error: Exception | None) -> None:
        try:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                close()
        except Exception as closing:
            error = error or closing
        self._iterator, self._error, self._ended = None, error, True
        self._notify()

    def _notify(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the loop is closed: nobody reads
            self._left = True


class Worker:
    """A thread that runs jobs; see the module."""

    def __init__(self, *, running: int, waiting: int) -> None:
        """
        Args:
          running: jobs that go on at a time.
          waiting: jobs that wait for one of them to end.
        """
        self.max_running, self.max_waiting = running, waiting
        self._running: list[Stream] = []
        self._waiting: deque[Stream] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._turns: dict[object, Callable[[], bool]] = {}
        self._changed = threading.Condition()
        self._awake = self._stopping = False
        self._job_seconds = FIRST_GUESS
        self._thread = threading.Thread(target=self._run, name="vita_jax worker", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it computes."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> tuple[int, int]:
        """Jobs that run, and that wait."""
        return len(self._running), len(self._waiting)

    def retry_after(self) -> float:
        """Seconds until a job that is refused now would probably be taken."""
        return self._job_seconds * (1 + len(self._waiting)) / self.max_running

    def stream(self, make: Callable[[], Iterator[T]]) -> Stream[T]:
        """Starts a job: `make` and its iterator run in the thread.

        Raises:
          Problem: 503, too many wait already.
        """
        with self._changed:
            if len(self._running) + len(self._waiting) >= self.max_running + self.max_waiting:
                raise overloaded(
                    f"{len(self._waiting)} requests wait already (limit waiting); try again later", self.retry_after()
                )
            stream = Stream(self, make)
            self._waiting.append(stream)
            self._awake = True
            self._changed.notify()
        return stream

    async def call(self, function: Callable[[], T]) -> T:
        """Runs something short between the items of jobs."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = function()
            except Exception as caught:
                error = caught
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:  # the loop is closed
                pass

        with self._changed:
            self._calls.append(run)
            self._awake = True
            self._changed.notify()
        return await future

    def attach(self, owner: object, turn: Callable[[], bool]) -> None:
        """Calls `turn` in every round, until `detach`; it says whether there was anything to do, and raises nothing. To
        be called in the thread itself (`call`).
        """
        self._turns[owner] = turn

    def detach(self, owner: object) -> None:
        """Ends what `attach` began, in the thread itself, too."""
        self._turns.pop(owner, None)

    def close(self) -> None:
        """Ends all jobs and the thread."""
        with self._changed:
            self._stopping = self._awake = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def wake(self) -> None:
        """There is something new to do."""
        with self._changed:
            self._awake = True
            self._changed.notify()

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                while not self._awake:
                    self._changed.wait(IDLE_SECONDS if self._turns else None)
                    if self._turns:
                        break
                self._awake = False
            while self._round():
                pass
        for stream in (*self._running, *self._waiting):
            stream._end(overloaded("the server is stopping", self._job_seconds))

    def _round(self) -> bool:
        """Does everything there is to do once. Returns whether there was something."""
        worked = False
        while self._calls:
            self._calls.popleft()()
            worked = True
        with self._changed:
            while self._waiting and len(self._running) < self.max_running:
                self._running.append(self._waiting.popleft())
        for stream in list(self._running):
            if self._stopping:
                return False
            if stream._ready:
                worked = True
                if not stream._step():
                    self._running.remove(stream)
                    self._job_seconds += 0.2 * (time.monotonic() - stream._began - self._job_seconds)
            while self._calls:
                self._calls.popleft()()
        for turn in list(self._turns.values()):
            worked |= turn()
        return worked
