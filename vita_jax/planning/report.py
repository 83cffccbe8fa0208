"""Plans as a person reads them: one stage in full, several in a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vita_jax.parallel.mesh import MESH_AXES
from vita_jax.planning.collectives import by_kind
from vita_jax.planning.compiled import CompiledStep
from vita_jax.planning.estimate import StateBytes, StepTime
from vita_jax.planning.topology import Topology
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.flops import StageFlops
from vita_jax.training.stages import Stage

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Result:
    """A stage on a machine.

    Attributes:
      config, stage, topology: what was asked.
      parameters: component -> number, and how many of them train.
      state: of one device.
      peak_bytes: of one device, all in all.
      step: what the compiler said; None: `peak_bytes` is by formula, as there is no compiler for this machine here.
      flops: of a step.
      time: least time of a step.
    """

    config: ExperimentConfig
    stage: Stage
    topology: Topology
    parameters: dict[str, tuple[int, int]]
    state: StateBytes
    peak_bytes: float
    step: CompiledStep | None
    flops: StageFlops
    time: StepTime

    @property
    def headroom_bytes(self) -> float:
        """Memory of a device that stays free; negative if it does not fit."""
        return self.topology.chip.device_hbm_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.headroom_bytes > 0 and not (self.step and self.step.refusal)


def mesh_text(config: ExperimentConfig, num_devices: int) -> str:
    """Axes larger than 1, such as `fsdp 16 x tensor 4`."""
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    if sizes["data"] == -1:
        others = 1
        for axis, size in sizes.items():
            others *= size if axis != "data" else 1
        sizes["data"] = num_devices // others
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def gib(size: float) -> str:
    """In GiB, two decimals."""
    return f"{size / GIB:.2f} GiB"


def milliseconds(seconds: float) -> str:
    """In ms, three significant digits."""
    return f"{seconds * 1e3:.3g} ms"


def count_text(number: float) -> str:
    """`8.31 G`, `357.9 M`, `27 k`."""
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.4g}{suffix}"
    return f"{number:.0f}"


def format_result(result: Result) -> str:
    """Everything about one stage."""
    lines = [
        f"{result.stage.title} on {result.topology.name}: {result.topology.num_chips} chips, "
        f"mesh {mesh_text(result.config, result.topology.num_devices)}, remat {result.config.model.language.remat}, "
        f"{result.stage.batch_size} rows of {result.stage.row_length}"
        + (f" in {result.stage.accumulation} parts" if result.stage.accumulation > 1 else ""),
        "",
        "parameters            all   trained",
    ]
    total = [sum(numbers) for numbers in zip(*result.parameters.values(), strict=True)]
    for name, (number, trained) in [*result.parameters.items(), ("together", tuple(total))]:
        lines.append(f"  {name:<17}{count_text(number):>8}  {count_text(trained):>8}")
    lines += ["", *_memory_lines(result), "", *_time_lines(result)]
    if result.step is not None and result.step.collectives:
        lines += ["", "collectives of a step          times   a device sends"]
        for kind, (times, sent) in by_kind(list(result.step.collectives)).items():
            lines.append(f"  {kind:<24}{times:>9}   {gib(sent):>12}")
    if not result.fits:
        lines += ["", "It does not fit. What helps:", *(f"  - {text}" for text in advice(result))]
    return "\n".join(lines)


def _memory_lines(result: Result) -> list[str]:
    state, step, room = result.state, result.step, result.topology.chip.device_hbm_bytes
    lines = [f"memory of a device ({gib(room)})"]
    parts = [
        ("parameters that train", state.trainable),
        ("frozen parameters", state.frozen),
        ("optimiser", state.optimizer),
    ]
    if step is not None:
        parts += [("batch and the rest", step.argument_bytes - state.total), ("temporaries", step.temporary_bytes)]
    parts = [part for part in parts if part[1] > 0]
    parts += [("peak" if step else "peak, by formula", result.peak_bytes), ("headroom", result.headroom_bytes)]
    lines += [f"  {name:<24}{gib(size):>12}" for name, size in parts]
    if step is not None and step.refusal:
        lines.append(f"  the compiler: {step.refusal}")
        lines += [f"    {entry}" for entry in step.largest]
    return lines


def _time_lines(result: Result) -> list[str]:
    time, chips = result.time, result.topology.num_chips
    lines = ["model FLOPs of a step"]
    lines += [f"  {name:<24}{flops:>12.3e}" for name, flops in result.flops.parts.items()]
    lines += [f"  {'together':<24}{time.flops:>12.3e}", "", "a step takes at least"]
    lines += [
        f"  {name:<24}{milliseconds(getattr(time, field)):>12}"
        for name, field in (("arithmetic", "arithmetic"), ("memory", "memory"), ("links between chips", "links"))
    ]
    rate = time.tokens / time.seconds
    return [
        *lines,
        f"limited by {time.limit}: MFU at most {time.mfu:.0%}, at most {count_text(rate).strip()} positions/s, "
        f"{count_text(rate / chips).strip()} a chip",
    ]


def advice(result: Result) -> list[str]:
    """What would make a stage fit, most useful first."""
    config, stage, state = result.config, result.stage, result.state
    mesh, room = config.mesh, result.topology.chip.device_hbm_bytes
    language, texts = config.model.language, []
    if state.total > 0.5 * room:
        texts.append(
            f"parameters and optimiser take {gib(state.total)} of each device: a larger --config.mesh.fsdp"
            + (" or --config.mesh.expert" if language.num_experts else "")
            + ", --config.optimizer.moments=bfloat16, or more chips"
        )
    if language.remat != "full":
        texts.append("--config.model.language.remat=full keeps only the input of each layer")
    if getattr(config.model.vision, "remat", None) == "none" and stage.row_tiles:  # CLIP's tower has no such choice
        texts.append("--config.model.vision.remat=full does the same for the vision tower")
    shards = result.topology.num_devices // (mesh.tensor * mesh.context)
    if stage.batch_size // stage.accumulation > shards:
        texts.append(
            f"--config.stages.{stage.name}.accumulation={stage.batch_size // shards}: one row a device at a time"
        )
    else:
        texts.append(
            "a device holds a whole row at a time: --config.mesh.context=2 cuts it, --config.mesh.tensor=2 cuts heads, "
            "feed-forward and vocabulary"
        )
    if config.dtypes.compute_dtype != "bfloat16":
        texts.append("--config.dtypes.compute_dtype=bfloat16 halves activations and gathered weights")
    return texts


COLUMNS = ("stage", "slice", "mesh", "rows", "state", "peak", "headroom", "step at least", "limit", "MFU at most")


def table_row(result: Result) -> tuple[str, ...]:
    """A line of `format_table`."""
    time = result.time
    return (
        result.stage.title,
        result.topology.name,
        mesh_text(result.config, result.topology.num_devices),
        f"{result.stage.batch_size} x {result.stage.row_length}"
        + (f" / {result.stage.accumulation}" if result.stage.accumulation > 1 else ""),
        gib(result.state.total),
        gib(result.peak_bytes),
        gib(result.headroom_bytes) if result.fits else "does not fit",
        milliseconds(time.seconds),
        time.limit,
        f"{time.mfu:.0%}",
    )


def format_table(results: Sequence[Result]) -> str:
    """A Markdown table, a line for each result."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(table_row(result) for result in results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
