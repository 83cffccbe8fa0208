"""Low-rank adaptation (LoRA, arXiv 2106.09685) of any linear layers, as functions on parameter trees.

    y = x W + scale * (x A) B,   scale = alpha / rank

An adapter is three leaves beside the kernel it changes: `lora_a` (*stack *inputs r), `lora_b` (*stack r *outputs) and
`lora_scale` (*stack); `stack` are the leading axes of layers and experts. `nn.Dense` and the experts use them when they
find them, so a model with adapters is the same module with a larger tree. `vita_jax.training.adapters` trains them.
Adapters start at zero: A as `torch.nn.Linear` draws it, B zero (as `peft` does).

Which leaves are linear layers, and which of their axes are inputs, is read from the model's weight table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vita_jax.conversion.tables import Rule, Table, flatten, unflatten
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.nn.layers import KERNEL_SCALE, LORA_DOWN, LORA_SCALE, LORA_UP

KERNEL = "/kernel"
LEAVES = (LORA_DOWN, LORA_UP, LORA_SCALE)

# All projections of the language model but its head, of a bare decoder or inside VITA.
LANGUAGE_MODEL = r"^(language/)?layers/(attention/[qkvo]_proj|(mlp|moe)/(gate|up|down)_proj)$"
# The router of a mixture of experts, which the original adapts as well.
ROUTER = r"^(language/)?layers/moe/router$"

Params = Mapping[str, Any]


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how much.

    Attributes:
      rank: r.
      alpha: the update is multiplied by alpha / rank.
      targets: regular expressions searched in the paths of layers, such as `language/layers/attention/q_proj`.
      dropout: of what an adapter reads, which peft offers; here it is 0.
    """

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] = (LANGUAGE_MODEL,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"LoRA alpha {self.alpha:g} must be above 0")
        if self.dropout:
            raise UnsupportedOption(f"LoRA dropout {self.dropout:g} is not offered; set lora.dropout to 0")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(path: str) -> bool:
    """Whether a parameter is a part of an adapter."""
    return _leaf_of(path) in LEAVES


@dataclass(frozen=True)
class Site:
    """A linear layer, or a stack of them, that can have an adapter.

    Attributes:
      path: of the layer in the parameter tree; its kernel is `<path>/kernel`, (*stack *inputs *outputs).
      torch: name of the layer in the checkpoint, with `{i}` and `{e}` as in its rule.
      layers, experts: of the rule.
      inputs, outputs: axes of the kernel behind the stacked ones.
    """

    path: str
    torch: str
    layers: int | None
    experts: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the leaves: (), (l) or (l e)."""
        return tuple(number for number in (self.layers, self.experts) if number is not None)


def linear_sites(table: Table) -> tuple[Site, ...]:
    """Every linear layer of a model."""
    sites = (_site_of(rule) for rule in table.rules)
    return tuple(site for site in sites if site is not None)


def _site_of(rule: Rule) -> Site | None:
    if not (rule.path.endswith(KERNEL) and rule.torch.endswith(".weight") and len(rule.torch_shape) == 2):
        return None
    shape, size = rule.param_shape, rule.torch_shape[1]
    # Axes of the inputs come first; where one of the others has size 1 it does not matter to which side it goes.
    number = next((n for n in range(len(shape) + 1) if math.prod(shape[:n]) == size), None)
    if number is None:
        return None
    path, torch = rule.path.removesuffix(KERNEL), rule.torch.removesuffix(".weight")
    return Site(path, torch, rule.layers, rule.experts, shape[:number], shape[number:])


def find_sites(table: Table, targets: Sequence[str]) -> tuple[Site, ...]:
    """The linear layers whose path one of the patterns is found in.

    Args:
      table: the weight table of the model.
      targets: regular expressions, see `LoraConfig.targets`.

    Raises:
      UserError: a pattern is no regular expression or matches no linear layer, or there is no pattern.
    """
    if not targets:
        raise UserError("LoRA has no target: give at least one pattern in `targets`")
    sites = linear_sites(table)
    chosen: set[str] = set()
    for pattern in targets:
        try:
            matching = {site.path for site in sites if re.search(pattern, site.path)}
        except re.error as error:
            raise UserError(f"LoRA target {pattern!r} is not a regular expression: {error}") from None
        if not matching:
            some = ", ".join(site.path for site in sites[:4])
            raise UserError(f"LoRA target {pattern!r} matches no linear layer; layers are named like {some}")
        chosen |= matching
    return tuple(site for site in sites if site.path in chosen)


def init_adapters(table: Table, config: LoraConfig, key: jax.Array) -> dict[str, Any]:
    """New adapters, a nested tree that holds nothing but the leaves of adapters, in float32.

    Args:
      table: the weight table of the model.
      config: rank, alpha and targets.
      key: random key.

    Raises:
      UserError: see `find_sites`.
    """
    sites = find_sites(table, config.targets)
    leaves = {}
    for site, site_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        bound = math.prod(site.inputs) ** -0.5
        shape = (*site.stack, *site.inputs, config.rank)
        leaves[f"{site.path}/{LORA_DOWN}"] = jax.random.uniform(site_key, shape, jnp.float32, -bound, bound)
        leaves[f"{site.path}/{LORA_UP}"] = jnp.zeros((*site.stack, config.rank, *site.outputs), jnp.float32)
        leaves[f"{site.path}/{LORA_SCALE}"] = jnp.full(site.stack, config.scale, jnp.float32)
    return unflatten(iter(leaves.items()))


def adapter_axes(site: Site, kernel_axes: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
    """Logical axis names of a site's leaves by path, from those of its kernel; the rank is never cut."""
    first_input = len(site.stack)
    first_output = first_input + len(site.inputs)
    stack, inputs = tuple(kernel_axes[:first_input]), tuple(kernel_axes[first_input:first_output])
    names = ((*stack, *inputs, None), (*stack, None, *kernel_axes[first_output:]), stack)
    return {f"{site.path}/{leaf}": axes for leaf, axes in zip(LEAVES, names, strict=True)}


def attach(params: Params, adapters: Params) -> dict[str, Any]:
    """The tree of the model with its adapters, for training and for a forward pass that keeps them apart.

    Raises:
      UserError: an adapter whose layer the model lacks or whose shape does not fit, or the model has adapters already.
    """
    leaves = flatten(params)
    present = [path for path in leaves if is_adapter(path)]
    if present:
        raise UserError(f"the model has adapters already ({present[0]}, ...); merge or detach them first")
    for path, (down, up, scale) in _by_layer(adapters).items():
        _check_fits(path, leaves, down, up, scale)
    return unflatten(iter({**leaves, **flatten(adapters)}.items()))


def detach(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inverse of `attach`: the tree of the model alone, and that of the adapters."""
    leaves = flatten(params)
    adapters = {path: leaf for path, leaf in leaves.items() if is_adapter(path)}
    base = {path: leaf for path, leaf in leaves.items() if path not in adapters}
    return unflatten(iter(base.items())), unflatten(iter(adapters.items()))


def merge(params: Params, adapters: Params) -> dict[str, Any]:
    """The model with every adapter added to its kernel: the same function without adapters.

    Args:
      params: parameters of the model alone.
      adapters: see `init_adapters`.

    Returns:
      A new tree. Sums are made in float32 and have the dtype of the kernel.

    Raises:
      UserError: see `attach`.
    """
    return _add_updates(params, adapters, 1.0)


def unmerge(params: Params, adapters: Params) -> dict[str, Any]:
    """Inverse of `merge`, up to rounding."""
    return _add_updates(params, adapters, -1.0)


def _add_updates(params: Params, adapters: Params, sign: float) -> dict[str, Any]:
    leaves = flatten(params)
    for path, (down, up, scale) in _by_layer(adapters).items():
        _check_fits(path, leaves, down, up, scale)
        kernel, rank = leaves[path + KERNEL], down.shape[-1]
        update = jnp.matmul(
            jnp.reshape(down, (*scale.shape, -1, rank)).astype(jnp.float32),
            jnp.reshape(up, (*scale.shape, rank, -1)).astype(jnp.float32) * scale[(...,) + (None,) * 2],
            precision="highest",
        )
        changed = kernel.astype(jnp.float32) + sign * update.reshape(kernel.shape)
        leaves[path + KERNEL] = changed.astype(kernel.dtype)
    return unflatten(iter(leaves.items()))


def _leaf_of(path: str) -> str:
    return path.rpartition("/")[2]


def _by_layer(adapters: Params) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Path of a layer -> its three leaves."""
    leaves = flatten(adapters)
    stray = sorted(path for path in leaves if not is_adapter(path))
    if stray:
        raise UserError(f"{stray[0]} is not a part of an adapter; adapters consist of {', '.join(LEAVES)}")
    layers = dict.fromkeys(path.rpartition("/")[0] for path in leaves)
    missing = [f"{layer}/{leaf}" for layer in layers for leaf in LEAVES if f"{layer}/{leaf}" not in leaves]
    if missing:
        raise UserError(f"the adapters lack {', '.join(missing[:4])}")
    return {layer: tuple(leaves[f"{layer}/{leaf}"] for leaf in LEAVES) for layer in layers}


def _check_fits(path: str, leaves: Params, down: jax.Array, up: jax.Array, scale: jax.Array) -> None:
    if path + KERNEL not in leaves:
        raise UserError(f"there are adapters for {path}, but the model has no {path}{KERNEL}")
    if f"{path}/{KERNEL_SCALE}" in leaves:
        raise UserError(f"{path} is int8, for inference; adapters go to, and are merged into, weights that are floats")
    shape, stack = tuple(leaves[path + KERNEL].shape), scale.ndim
    got = (*down.shape[:-1], *up.shape[stack + 1 :])
    if got != shape or down.shape[-1] != up.shape[stack] or up.shape[:stack] != scale.shape:
        raise UserError(
            f"the adapter of {path} has {LORA_DOWN} {tuple(down.shape)} and {LORA_UP} {tuple(up.shape)}, which do not "
            f"make an update of the kernel {shape}; it was made for another model"
        )
