"""Streams that several processes share, that threads or workers read, and that go on from any place.

Records go to lanes in turn: record i to lane i modulo their number. Every lane packs rows of its own, and a batch has
equally many rows of each, lane by lane. What a batch holds thus depends on the number of lanes and not on that of the
processes which share them, nor on the threads and workers that decode. The state of a stream is, for every lane, how
many records it has read and what its open rows hold; a run may go on with another number of processes or workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
from absl import flags

from vita_jax.errors import UserError

# Decoded examples waiting per thread or worker. They hold whole pictures, so few.
WAITING = 4
LANES = "lanes"  # of a state


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The lanes of a stream.

    Attributes:
      count: of all processes together.
      own: those of this process, in order.
    """

    count: int = 1
    own: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.own or any(not 0 <= lane < self.count for lane in self.own):
            raise UserError(f"lanes {list(self.own)} of {self.count} do not exist; they go from 0 to count - 1")

    def rows_of_each(self, batch_size: int) -> int:
        """Rows that each own lane gives to a batch of this process. Raises UserError if they do not share it evenly."""
        if batch_size % len(self.own):
            raise UserError(
                f"batch_size {batch_size} cannot be shared by {len(self.own)} lanes; make it a multiple, or change "
                "data.lanes"
            )
        return batch_size // len(self.own)


WHOLE = Lanes()


def lanes_of_process(count: int | None, process: int, processes: int) -> Lanes:
    """The lanes of one of several processes.

    Args:
      count: in all; None = one for each process.
      process, processes: which one, of how many.

    Raises:
      UserError: the processes cannot share them evenly.
    """
    count = processes if count is None else count
    if count < 1 or count % processes:
        raise UserError(
            f"data.lanes is {count}, but there are {processes} processes; it must be a multiple of their number"
        )
    share = count // processes
    return Lanes(count, tuple(range(process * share, (process + 1) * share)))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Who decodes: threads of this process (0 = none of their own), or worker processes, which read faster."""

    num_threads: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise UserError(f"{name} is {value}; it must be at least 0")


ONE_THREAD = Reading(1)


class Examples(grain.IterDataset):
    """The elements of a map dataset in their order; how many were taken is the whole state."""

    def __init__(self, elements: grain.MapDataset, reading: Reading) -> None:
        super().__init__(elements)
        self._elements, self._reading = elements, reading

    def __iter__(self) -> grain.DatasetIterator:
        return _ExamplesIterator(self._elements, self._reading)


class _ExamplesIterator(grain.DatasetIterator):
    def __init__(self, elements: grain.MapDataset, reading: Reading) -> None:
        super().__init__()
        self._elements, self._reading = elements, reading
        self._taken = 0
        self._inner: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        if self._inner is None:
            self._inner = self._open()
        element = next(self._inner)
        self._taken += 1
        return element

    def _open(self) -> grain.DatasetIterator:
        if self._taken >= len(self._elements):
            raise StopIteration
        left = self._elements[self._taken :] if self._taken else self._elements
        threads, workers = self._reading.num_threads, self._reading.num_workers
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own; commands here have none
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=WAITING)
            one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            return iter(left.to_iter_dataset(one).mp_prefetch(options))
        return iter(left.to_iter_dataset(grain.ReadOptions(threads, threads * WAITING)))

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._taken, self._inner = state["taken"], None

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()


class Joined(grain.IterDataset):
    """Rows of several lanes, `rows` of each in turn; a lane that has ended is left out."""

    def __init__(self, lanes: Mapping[int, grain.IterDataset], rows: int) -> None:
        super().__init__(list(lanes.values()))
        self._lanes, self._rows = dict(lanes), rows

    def __iter__(self) -> grain.DatasetIterator:
        return _JoinedIterator({number: iter(lane) for number, lane in self._lanes.items()}, self._rows)


class _JoinedIterator(grain.DatasetIterator):
    def __init__(self, lanes: Mapping[int, grain.DatasetIterator], rows: int) -> None:
        super().__init__(list(lanes.values()))
        self._lanes, self._rows = dict(lanes), rows
        self._given = 0  # rows of this round, those of ended lanes included

    def __next__(self) -> Any:
        numbers = list(self._lanes)
        for _ in range(self._rows * len(numbers)):
            number = numbers[self._given // self._rows]
            self._given = (self._given + 1) % (self._rows * len(numbers))
            try:
                return next(self._lanes[number])
            except StopIteration:
                continue
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        lanes = {str(number): lane.get_state() for number, lane in self._lanes.items()}
        return {LANES: lanes, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, lane in self._lanes.items():
            lane.set_state(state[LANES][str(number)])
        self._given = state["given"]

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a stream from those of all processes that share it."""
    return {**states[0], LANES: {number: state for one in states for number, state in one[LANES].items()}}
