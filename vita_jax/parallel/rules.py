"""Where every dimension of every parameter lives: ONE table from logical axis names to mesh axes, and its checks.

Modules name the axes of their parameters (`embed`, `q_heads`, ...) where they create them; nothing else about layout is
written in a model. A different recipe for other hardware is another table with the same keys.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vita_jax.errors import UserError
from vita_jax.parallel.mesh import BATCH_AXES, PARAMETER_AXES, MeshConfig

# Parameters with at most so many numbers (4 MiB) need not be cut: biases, norms, the narrow layers of a codec.
SMALL_PARAMETER = 1 << 20

Rules = Mapping[str, str | tuple[str, ...] | None]

LOGICAL_RULES: Rules = {
    # activations
    "batch": BATCH_AXES,
    "length": "context",
    # parameters
    "embed": "fsdp",
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "vocab": "tensor",
    "layers": None,
    "patch": None,
    "audio_frames": None,
    "codebook": None,
}


def partition_spec(
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    path: str,
    rules: Rules = LOGICAL_RULES,
) -> PartitionSpec:
    """The mesh axes of one parameter. A dimension that the mesh does not divide stays whole if the parameter is small.

    Args:
      names: logical name of each dimension (None: never cut).
      shape: sizes of the dimensions.
      mesh: device mesh; an axis of size 1 is never a conflict.
      path: name of the parameter, for messages.
      rules: logical name -> mesh axis or axes.

    Raises:
      UserError: a logical name is not in the table; two dimensions fall on one mesh axis; a dimension of a parameter
        that is not small is not divisible.
    """
    if len(names) != len(shape):
        raise UserError(f"parameter {path} has shape {shape} but logical axes {names}")
    spec: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise UserError(f"parameter {path}: logical axis {name!r} is not in the rule table ({', '.join(rules)})")
        axes = _as_tuple(rules[name] if name is not None else None)
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        for axis in axes:
            if axis in taken:
                raise UserError(
                    f"parameter {path} {names}: dimensions {taken[axis]!r} and {name!r} both fall on "
                    f"mesh axis {axis!r}; give one of them another logical name or rule"
                )
            taken[axis] = str(name)
        shards = int(np.prod([mesh.shape[axis] for axis in axes]))
        if size % shards and np.prod(shape) <= SMALL_PARAMETER:
            axes = ()
        elif size % shards:
            raise UserError(
                f"parameter {path}: dimension {name!r} of size {size} cannot be cut in {shards} parts "
                f"(mesh axis {', '.join(axes)}); choose a size of --config.mesh.{axes[0]} that divides it"
            )
        spec.append(axes[0] if len(axes) == 1 else (axes or None))
    return PartitionSpec(*spec)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def param_shardings(abstract_boxed: Any, mesh: Mesh, rules: Rules = LOGICAL_RULES) -> Any:
    """Shardings of a parameter tree.

    Args:
      abstract_boxed: what `jax.eval_shape(model.init, ...)["params"]` returns: `ShapeDtypeStruct`s in Linen's metadata
        boxes.
      mesh: device mesh.
      rules: logical name -> mesh axes.

    Returns:
      The same nested dict with a `NamedSharding` per parameter. A parameter without metadata is whole on every device.
    """
    specs = nn.get_partition_spec(abstract_boxed)
    shapes = unbox(abstract_boxed)

    def resolve(path: Any, shape: jax.ShapeDtypeStruct, names: PartitionSpec) -> NamedSharding:
        names = tuple(names) + (None,) * (len(shape.shape) - len(names))
        return NamedSharding(mesh, partition_spec(names, shape.shape, mesh, "/".join(key.key for key in path), rules))

    return jax.tree_util.tree_map_with_path(resolve, shapes, specs, is_leaf=lambda x: x is None)


def check_whole(abstract_boxed: Any, mesh: Mesh, config: MeshConfig, rules: Rules = LOGICAL_RULES) -> None:
    """Refuses large parameters that would lie whole on every device of a mesh that cuts parameters.

    Args:
      abstract_boxed, mesh, rules: as `param_shardings`.
      config: how large is too large, and which parameters may.

    Raises:
      UserError: names the parameter and its logical axes; or a pattern of the configuration is no regular expression.
    """
    used = {axis: mesh.shape[axis] for axis in PARAMETER_AXES if mesh.shape[axis] > 1}
    if not used:
        return
    try:
        allowed = [re.compile(pattern) for pattern in config.may_be_whole]
    except re.error as error:
        raise UserError(f"mesh.may_be_whole={config.may_be_whole}: no regular expression: {error}") from None
    logical = nn.get_partition_spec(abstract_boxed)
    shardings, shapes = param_shardings(abstract_boxed, mesh, rules), unbox(abstract_boxed)

    def check(path: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding, names: PartitionSpec) -> None:
        name, mib = "/".join(key.key for key in path), math.prod(shape.shape) * shape.dtype.itemsize / 2**20
        if mib <= config.max_whole_mib or any(sharding.spec) or any(pattern.search(name) for pattern in allowed):
            return
        described = " x ".join(f"{axis} {size}" for axis, size in used.items())
        raise UserError(
            f"parameter {name} with logical axes {tuple(names)} has {mib:.0f} MiB and would lie whole on every device: "
            f"none of them is cut by the mesh ({described}). Use a mesh axis that cuts one (see rules.LOGICAL_RULES; "
            f"--config.mesh.fsdp cuts most parameters), or allow it by --config.mesh.may_be_whole=PATTERN or "
            f"--config.mesh.max_whole_mib (now {config.max_whole_mib})"
        )

    jax.tree_util.tree_map_with_path(check, shapes, shardings, logical, is_leaf=lambda x: x is None)


def unbox(tree: Any) -> Any:
    """Strips Linen's metadata boxes without touching the layout of the values."""
    return jax.tree.map(
        lambda x: x.unbox(apply_constraint=False) if isinstance(x, nn.LogicallyPartitioned) else x,
        tree,
        is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = LOGICAL_RULES) -> Iterator[Mesh]:
    """Makes the mesh and the rule table current: `nn.with_logical_constraint` in the models then fixes layouts by
    name.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield mesh
