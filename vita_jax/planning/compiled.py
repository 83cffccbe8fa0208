"""The training step of a stage, compiled ahead of time for devices that are not there, and what it needs there."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh

from vita_jax.parallel.rules import use_mesh
from vita_jax.planning.batches import abstract_batch
from vita_jax.planning.collectives import Collective, collectives
from vita_jax.training.experiment import ExperimentConfig, build_model
from vita_jax.training.families import Model
from vita_jax.training.plan import StagePlan, compiled_step, plan_stage
from vita_jax.training.stages import Stage

LARGEST = 6  # allocations that are kept of a message about too little memory


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one device.

    Attributes:
      argument_bytes: parameters, optimiser and batch; what it returns takes the place of what it was given.
      temporary_bytes: everything in between, where most is alive.
      peak_bytes: of both together; what must fit.
      collectives: of one step.
      seconds: the compilation took.
      refusal: the compiler's reason where it does not fit; sizes are then what it said it would need.
      largest: then the largest allocations, as "size shape operation".
    """

    argument_bytes: float
    temporary_bytes: float
    peak_bytes: float
    collectives: Sequence[Collective]
    seconds: float
    refusal: str = ""
    largest: Sequence[str] = ()


def plan_for(config: ExperimentConfig, stage: Stage, mesh: Mesh | AbstractMesh) -> tuple[Model, StagePlan]:
    """Model and plan of a stage. Keys are made here, before a mesh of absent devices is current."""
    model = build_model(config)
    return model, plan_stage(config, model, stage, mesh)


def compile_stage(config: ExperimentConfig, stage: Stage, mesh: Mesh) -> CompiledStep:
    """Compiles the step that `vita_jax.train` would run.

    Args:
      config: the run.
      stage: one of its stages.
      mesh: of the devices of a topology, or of real ones.
    """
    model, plan = plan_for(config, stage, mesh)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.shardings[path])
        for path, leaf in plan.shapes.items()
    }
    _, frozen = plan.split(params)
    state, batch = plan.abstract_state(mesh), abstract_batch(config, stage, mesh)
    started = time.monotonic()
    with use_mesh(mesh):
        lowered = compiled_step(model, plan, mesh).lower(state, frozen, batch)
        try:
            compiled, text = _compile(lowered, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _refused(str(error), time.monotonic() - started)
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledStep(
        argument_bytes=arguments,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        collectives=collectives(text, mesh.size),
        seconds=time.monotonic() - started,
    )


def _compile(lowered: jax.stages.Lowered, mesh: Mesh) -> tuple[jax.stages.Compiled, str]:
    """The program and its HLO text."""
    if mesh.devices.flat[0].platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # `as_text` fails for programs with asynchronous collectives of several operands, so the compiler writes it itself.
    with tempfile.TemporaryDirectory() as folder, _no_compilation_cache():
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (file,) = Path(folder).glob("*after_optimizations.txt")
        return compiled, file.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """What is compiled for absent devices cannot be read back from the cache."""
    used = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
# What is said without a list of allocations, when the temporaries alone are too much.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_PART = re.compile(r"^\s*(arguments|program)\s+([\d.]+)([KMGT]?)B?", re.MULTILINE)
_ALLOCATION = re.compile(r"^\s*\d+\. Size: (\S+)(.*?)(?=^\s*\d+\. Size:|\Z)", re.MULTILINE | re.DOTALL)


def _refused(message: str, seconds: float) -> CompiledStep:
    """What a message of the compiler about too little memory says."""
    used = _USED.search(message) or _TEMPORARIES.search(message)
    peak = float(used[1]) * _UNITS[used[2]] if used else float("inf")
    parts = {name: float(size) * _UNITS[unit] for name, size, unit in _PART.findall(message)}
    largest = []
    for size, text in _ALLOCATION.findall(message)[:LARGEST]:
        shape = re.search(r"Shape: (\S+)", text)
        operation = re.search(r'op_name="([^"]*)"', text)
        largest.append(" ".join([size, shape[1] if shape else "", operation[1] if operation else ""]).strip())
    reason = used[0] if used else message.splitlines()[0]
    return CompiledStep(
        parts.get("arguments", 0.0), parts.get("program", peak), peak, (), seconds, reason, tuple(largest)
    )
