"""What describes a benchmark."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Group:
    """A part of a benchmark with a figure of its own.

    Attributes:
      name: as in the items.
      title: as shown.
      floor, goal: accuracies (0..1) to be reached and to be aimed at; None where there are none.
    """

    name: str
    title: str
    floor: float | None = None
    goal: float | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Name and groups, in the order of the tables; its data is `<data folder>/benchmarks/<name>`."""

    name: str
    title: str
    groups: tuple[Group, ...]
