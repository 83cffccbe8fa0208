"""What of a model is int8 while it answers: the language model's weights, its key/value cache, both or nothing.

Weights become integers while a checkpoint is read (`vita_jax.models.int8`), the cache is one of integers from its
beginning (`vita_jax.models.language.cache`). The two are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.models.int8 import LeafChange, int8_weights, weight_bytes
from vita_jax.models.language.decoder import Decoder, make_cache
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.families import family_of, weight_table

PARTS = ("weights", "cache")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class QuantizationConfig:
    """What is int8; None leaves it in floats.

    Attributes:
      weights: projections, experts and output head of the language model.
      cache: its keys and values.
    """

    weights: Literal["int8"] | None = None
    cache: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        for name in PARTS:
            value = getattr(self, name)
            if value not in (None, "int8"):
                raise UserError(f"quantization.{name} is {value!r}; it can be None or 'int8'")

    @property
    def cache_dtype(self) -> jnp.dtype | None:
        """Of keys and values; None = what the model computes in."""
        return None if self.cache is None else jnp.dtype(self.cache)

    @property
    def change(self) -> Callable[[ExperimentConfig], LeafChange] | None:
        """For `vita_jax.training.checkpoint.load_params`; None where weights stay floats."""
        return None if self.weights is None else _change

    def check(self, config: ExperimentConfig) -> None:
        """Raises UserError for a model that has nothing in int8."""
        family = family_of(config.model)
        if self != FLOATS and family.in_context:
            raise UserError(f"a {family.title} answers in floats only; leave out --int8")


FLOATS = QuantizationConfig()


def int8_parts(parts: Sequence[str]) -> QuantizationConfig:
    """From names of `PARTS`, such as those behind --int8. Raises UserError for another name."""
    for name in parts:
        if name not in PARTS:
            raise UserError(f"--int8 {name}: only {' and '.join(PARTS)} can be int8")
    return QuantizationConfig(**{name: "int8" for name in parts})


def _change(config: ExperimentConfig) -> LeafChange:
    QuantizationConfig(weights="int8").check(config)
    return int8_weights(weight_table(config.model))


def describe_memory(
    params: Mapping[str, Any], decoder: Decoder, num_rows: int, num_slots: int, cache_dtype: jnp.dtype | None
) -> str:
    """Two lines: what weights and cache take, and would take in floats.

    Args:
      params: of the whole model, as they are in use.
      decoder: its language model.
      num_rows, num_slots: conversations, and positions of each, that the cache has room for.
      cache_dtype: of keys and values; None = what the decoder computes in.
    """

    def of_cache(dtype: jnp.dtype | None) -> int:
        dtype = decoder.dtype if dtype is None else dtype
        return jax.eval_shape(lambda: make_cache(decoder.config, num_rows, num_slots, dtype)).num_bytes

    def line(name: str, now: int, before: int) -> str:
        instead = "" if now == before else f" instead of {before / MEBIBYTE:,.1f}"
        return f"{name}: {now / MEBIBYTE:,.1f} MiB{instead}"

    rows = f"cache of {num_rows} x {num_slots:,} positions"
    caches = of_cache(cache_dtype), of_cache(None)
    return "\n".join([line("weights", *weight_bytes(params)), line(rows, *caches)])
