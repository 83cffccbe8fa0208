"""Machines by name: `v5p:4x4x4` is a slice of 64 TPU chips that the compiler knows, `h100:16` are 16 GPUs."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from vita_jax.errors import UserError
from vita_jax.parallel.chips import CHIPS, Chip

# What the TPU compiler calls them. Two devices of a tpu7x are one chip; all others show a chip as one device.
TPU_NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that work together.

    Attributes:
      name: as asked for.
      chip: what one of them can do.
      num_chips: how many there are.
      devices: what the compiler compiles for; empty for GPUs, for which there is no compiler here.
    """

    name: str
    chip: Chip
    num_chips: int
    devices: Sequence[jax.Device] = ()

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them, which is what a mesh is made of."""
        return self.num_chips * self.chip.devices


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and extents of a name such as `v5p:4x4x4` or `h100:16`.

    Raises:
      UserError: not of that form, or no such chip.
    """
    match = re.fullmatch(r"([A-Za-z0-9-]+):(\d+(?:x\d+)*)", text)
    if match is None:
        raise UserError(f"--topology={text}: write CHIP:SHAPE, for example v5p:4x4x4, v5e:8x8 or h100:16")
    name = match[1].lower()
    if name not in CHIPS:
        raise UserError(f"--topology={text}: chip {match[1]!r} is unknown; known: {', '.join(CHIPS)}")
    extents = tuple(int(extent) for extent in match[2].split("x"))
    if math.prod(extents) < 1:
        raise UserError(f"--topology={text}: every extent must be at least 1")
    return CHIPS[name], extents


def open_topology(text: str) -> Topology:
    """The machine of that name; a TPU slice with devices that can be compiled for on any machine.

    Raises:
      UserError: no such machine, or the TPU compiler is not installed.
    """
    chip, extents = parse_topology(text)
    if chip.name not in TPU_NAMES:
        return Topology(text, chip, math.prod(extents))
    # Read when the compiler is loaded: no metadata server is asked, and other processes may compile as well.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    shape = "x".join(map(str, extents))
    try:
        description = topologies.get_topology_desc(f"{TPU_NAMES[chip.name]}:{shape}", platform="tpu")
    except Exception as error:  # the plug-in raises whatever its C++ side reports
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--topology={text}: the TPU compiler does not offer it ({reason}); it comes with "
            "pip install 'vita_jax[tpu]', v5p and v4 slices have three extents, v5e and v6e two"
        ) from None
    devices = description.devices
    chips = len(devices) // chip.devices
    if chips != math.prod(extents):
        raise UserError(f"--topology={text}: the compiler shows {len(devices)} devices, not {math.prod(extents)} chips")
    return Topology(text, chip, chips, devices)
