"""Which mesh, rematerialisation and micro-batches to use: tries those that look best by formula and ranks what fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from vita_jax.errors import UserError
from vita_jax.models.language.decoder import REMAT_POLICIES
from vita_jax.parallel.mesh import MeshConfig, abstract_mesh, make_mesh
from vita_jax.planning.compiled import CompiledStep, compile_stage, plan_for
from vita_jax.planning.estimate import (
    component_parameters,
    formula_bytes_sent,
    formula_temporaries,
    state_bytes,
    step_time,
)
from vita_jax.planning.report import Result
from vita_jax.planning.topology import Topology
from vita_jax.training.experiment import ExperimentConfig, validate
from vita_jax.training.flops import StageFlops, stage_flops
from vita_jax.training.plan import StagePlan
from vita_jax.training.stages import Stage

# What a formula misses may be so much; the compiler has the last word.
DOUBT = 1.25
MOST_PARTS = 8  # of the axes data, tensor and context: beyond it links become the limit
MICRO_BATCHES = (1, 2, 4, 8, 16)


def estimate_stage(
    config: ExperimentConfig,
    stage: Stage,
    topology: Topology,
    plan: StagePlan | None = None,
    flops: StageFlops | None = None,
) -> Result:
    """Everything by formula, without a compiler.

    Args:
      config, stage, topology: what is asked.
      plan, flops: of the stage, if they are known; they do not depend on remat and micro-batches.

    Raises:
      UserError: the mesh does not fit the machine, or a parameter does not fit the mesh.
    """
    if plan is None:
        _, plan = plan_for(config, stage, abstract_mesh(config.mesh, topology.num_devices))
    flops = flops or stage_flops(config, stage)
    state = state_bytes(plan)
    return Result(
        config=config,
        stage=stage,
        topology=topology,
        parameters=component_parameters(plan),
        state=state,
        peak_bytes=state.total + formula_temporaries(config, stage, plan),
        step=None,
        flops=flops,
        time=step_time(config, stage, plan, topology.chip, formula_bytes_sent(config, stage, plan), flops),
    )


def plan_on(config: ExperimentConfig, stage: Stage, topology: Topology) -> Result:
    """The stage on the machine: compiled where there is a compiler for it, else by formula.

    Raises:
      UserError: the configuration does not fit the number of devices.
    """
    validate(config, topology.num_devices)
    estimated = estimate_stage(config, stage, topology)
    if not topology.devices:
        return estimated
    return with_compiled(estimated, compile_stage(config, stage, make_mesh(config.mesh, topology.devices)))


def with_compiled(estimated: Result, step: CompiledStep) -> Result:
    """The result with what the compiler says in place of the formulas."""
    config, stage, topology = estimated.config, estimated.stage, estimated.topology
    time = estimated.time
    if not step.refusal:
        _, plan = plan_for(config, stage, abstract_mesh(config.mesh, topology.num_devices))
        time = step_time(config, stage, plan, topology.chip, step.collectives, estimated.flops)
    return dataclasses.replace(estimated, peak_bytes=step.peak_bytes, step=step, time=time)


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product."""
    if parts == 1:
        yield (number,)
        return
    for first in (divisor for divisor in range(1, number + 1) if number % divisor == 0):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


def meshes(config: ExperimentConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes of all devices that are worth a thought."""
    experts = config.model.language.num_experts
    for data, fsdp, expert, tensor, context in factorisations(topology.num_devices, 5):
        if max(data, tensor, context) <= MOST_PARTS and (expert == 1 or (experts and experts % expert == 0)):
            yield MeshConfig(data, fsdp, expert, tensor, context)


def variants(config: ExperimentConfig, stage: Stage, topology: Topology) -> Iterator[ExperimentConfig]:
    """The configuration with every remat policy and number of micro-batches that are valid for its mesh."""
    index = config.stages.index(stage)
    for remat in REMAT_POLICIES:
        language = dataclasses.replace(config.model.language, remat=remat)
        model = dataclasses.replace(config.model, language=language)
        for parts in MICRO_BATCHES:
            changed = dataclasses.replace(stage, accumulation=parts)
            stages = (*config.stages[:index], changed, *config.stages[index + 1 :])
            variant = dataclasses.replace(config, model=model, stages=stages)
            try:
                validate(variant, topology.num_devices)
            except UserError:
                continue
            yield variant


def estimates(config: ExperimentConfig, stage: Stage, topology: Topology) -> Iterator[Result]:
    """By formula, all that a search could compile."""
    flops = stage_flops(config, stage)
    for mesh in meshes(config, topology):
        on_mesh = dataclasses.replace(config, mesh=mesh)
        try:
            _, plan = plan_for(on_mesh, stage, abstract_mesh(mesh, topology.num_devices))
        except UserError:  # a dimension that the mesh does not divide
            continue
        for variant in variants(on_mesh, stage, topology):
            yield estimate_stage(variant, variant.stage(stage.name), topology, plan, flops)


def search(
    config: ExperimentConfig,
    stage: Stage,
    topology: Topology,
    tries: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """The best ways to run a stage on a machine.

    Candidates are ordered by their least step time by formula, those that formulas put far over the memory last; the
    first `tries` are compiled.

    Returns:
      Those that fit, fastest first; if none does, all that were tried, smallest first.
    """
    estimated = list(estimates(config, stage, topology))
    if not estimated:
        raise UserError(f"no mesh of {topology.num_devices} devices divides stages.{stage.name}; change its batch_size")
    room = topology.chip.device_hbm_bytes * DOUBT
    estimated.sort(key=lambda result: (result.peak_bytes > room, result.time.seconds, result.peak_bytes))
    if not topology.devices:
        return _ranked(estimated)[:tries]
    results = []
    for number, result in enumerate(_distinct(estimated, tries), 1):
        compiled = with_compiled(
            result, compile_stage(result.config, result.stage, make_mesh(result.config.mesh, topology.devices))
        )
        results.append(compiled)
        progress(f"{number} of {tries}: {compiled.step.seconds:.0f} s, {'fits' if compiled.fits else 'does not fit'}")
    return _ranked(results)


def _distinct(results: list[Result], number: int) -> list[Result]:
    """The first `number`, at most two of one mesh, so that a search does not spend itself on one."""
    chosen: list[Result] = []
    for result in results:
        if sum(other.config.mesh == result.config.mesh for other in chosen) < 2:
            chosen.append(result)
        if len(chosen) == number:
            break
    return chosen


def _ranked(results: list[Result]) -> list[Result]:
    fitting = [result for result in results if result.fits]
    if not fitting:
        return sorted(results, key=lambda result: result.peak_bytes)
    return sorted(fitting, key=lambda result: result.time.seconds)
