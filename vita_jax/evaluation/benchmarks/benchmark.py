"""What describes a benchmark."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Group:
    """A part of a benchmark with a figure of its own.

    Attributes:
      name: as in the items.
      title: as shown.
      floor, goal: accuracies (0..1) to be reached and to be aimed at; None where there are none.
      measure: what counts as right. "answer": the answer is the true one. "refusal": the answer begins with the state
        symbol of sound that is not meant for the model. "transcript": not right or wrong but 1 minus the character
        error rate.
    """

    name: str
    title: str
    floor: float | None = None
    goal: float | None = None
    measure: Literal["answer", "refusal", "transcript"] = "answer"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Name and groups, in the order of the tables; its data is `<data folder>/benchmarks/<name>`."""

    name: str
    title: str
    groups: tuple[Group, ...]
