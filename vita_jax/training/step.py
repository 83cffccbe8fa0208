"""The train step: a pure function of state, frozen parameters and batch.

Parameters are flat dicts `path -> array`, divided once per stage. Only the trainable ones are part of the state, so
frozen ones cannot change, get no gradient and no optimiser state. The state is donated; the frozen parameters are an
ordinary argument. A step with bad numbers (see `guard`) counts as a step but changes neither parameters nor optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from vita_jax.training.guard import LossWindow, choose, empty_window, is_spike, push_loss
from vita_jax.training.objectives.base import LossSums
from vita_jax.training.stages import unflatten

FlatParams = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[dict[str, Any], Mapping[str, jax.Array], jax.Array], LossSums]


@struct.dataclass
class TrainState:
    """What a step replaces.

    Attributes:
      step: () int32, number of finished steps.
      trainable: flat trainable parameters.
      opt_state: of the optimiser, for the trainable parameters only.
      rng: (2) uint32, raw key of the stage; every step folds its number in, so it never changes.
      window: what spikes of the loss are judged by; None where they are not.
    """

    step: jax.Array
    trainable: FlatParams
    opt_state: Any
    rng: jax.Array
    window: LossWindow | None = None


def init_state(
    trainable: FlatParams, optimizer: optax.GradientTransformation, rng: jax.Array, loss_window: int | None = None
) -> TrainState:
    """State before the first step; `loss_window`: losses that spikes are judged by, None = no judging."""
    window = None if loss_window is None else empty_window(loss_window)
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), rng, window)


def train_step(
    state: TrainState,
    frozen: FlatParams,
    batch: Mapping[str, jax.Array],
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    accumulation: int = 1,
    spike_factor: float | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimiser step.

    Args:
      state: see `TrainState`.
      frozen: flat parameters that do not train.
      batch: arrays (b ...), b a multiple of `accumulation`.
      loss_fn: (nested parameters, batch, key) -> sums over the batch.
      optimizer: update direction without learning rate (`make_optimizer`).
      schedule: step number -> learning rate.
      accumulation: micro-batches. Gradients of the summed loss are added and divided by the total count once, so the
        result is that of one large batch, however the tokens are spread.
      spike_factor: see `guard.GuardConfig`; needs a state with a window.

    Returns:
      The next state, and float32 scalars: loss, grad_norm (before clipping), param_norm (trainable parameters without
      statistics, which the objective sets itself), update_norm, lr, tokens (what the loss counts), skipped (1 for a bad
      step, whose update is left out, else 0), and the objective's own.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def summed_loss(trainable: FlatParams, part: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(unflatten({**frozen, **trainable}), part, key)
        return sums.loss, sums

    gradient = jax.grad(summed_loss, has_aux=True)
    if accumulation == 1:
        grads, sums = gradient(state.trainable, batch, key)
    else:
        grads, sums = _accumulate(gradient, state.trainable, _split(batch, accumulation), key, accumulation)
    count = jnp.maximum(sums.count, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    lr = schedule(state.step).astype(jnp.float32)
    loss, grad_norm = sums.loss / count, optax.tree.norm(grads)
    # Decided before the updates, like clipping: by what they are it would take another pass over all parameters.
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    window = state.window
    if window is not None:
        good &= ~is_spike(window, loss, spike_factor)
        window = push_loss(window, loss, good)
    direction, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    updates = jax.tree.map(lambda u: jnp.where(good, -lr * u, 0.0), direction)
    trainable = choose(good, optax.apply_updates(state.trainable, updates), state.trainable)
    learnt = {path: value for path, value in trainable.items() if path not in sums.updates}
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(learnt),
        "update_norm": optax.tree.norm(updates),
        "lr": lr,
        "tokens": sums.count,
        "skipped": 1.0 - good.astype(jnp.float32),
        **{name: total / jnp.maximum(number, 1.0) for name, (total, number) in sums.metrics.items()},
    }
    statistics = {path: value for path, value in _means(sums, accumulation).items() if path in trainable}
    trainable |= choose(good, statistics, {path: state.trainable[path] for path in statistics})
    opt_state = choose(good, opt_state, state.opt_state)
    return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, window=window), metrics


def _means(sums: LossSums, parts: int) -> FlatParams:
    return {path: total / parts for path, total in sums.updates.items()}


def _split(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """(b ...) -> (parts b/parts ...), taking every `parts`-th row, so that each device divides the rows it already
    holds.
    """
    return {name: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def _accumulate(
    gradient: Callable[..., tuple[FlatParams, LossSums]],
    trainable: FlatParams,
    parts: dict[str, jax.Array],
    key: jax.Array,
    number: int,
) -> tuple[FlatParams, LossSums]:
    """Sums of gradients and losses over micro-batches, one at a time."""

    def one(index: jax.Array, part: dict[str, jax.Array]) -> tuple[FlatParams, LossSums]:
        part = {name: nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1)) for name, x in part.items()}
        return gradient(trainable, part, jax.random.fold_in(key, index))

    indices = jnp.arange(number)
    shapes = jax.eval_shape(one, indices[0], jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(
        totals: tuple[FlatParams, LossSums], part: tuple[jax.Array, dict]
    ) -> tuple[tuple[FlatParams, LossSums], None]:
        return jax.tree.map(jnp.add, totals, one(*part)), None

    totals, _ = jax.lax.scan(body, zeros, (indices, parts))
    return totals
