"""What functions that are written for devices ask about the current mesh (`jax.set_mesh`)."""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh

MeshAxes = str | tuple[str, ...] | None


def used_axes(mesh: AbstractMesh, axes: MeshAxes) -> tuple[str, ...]:
    """Those of the named mesh axes that really cut something: in the mesh, and of more than one device."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def num_parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    """In how many parts these axes cut."""
    return math.prod(mesh.shape[axis] for axis in axes)


def platform_of(mesh: AbstractMesh) -> str:
    """ "tpu", "gpu" or "cpu": of the mesh's devices, or of JAX's default backend where the mesh names none."""
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
