"""AdamW with global-norm clipping, warm-up + cosine, and learning-rate multipliers by parameter name.

Everything here works on flat dicts `path -> array` that hold trainable parameters only, so nothing frozen ever has
optimiser state. The transformation yields the update direction; the train step multiplies it by minus the learning rate
of the step, so the schedule stays a pure function of the step number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vita_jax.errors import UserError

FlatParams = Mapping[str, jax.Array]

# Weight decay acts on matrices only, as in the original's trainer: not on biases, norm weights or layer scales.
DECAYED = re.compile(r"(^|/)(kernel|embedding)$")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Defaults are those of the original training scripts.

    Attributes:
      learning_rate: one peak rate for every stage in place of their own; None leaves each stage its `learning_rate`.
      beta1, beta2, epsilon: Adam's moments and the term added to the root of the second.
      weight_decay: times the learning rate, subtracted from matrices.
      clip_norm: gradients with a larger global norm are scaled down to it; None does not clip.
    """

    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """`ceil(ratio * total)`, the number of steps the rate takes to reach its peak."""
    return math.ceil(warmup_ratio * total_steps)


def warmup_cosine(step: Any, total_steps: int, warmup_ratio: float, peak: float, xp: Any = jnp) -> Any:
    """Learning rate of optimiser step `step` (from 0): linear from 0 over the warm-up, then half a cosine down to 0.

    Args:
      step: () or (n) integer.
      total_steps: steps of the stage.
      warmup_ratio: share of the steps that is warm-up.
      peak: largest rate.
      xp: `jax.numpy` inside a compiled step; `numpy` gives float64 on the host.

    Returns:
      Rate in the shape of `step`.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    rising = step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    falling = xp.maximum(0.0, 0.5 * (1.0 + xp.cos(math.pi * progress)))
    return peak * xp.where(xp.asarray(step) < warmup, rising, falling)


def learning_rate_multipliers(scales: tuple[tuple[str, float], ...], paths: list[str]) -> dict[str, float]:
    """The multiplier of every path: that of the first pattern that matches it (`re.search`), else 1.

    Raises:
      UserError: a pattern matches no trainable parameter, or is not a regular expression.
    """
    used: set[str] = set()
    multipliers = {}
    for path in paths:
        matching = [(pattern, scale) for pattern, scale in scales if _compile(pattern).search(path)]
        used.update(pattern for pattern, _ in matching)
        multipliers[path] = matching[0][1] if matching else 1.0
    for pattern, _ in scales:
        if pattern not in used:
            raise UserError(f"learning_rate_scale pattern {pattern!r} matches no trainable parameter of the stage")
    return multipliers


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}") from None


def make_optimizer(config: OptimizerConfig, multipliers: Mapping[str, float]) -> optax.GradientTransformation:
    """Clipping, Adam's direction, weight decay, multipliers; without the learning rate.

    Args:
      config: AdamW values.
      multipliers: flat path -> factor on the learning rate, for every trainable parameter.
    """
    decayed = {path: bool(DECAYED.search(path)) for path in multipliers}
    parts = [
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        _scale_by(dict(multipliers)),
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*parts)


def _scale_by(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies the update of each path by its constant."""

    def update(updates: FlatParams, state: Any, params: Any = None) -> tuple[dict[str, jax.Array], Any]:
        return {path: update * multipliers[path] for path, update in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
