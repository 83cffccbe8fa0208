"""The device mesh. Its five axes are always present, of size 1 when unused, so all machines run the same code.

Axes:
  data      copies of the model, each with its own part of the batch
  fsdp      part of the batch as well; parameters are cut along their `embed` dimension
  expert    part of the batch outside the experts, and the experts themselves (mixture-of-experts models)
  tensor    heads, feed-forward width and vocabulary
  context   sequence length
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vita_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")
PARAMETER_AXES = ("fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis, and what may not be cut.

    Attributes:
      data: -1 takes all devices the other axes leave.
      fsdp, expert, tensor, context: see the top of this file.
      max_whole_mib: where parameters are cut at all (fsdp, expert or tensor above 1), one that is larger than so many
        MiB and still lies whole on every device is an error: `rules.check_whole`.
      may_be_whole: patterns of parameter paths that this is right for.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1
    max_whole_mib: int = 64
    may_be_whole: tuple[str, ...] = ()


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes in the order of `MESH_AXES`.

    Raises:
      UserError: an axis is not positive, or the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size < 1 and not (axis == "data" and size == -1):
            raise UserError(
                f"mesh.{axis}={size}: must be at least 1" + (" (or -1 for the rest)" if axis == "data" else "")
            )
    others = int(np.prod([size for axis, size in sizes.items() if axis != "data"]))
    if sizes["data"] == -1:
        sizes["data"] = max(num_devices // others, 1)
    total = sizes["data"] * others
    if total != num_devices:
        described = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh {described} needs {total} devices but {num_devices} are available; change --config.mesh.*"
        )
    return tuple(sizes[axis] for axis in MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them). Use it with `with jax.set_mesh(mesh):`.

    Axis types are Auto: Linen layers with partitioned initialisers do not trace under explicit axes.

    Raises:
      UserError: `mesh_shape` does, or the devices are of several slices of TPUs.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise UserError(f"the devices are of {len(slices)} slices, but a mesh has room for one; start on one slice")
    # Only where no axis of the machine is as long: 8 experts on a torus of 16 x 16.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The same mesh of devices that are not there, for shapes and layouts alone."""
    return AbstractMesh(mesh_shape(config, num_devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """In how many parts the batch is cut: data x fsdp x expert."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data x fsdp x expert, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_processes(mesh: Mesh) -> None:
    """Raises UserError unless each process has an equal part of a batch's rows that no other one has: so is the data
    shared out.
    """
    shards = num_batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    if any(len(own) * len(rows) != shards for own in rows.values()) or len(set().union(*rows.values())) != shards:
        raise UserError(
            f"the mesh divides a batch in {shards} parts (data x fsdp x expert), of which {len(rows)} processes cannot "
            "have their own; give --config.mesh.tensor and --config.mesh.context no more than the devices of a process"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays (b ...), this process's rows, to device arrays (all rows) sharded over the batch axes of the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(x)) for name, x in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Host arrays to device arrays that are whole on every device."""
    return jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)), tree)
