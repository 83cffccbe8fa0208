"""What accelerators can do at most, from their makers' public data sheets.

TPUs: the specification tables of the Cloud TPU documentation (pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e",
"TPU7x"). The documentation gives interconnect bandwidth of v4 per direction (2400 Gbit/s, six links); like all others
here it is counted in both directions. GPUs: the data sheets of the A100 80GB SXM, H100 SXM5 and H200 SXM, dense figures
without sparsity; their interconnect is NVLink, both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: key of `CHIPS`.
      kinds: what `jax.Device.device_kind` says of it, in any version of jax.
      peak_flops_bf16: dense bfloat16 products, FLOP/s of a chip.
      hbm_bytes: memory of a chip, bytes.
      hbm_bandwidth: bytes/s of a chip.
      ici_bandwidth: bytes/s between chips, all links of a chip, both directions together.
      devices: how many devices jax shows for a chip; each has that part of everything above. (Of a v4 it shows one,
        its two cores together, but two in a topology description for ahead-of-time compilation.)
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops_bf16: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int = 1

    @property
    def device_flops_bf16(self) -> float:
        """FLOP/s of one of jax's devices."""
        return self.peak_flops_bf16 / self.devices

    @property
    def device_hbm_bytes(self) -> int:
        """Memory of one of jax's devices, bytes."""
        return self.hbm_bytes // self.devices


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 600e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 400e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 1200e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 800e9),
        # Two chiplets with a memory each, which jax shows as two devices.
        Chip("tpu7x", ("TPU7x", "TPU 7x"), 2307e12, 192 * GIB, 7380e9, 1200e9, devices=2),
        Chip("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312e12, 80 * GIB, 2039e9, 600e9),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9, 900e9),
        Chip("h200", ("NVIDIA H200",), 989e12, 141_000_000_000, 4800e9, 900e9),
    )
}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None for a CPU and for what is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
