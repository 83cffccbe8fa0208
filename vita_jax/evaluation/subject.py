"""What is measured: a model, its run and data, and how much of it; handed from measure to measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vita_jax.data.examples import ExampleContext
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.storage import on_disk
from vita_jax.training.experiment import ExperimentConfig, build_model, data_folder, example_context
from vita_jax.training.families import Model


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
      config, params, tokenizer: the model and its run.
      benchmark: name of the benchmark.
      limit: at most so many items of each kind of each group; None = all.
      batch_size: questions per call.
      keep_sounds: whether some of the sounds are written to the run's folder.
      mesh: the devices that share the work, see `opening`; None = one.
    """

    config: ExperimentConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    benchmark: str = "quickstart"
    limit: int | None = None
    batch_size: int = 64
    keep_sounds: bool = False
    mesh: Mesh | None = None

    @cached_property
    def model(self) -> Model:
        """The network."""
        return build_model(self.config)

    @cached_property
    def context(self) -> ExampleContext:
        """How items become arrays."""
        return example_context(self.config, self.tokenizer)

    @property
    def root(self) -> Path:
        """Where the items and media are."""
        return benchmark_folder(self.config, self.benchmark)


def benchmark_folder(config: ExperimentConfig, benchmark: str = "quickstart") -> Path:
    """Where the items and media of a benchmark are."""
    return on_disk(data_folder(config), "a benchmark") / "benchmarks" / benchmark
