"""AdamW, Muon or Adafactor with global-norm clipping, warm-up + cosine, and learning-rate multipliers by name.

Everything here works on flat dicts `path -> array` that hold trainable parameters only, so nothing frozen ever has
optimiser state. The transformation yields the update direction; the train step multiplies it by minus the learning rate
of the step, so the schedule stays a pure function of the step number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from vita_jax.errors import UserError

FlatParams = Mapping[str, jax.Array]
Moments = Literal["float32", "bfloat16"]
MOMENTS = list(get_args(Moments))

# Weight decay acts on matrices only, as in the original's trainer: not on biases, norm weights or layer scales.
DECAYED = re.compile(r"(^|/)(kernel|embedding|lora_[ab])$")

# Muon is for the matrices inside of a model; what gives logits is none of them, nor is an embedding.
KERNEL = re.compile(r"(^|/)kernel(_v)?$")
LOGITS = re.compile(r"(^|/)(\w*head|ctc_lo|router)/kernel$")
HEADS_OUT = re.compile(r"(^|/)(q_proj|k_proj|v_proj|pos_proj|qkv)/kernel$")  # one axis in, several out
SCANNED, EXPERTS = "layers", "moe"  # parameters below them have one more axis in front: layer, expert
MUON_RMS = 0.2  # of an update's entries: that of AdamW in practice (arXiv 2502.16982, section 2.2)

# Adafactor (arXiv 1804.04235): the largest root mean square of a parameter's update (section 6), and the decay 1 -
# t**-0.8 of its second moments (section 7.2). The learning rate is the stage's, not one relative to the parameters.
LARGEST_RMS, DECAY_EXPONENT = 1.0, 0.8


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What all stages share. Defaults are those of the original training scripts.

    Attributes:
      learning_rate: one peak rate for every stage in place of their own; None leaves each stage its `learning_rate`.
      beta1, beta2, epsilon: Adam's moments and the term added to the root of the second.
      muon_beta: the momentum of the parameters that a stage trains by Muon.
      weight_decay: times the learning rate, subtracted from matrices.
      clip_norm: gradients with a larger global norm are scaled down to it; None does not clip.
      moments: how Adam's moments and Muon's momentum are stored. "bfloat16" takes half the memory; Adam's are computed
        in float32 all the same, and its second ones rounded up or down at random (see `_adam`).
    """

    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    muon_beta: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    moments: Moments = "float32"


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


def warmup_constant(step: Any, warmup: int, peak: float, xp: Any = jnp) -> Any:
    """Learning rate of optimiser step `step` (from 0): linear from 0 over `warmup` steps, then `peak`.

    Args:
      step: () or (n) integer.
      warmup: steps it takes to reach the peak.
      peak: largest rate.
      xp: as in `warmup_cosine`.
    """
    return peak * xp.minimum(1.0, xp.asarray(step) / max(1, warmup))


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


def make_optimizer(
    config: OptimizerConfig,
    multipliers: Mapping[str, float],
    matrices: Mapping[str, MuonDimensionNumbers] | None = None,
    *,
    factored: bool = False,
    decayed: re.Pattern[str] = DECAYED,
) -> optax.GradientTransformation:
    """Clipping, the direction of Adam, Muon or Adafactor, weight decay, multipliers; without the learning rate.

    Args:
      config: values of all.
      multipliers: flat path -> factor on the learning rate, for every trainable parameter.
      matrices: what Muon trains, see `muon_matrices`; None: Adam trains everything.
      factored: Adafactor trains everything instead.
      decayed: of the paths that weight decay acts on.
    """
    decays = {path: bool(decayed.search(path)) for path in multipliers}
    direction = _adafactor() if factored else _adam(config)
    if matrices is not None:
        direction = _divided(direction, _muon(config, dict(matrices)), frozenset(matrices))
    parts = [
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        _scale_by(dict(multipliers)),
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*parts)


def _adafactor() -> optax.GradientTransformation:
    """Adafactor's direction: second moments of a matrix by its rows and columns, no first ones."""
    return optax.chain(optax.scale_by_factored_rms(decay_rate=DECAY_EXPONENT), optax.clip_by_block_rms(LARGEST_RMS))


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction, with moments stored as the config says.

    With `beta2` 0.999 a second moment falls by at most a thousandth in a step, less than half of what bfloat16 can tell
    apart (2**-8): rounded to the nearest it would never fall. Rounded at random, up as often as the remainder says, it
    is right on average. The randomness is a function of the step's number, so a run stays reproducible.
    """
    if config.moments == "float32":
        return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)

    def init(params: FlatParams) -> optax.ScaleByAdamState:
        zeros = {path: jnp.zeros(leaf.shape, jnp.bfloat16) for path, leaf in params.items()}
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, dict(zeros))

    def update(
        updates: FlatParams, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[dict[str, jax.Array], optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        key = jax.random.fold_in(jax.random.key(0), count)
        first_scale, second_scale = (1 - beta ** count.astype(jnp.float32) for beta in (config.beta1, config.beta2))
        direction, first, second = {}, {}, {}
        for number, (path, grad) in enumerate(sorted(updates.items())):
            mu = config.beta1 * state.mu[path].astype(jnp.float32) + (1 - config.beta1) * grad
            nu = config.beta2 * state.nu[path].astype(jnp.float32) + (1 - config.beta2) * jnp.square(grad)
            direction[path] = mu / first_scale / (jnp.sqrt(nu / second_scale) + config.epsilon)
            first[path] = mu.astype(jnp.bfloat16)
            second[path] = round_at_random(nu, jax.random.fold_in(key, number))
        return direction, optax.ScaleByAdamState(count, first, second)

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 next to it, to either with the probability that makes `x` the mean.

    Args:
      x: finite, any shape.
      key: draws.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The lower half of the bits is what bfloat16 drops; a random number on top carries into the upper half.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)


def muon_matrices(shapes: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers]:
    """The parameters that Muon trains, and which of their axes are a matrix's inputs and outputs.

    Kernels of linear layers and convolutions (all taps count as inputs), of weight norm the direction; without
    embeddings, what gives logits, and convolutions from or to a single channel. Layers that are scanned, and experts,
    are matrices of their own.

    Args:
      shapes: flat path -> array or shape.
    """
    matrices = {}
    for path, leaf in shapes.items():
        if not KERNEL.search(path) or LOGITS.search(path):
            continue
        axes = tuple(range(sum(name in path.split("/") for name in (SCANNED, EXPERTS)), len(leaf.shape)))
        heads = bool(HEADS_OUT.search(path))
        if len(axes) < 2 or (not heads and min(leaf.shape[-2:]) == 1):
            continue
        cut = 1 if heads else len(axes) - 1
        matrices[path] = MuonDimensionNumbers(axes[:cut], axes[cut:])
    return matrices


def _muon(config: OptimizerConfig, matrices: dict[str, MuonDimensionNumbers]) -> optax.GradientTransformation:
    """Muon's direction (Jordan, 2024), scaled so that its entries are as large as Adam's whatever the shape."""

    def scale(updates: FlatParams, state: Any, params: Any = None) -> tuple[dict[str, jax.Array], Any]:
        def factor(path: str, update: jax.Array) -> float:
            ins, outs = (math.prod(update.shape[axis] for axis in axes) for axes in matrices[path])
            return MUON_RMS * max(ins, outs) ** 0.5

        return {path: update * factor(path, update) for path, update in updates.items()}, state

    direction = scale_by_muon(
        beta=config.muon_beta, mu_dtype=jnp.dtype(config.moments), weight_dimension_numbers=matrices
    )
    return optax.chain(direction, optax.GradientTransformation(lambda params: optax.EmptyState(), scale))


def _divided(
    one: optax.GradientTransformation, other: optax.GradientTransformation, others: frozenset[str]
) -> optax.GradientTransformation:
    """`one` for all parameters but `others`, which the other transformation has."""

    def split(flat: FlatParams) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        first = {path: leaf for path, leaf in flat.items() if path not in others}
        return first, {path: leaf for path, leaf in flat.items() if path in others}

    def init(params: FlatParams) -> dict[str, Any]:
        first, second = split(params)
        return {"adam": one.init(first), "muon": other.init(second)}

    def update(updates: FlatParams, state: dict[str, Any], params: Any = None) -> tuple[dict[str, jax.Array], Any]:
        first, second = split(updates)
        first, adam = one.update(first, state["adam"])
        second, muon = other.update(second, state["muon"])
        return {**first, **second}, {"adam": adam, "muon": muon}

    return optax.GradientTransformation(init, update)


def _scale_by(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies the update of each path by its constant."""

    def update(updates: FlatParams, state: Any, params: Any = None) -> tuple[dict[str, jax.Array], Any]:
        return {path: update * multipliers[path] for path, update in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
