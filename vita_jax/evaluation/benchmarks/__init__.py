"""The benchmarks by name."""

from __future__ import annotations

import difflib

from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks.benchmark import Benchmark, Group
from vita_jax.evaluation.benchmarks.quickstart import QUICKSTART
from vita_jax.evaluation.benchmarks.speech import SPEECH

BENCHMARKS = {benchmark.name: benchmark for benchmark in (QUICKSTART, SPEECH)}

__all__ = ["BENCHMARKS", "Benchmark", "Group", "get_benchmark"]


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises `UserError` naming the nearest."""
    if name not in BENCHMARKS:
        nearest = max(BENCHMARKS, key=lambda known: difflib.SequenceMatcher(None, known, name).ratio())
        raise UserError(f"unknown benchmark {name!r}; the nearest is {nearest!r}, known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
