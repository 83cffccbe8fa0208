"""Adapters (LoRA) in the stages: which leaves a stage adds, and what becomes of those that it starts from.

A stage with `lora` trains low-rank updates of the layers its `targets` name, and freezes their kernels, so gradients
and the optimiser's state are a small part of the model's. Adapters are parameters like others: they lie as their
kernels do, are saved beside them at every checkpoint and stay there when the stage ends. What starts from there
  * with the same adapters, goes on with them;
  * without `lora`, has them merged: `kernel + scale * A B`, once, in float32;
  * with adapters of another rank, scale or other layers, is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.lora import KERNEL, LoraConfig, Site, adapter_axes, find_sites, init_adapters, is_adapter, merge
from vita_jax.nn.layers import LORA_DOWN, LORA_SCALE, LORA_UP
from vita_jax.training.families import ModelConfig, weight_table
from vita_jax.training.stages import Stage, flatten, unflatten

FlatParams = dict[str, jax.Array]
Say = Callable[[str], object]

# Objectives that run the language model, and the layers that run in them. The loss takes the output head apart.
OBJECTIVES_WITH_LANGUAGE = ("language_modeling", "text_pretraining")
ADAPTABLE = re.compile(r"^(language/layers|vision|projector|audio|state_head)/")


def adapter_sites(model: ModelConfig, lora: LoraConfig) -> tuple[Site, ...]:
    """The layers that get adapters.

    Raises:
      UserError: a target matches no linear layer.
      UnsupportedOption: it matches one that a step of the language model does not run through.
    """
    sites = find_sites(weight_table(model), lora.targets)
    for site in sites:
        if not ADAPTABLE.search(site.path):
            raise UnsupportedOption(
                f"lora.targets={','.join(lora.targets)}: no adapter of {site.path} is trained; narrow the targets to "
                "layers below language/layers, vision, projector, audio and state_head"
            )
    return sites


def check_objective(stage: Stage) -> None:
    """Raises `UnsupportedOption` if the stage has adapters but does not train the language model."""
    if stage.lora is not None and stage.objective not in OBJECTIVES_WITH_LANGUAGE:
        raise UnsupportedOption(
            f"stages.{stage.name}.lora: adapters are for stages of the language model "
            f"({', '.join(OBJECTIVES_WITH_LANGUAGE)}), not for objective {stage.objective!r}; set lora to none"
        )


def with_adapters(boxed: Mapping[str, Any], model: ModelConfig, lora: LoraConfig | None) -> dict[str, Any]:
    """The tree of a stage's parameters with its adapters, from shapes alone.

    Args:
      boxed: `ShapeDtypeStruct`s in Linen's boxes, of the parameters without adapters.
      model: whose layers they are.
      lora: of the stage; None adds nothing.

    Returns:
      The same tree with boxes for the adapters: inputs and outputs have the logical axes of their kernel.

    Raises:
      UserError: see `adapter_sites`.
    """
    if lora is None:
        return dict(boxed)
    leaves, sites = flatten(boxed), adapter_sites(model, lora)
    shapes = jax.eval_shape(lambda key: _drawn(model, lora, key), jax.random.key(0))
    for site in sites:
        kernel = leaves[site.path + KERNEL]
        names = kernel.names if isinstance(kernel, nn.LogicallyPartitioned) else (None,) * len(kernel.shape)
        for path, axes in adapter_axes(site, names).items():
            leaves[path] = nn.LogicallyPartitioned(shapes[path], axes)
    return unflatten(leaves)


def draw_adapters(
    model: ModelConfig, lora: LoraConfig, key: jax.Array, shardings: Mapping[str, NamedSharding]
) -> FlatParams:
    """New adapters in their layout; they change nothing until they are trained.

    Args:
      model, lora: as `with_adapters`.
      key: random key.
      shardings: path -> layout, of at least the adapters.
    """
    draw = functools.partial(_drawn, model, lora)
    layout = {path: shardings[path] for path in jax.eval_shape(draw, key)}
    return jax.jit(draw, out_shardings=layout)(key)


def _drawn(model: ModelConfig, lora: LoraConfig, key: jax.Array) -> FlatParams:
    return flatten(init_adapters(weight_table(model), lora, key))


def adapter_layout(shapes: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """Adds the layout of adapters that a checkpoint has and the stage has not: that of their kernels.

    Args:
      shapes: path -> shape of what the checkpoint holds.
      shardings: path -> layout of the stage's parameters.
    """
    layout = dict(shardings)
    for layer in layers_of(shapes):
        kernel = shardings.get(layer + KERNEL)
        if kernel is None or f"{layer}/{LORA_DOWN}" in layout:
            continue
        down, up, stack = (len(shapes[f"{layer}/{leaf}"].shape) for leaf in (LORA_DOWN, LORA_UP, LORA_SCALE))
        behind_inputs = down - 1
        axes = (*kernel.spec, *(None,) * (behind_inputs + up - stack - 1 - len(kernel.spec)))
        specs = {
            LORA_DOWN: (*axes[:behind_inputs], None),
            LORA_UP: (*axes[:stack], None, *axes[behind_inputs:]),
            LORA_SCALE: axes[:stack],
        }
        layout |= {f"{layer}/{leaf}": NamedSharding(kernel.mesh, PartitionSpec(*spec)) for leaf, spec in specs.items()}
    return layout


def layers_of(flat: Mapping[str, Any]) -> list[str]:
    """The layers that have adapters among these parameters."""
    return list(dict.fromkeys(path.rpartition("/")[0] for path in flat if is_adapter(path)))


def settle_adapters(
    stage: Stage, loaded: FlatParams, planned: Mapping[str, Any], where: object, say: Say
) -> FlatParams:
    """What a stage makes of the adapters of the parameters it starts from; see the top of this file.

    Args:
      stage: which starts.
      loaded: flat parameters in float32.
      planned: path -> shape of the stage's parameters.
      where: they were loaded from, for messages.
      say: takes a line about what is done.

    Raises:
      UserError: the stage has other adapters.
    """
    layers = layers_of(loaded)
    if not layers:
        return loaded
    if stage.lora is None:
        say(f"{stage.title}: the adapters of {where} are merged into {len(layers)} kernels\n")
        return merged(loaded)
    found = {path: tuple(leaf.shape) for path, leaf in loaded.items() if is_adapter(path)}
    wanted = {path: tuple(leaf.shape) for path, leaf in planned.items() if is_adapter(path)}
    scales = [loaded[f"{layer}/{LORA_SCALE}"] for layer in layers]
    if found != wanted or not all(bool(jnp.all(scale == np.float32(stage.lora.scale))) for scale in scales):
        rank = loaded[f"{layers[0]}/{LORA_DOWN}"].shape[-1]
        raise UserError(
            f"stages.{stage.name}.lora has rank {stage.lora.rank} and scale {stage.lora.scale:g} for "
            f"{len(layers_of(wanted))} layers, but {where} has adapters with rank {rank} and scale "
            f"{float(jnp.max(scales[0])):g} for {len(layers)} layers ({layers[0]}, ...); go on with the same, or merge "
            "them first: a stage with lora=none does, and so does `vita_jax.convert export --layout vita_jax`"
        )
    say(f"{stage.title}: goes on with the adapters of {where}\n")
    return loaded


def merged(flat: FlatParams) -> FlatParams:
    """Parameters without adapters that are the same model: `merge` layer by layer, each in place of its kernel."""
    leaves = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for layer in layers_of(flat):
        path = layer + KERNEL
        if path not in leaves:
            raise UserError(f"there are adapters for {layer}, but the model has no {path}")
        own = {name: flat[name] for name in (f"{layer}/{leaf}" for leaf in (LORA_DOWN, LORA_UP, LORA_SCALE))}
        add = jax.jit(_merged_kernel, donate_argnums=0, out_shardings={path: leaves[path].sharding})
        leaves |= add({path: leaves[path]}, own)
    return leaves


def _merged_kernel(kernel: FlatParams, adapter: FlatParams) -> FlatParams:
    return flatten(merge(unflatten(kernel), unflatten(adapter)))
