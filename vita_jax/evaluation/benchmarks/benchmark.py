"""What describes a benchmark."""

from __future__ import annotations

import dataclasses
from typing import Literal

# Measures that are made of the language model's answers; the others are described where they are taken.
ANSWERED = ("answer", "refusal", "acceptance", "transcript")


@dataclasses.dataclass(frozen=True)
class Group:
    """A part of a benchmark with a figure of its own.

    Attributes:
      name: of the group.
      title: as shown.
      floor, goal: accuracies (0..1) to be reached and to be aimed at; None where there are none.
      measure: what counts as right. "answer": the answer is the true one. "refusal": the answer begins with the state
        symbol of sound that is not meant for the model; "acceptance": it does not. "transcript": not right or wrong but
        1 minus the character error rate of the answer. "recogniser": the same of what the recogniser hears.
        "input_head": the state head names the class of the input. "voice": the recogniser reads a voice back without
        any error.
      source: name of the items that it is made of; None is the group's own.
    """

    name: str
    title: str
    floor: float | None = None
    goal: float | None = None
    measure: Literal["answer", "refusal", "acceptance", "transcript", "recogniser", "input_head", "voice"] = "answer"
    source: str | None = None

    @property
    def items(self) -> str:
        """The `group` of the items that it is made of."""
        return self.name if self.source is None else self.source

    @property
    def is_answered(self) -> bool:
        """Whether the language model answers its items."""
        return self.measure in ANSWERED

    @property
    def counts_characters(self) -> bool:
        """Whether its accuracy is 1 minus a character error rate."""
        return self.measure in ("transcript", "recogniser")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Name and groups, in the order of the tables; its data is `<data folder>/benchmarks/<name>`."""

    name: str
    title: str
    groups: tuple[Group, ...]
