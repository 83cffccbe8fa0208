"""How fast a stage trains, and how much of the machine it uses.

Model FLOPs utilisation (arXiv 2204.02311, appendix B) is

    MFU = model FLOPs of a step / (seconds of a step x peak FLOP/s of all chips)

with the FLOPs of `flops.stage_flops`, in which recomputation does not count, and the bfloat16 peak of `parallel.chips`,
whatever dtype the run computes in. It is left out where the chips' peak is not known, as on a CPU.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence

import jax

from vita_jax.parallel.chips import chip_of_kind
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.flops import stage_flops
from vita_jax.training.stages import Stage

# getrusage counts bytes on macOS and kibibytes elsewhere.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run trains on.

    Attributes:
      name: of the chips, as jax says it.
      num_chips: of all processes; jax shows two devices for a chip of some kinds.
      peak_flops: FLOP/s of all chips in bfloat16, or None where it is not known.
    """

    name: str
    num_chips: float
    peak_flops: float | None


def machine_of(devices: Sequence[jax.Device]) -> Machine:
    """The machine that these devices, all of one kind, are."""
    kind = devices[0].device_kind
    chip = chip_of_kind(kind)
    if chip is None:
        return Machine(kind, len(devices), None)
    return Machine(kind, len(devices) / chip.devices, len(devices) * chip.device_flops_bf16)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What turns times into rates.

    Attributes:
      machine: what trains.
      step_flops: model FLOPs of an optimiser step; None without a use for them.
    """

    machine: Machine
    step_flops: float | None = None

    def rates(self, tokens: float, steps: int, seconds: float) -> dict[str, float]:
        """Of so many steps in so many seconds: `tokens_per_second`, `tokens_per_second_per_chip`, `step_seconds`, and
        `mfu` where it is known.
        """
        per_second = tokens / seconds
        values = {
            "tokens_per_second": per_second,
            "tokens_per_second_per_chip": per_second / self.machine.num_chips,
            "step_seconds": seconds / steps,
        }
        if self.step_flops is not None and self.machine.peak_flops is not None:
            values["mfu"] = self.step_flops * steps / (seconds * self.machine.peak_flops)
        return values

    def formula(self) -> str | None:
        """How `mfu` is worked out, with the numbers of this stage; None without it."""
        if self.step_flops is None or self.machine.peak_flops is None:
            return None
        return (
            f"MFU = {self.step_flops:.4g} model FLOPs of a step / (seconds of a step x {self.machine.peak_flops:.4g} "
            f"FLOP/s, the bfloat16 peak of {self.machine.num_chips:g} {self.machine.name})"
        )


def speed_of(config: ExperimentConfig, stage: Stage, devices: Sequence[jax.Device]) -> Speed:
    """Of a stage on these devices; the model's FLOPs are worked out where their share of the peak will be shown."""
    machine = machine_of(devices)
    return Speed(machine, None if machine.peak_flops is None else stage_flops(config, stage).total)


def memory() -> dict[str, float]:
    """Memory at its highest so far, GiB: `memory_gb` of this process on the host; where the devices tell, of the
    fullest of its own, `device_memory_gb`, and what a device has, `device_limit_gb`.
    """
    values = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 2**30}
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, key in (("device_memory_gb", "peak_bytes_in_use"), ("device_limit_gb", "bytes_limit")):
        found = [entry[key] for entry in stats if key in entry]
        if found:
            values[name] = max(found) / 2**30
    return values
