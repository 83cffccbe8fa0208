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
from vita_jax.training.flops import stage_flops
from vita_jax.training.stages import Stage

# What a formula misses may be so much; the compiler has the last word.
DOUBT = 1.25


def estimate_stage(config: ExperimentConfig, stage: Stage, topology: Topology) -> Result:
    """Everything by formula, without a compiler.

    Raises:
      UserError: the mesh does not fit the machine, or a parameter does not fit the mesh.
    """
    _, plan = plan_for(config, stage, abstract_mesh(config.mesh, topology.num_devices))
    state = state_bytes(plan)
    return Result(
        config=config,
        stage=stage,
        topology=topology,
        parameters=component_parameters(plan),
        state=state,
        peak_bytes=state.total + formula_temporaries(config, stage, plan),
        step=None,
        flops=stage_flops(config, stage),
        time=step_time(config, stage, plan, topology.chip, formula_bytes_sent(config, stage, plan)),
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


def candidates(config: ExperimentConfig, stage: Stage, topology: Topology) -> Iterator[ExperimentConfig]:
    """Configurations that differ in mesh, remat and accumulation and that are valid for the machine."""
    experts = config.model.language.num_experts
    index = config.stages.index(stage)
    for data, fsdp, expert, tensor, context in factorisations(topology.num_devices, 5):
        if (expert > 1 and (not experts or experts % expert)) or tensor > 8 or context > 8 or data > 8:
            continue
        for remat in REMAT_POLICIES:
            for parts in (1, 2, 4, 8, 16):
                language = dataclasses.replace(config.model.language, remat=remat)
                changed = dataclasses.replace(
                    config,
                    model=dataclasses.replace(config.model, language=language),
                    mesh=MeshConfig(data, fsdp, expert, tensor, context),
                    stages=(
                        *config.stages[:index],
                        dataclasses.replace(stage, accumulation=parts),
                        *config.stages[index + 1 :],
                    ),
                )
                try:
                    validate(changed, topology.num_devices)
                except UserError:
                    continue
                yield changed


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
    estimated = []
    for changed in candidates(config, stage, topology):
        try:
            estimated.append(estimate_stage(changed, changed.stage(stage.name), topology))
        except UserError:  # a dimension that the mesh does not divide
            continue
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
