"""The training loop, stage by stage, from first parameters to last checkpoint. Read it from `run` downwards.

Orders that other parts rely on:
* At the top of a step: save if due, then fetch the batch, then step. The data iterator is never ahead of what is saved
  with it.
* Where a stage gets its parameters: its own newest checkpoint, else the stages or checkpoints it starts from, else
  newly drawn.
* End of a stage: last checkpoint, then the `after_stage` hook, then the mark that the hook is done.
A run that is stopped or killed anywhere and started again with the same configuration goes on from its last checkpoint,
bit for bit, the numbers it reports included. Several processes run all of this in step, see `parallel.processes`: the
first reports and calls hooks, all save, and a signal to one stops all. What is done about steps that go wrong is in
`guard`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from jax.sharding import Mesh

from vita_jax import config as config_lib
from vita_jax.data.document_examples import DocumentContext
from vita_jax.data.document_loader import MixtureLoader, make_mixture_loader
from vita_jax.data.lanes import lanes_of_process, merge_states
from vita_jax.data.loader import Loader, RecordCounts, SourceConfig, make_loader
from vita_jax.data.tokenizer import Tokenizer, load_tokenizer
from vita_jax.errors import UserError
from vita_jax.parallel.mesh import MeshConfig, check_processes, make_mesh, put_batch, put_replicated
from vita_jax.parallel.processes import Largest, gather, is_first, on_first
from vita_jax.parallel.rules import use_mesh
from vita_jax.storage import place, resolved
from vita_jax.training.checkpoint import (
    CONFIG,
    StageCheckpoints,
    StopSignal,
    checkpoint_folder,
    load_params,
    newest_usable,
    snapshot_meta,
)
from vita_jax.training.experiment import (
    RESTARTABLE_FIELDS,
    ExperimentConfig,
    build_model,
    check_tokenizer,
    data_folder,
    example_context,
    join_others,
    peak_learning_rate,
    tokenizer_folder,
    validate,
)
from vita_jax.training.families import Model
from vita_jax.training.goodput import SHARE, Clock, Spent, describe_spent, read_spent, taken_up
from vita_jax.training.guard import (
    BAD_BATCHES,
    STEPS_IN_FLIGHT,
    BadSteps,
    Compilations,
    LossWindow,
    Watchdog,
    empty_window,
)
from vita_jax.training.metrics import MetricsWriter, Reporter, StepNumbers, format_duration
from vita_jax.training.plan import StagePlan, compiled_step, initial_params, plan_stage
from vita_jax.training.speech_batches import SPEECH_BATCHES, check_codes, speech_batches
from vita_jax.training.speed import speed_of
from vita_jax.training.stages import Stage, count_parameters, flatten, parameter_counts, stage_table, unflatten
from vita_jax.training.step import FlatParams, TrainState
from vita_jax.training.trace import StepTrace

HOOK_DONE = "after_stage.done"
# The configuration as it was before the experiment's `prepare` had a chance to complete it.
REQUESTED = "requested_config.json"


class BatchIterator(Protocol):
    """Endless host batches whose position can be saved; `counts`: records read and unusable, None without records.

    Where several processes train, states are as those of `Loader`, so that they can be joined.
    """

    counts: RecordCounts | None

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


MakeBatches = Callable[[ExperimentConfig, Stage], BatchIterator]
AfterStage = Callable[[Stage, dict[str, Any]], None]


class Stopped(Exception):
    """The run was asked to stop and has saved; `signal` is what asked."""

    def __init__(self, stage: str, step: int, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step} of stage {stage}; "
            "start it again to go on from there"
        )
        self.signal = number


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share. `agreed` takes the signal that this process was sent, or 0, and gives the one by which all
    stop.
    """

    config: ExperimentConfig
    model: Model
    mesh: Mesh
    metrics: MetricsWriter
    stop: StopSignal
    agreed: Largest
    make_batches: MakeBatches
    after_stage: AfterStage | None
    stream: TextIO


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(
    config: ExperimentConfig,
    *,
    make_batches: MakeBatches | None = None,
    after_stage: AfterStage | None = None,
    stream: TextIO | None = None,
) -> None:
    """Trains every stage that is not finished yet.

    Args:
      config: the run; its `run_dir` may hold earlier progress of the same configuration.
      make_batches: batches of a stage; default: the packed ArrayRecord files of its sources, with the run's tokenizer.
      after_stage: called once when a stage is finished, with its parameters (nested, without the objective's own).
        If the process is killed inside it, it is called again at the next start. Of several processes, the first calls
        it, with the parameters on its first device, and the others wait.
      stream: where progress goes, default stdout; only the first process tells.

    Raises:
      UserError: the configuration, data or an existing run directory does not fit; the disk is full; too many steps in
        a row have bad numbers.
      Stopped: SIGTERM or SIGINT arrived; everything is saved.
    """
    join_others(config)
    validate(config)
    stream = (stream or sys.stdout) if is_first() else io.StringIO()
    run_dir = place(config.run_dir)
    on_first(functools.partial(claim_run_dir, config))
    if not all(gather((run_dir / CONFIG).is_file())):
        raise UserError(
            f"run_dir={config.run_dir} is not one folder for all processes; choose one that all of them see"
        )
    if make_batches is None:
        tokenizer = load_tokenizer(tokenizer_folder(config))
        check_tokenizer(config, tokenizer)
        # Never over itself: other processes may still be reading it.
        if resolved(tokenizer_folder(config)) != resolved(run_dir / "tokenizer"):
            on_first(functools.partial(tokenizer.save, run_dir / "tokenizer"))
        make_batches = functools.partial(record_batches, tokenizer=tokenizer)

    # ---- mesh, model, and everything about the stages that shapes can tell
    mesh = make_mesh(config.mesh)
    check_processes(mesh)
    model, agreed = build_model(config), Largest(mesh, STEPS_IN_FLIGHT)
    with use_mesh(mesh), MetricsWriter(run_dir, writes=is_first()) as metrics, StopSignal() as stop:
        plans = [plan_stage(config, model, stage, mesh) for stage in config.stages]
        stream.write(describe(config, plans) + "\n")
        shared = Run(config, model, mesh, metrics, stop, agreed, make_batches, after_stage, stream)
        # ---- stages
        for plan in plans:
            run_stage(shared, plan)


def describe(config: ExperimentConfig, plans: list[StagePlan]) -> str:
    """The table of stages with their parameter counts."""
    stages = [dataclasses.replace(p.stage, learning_rate=peak_learning_rate(config, p.stage)) for p in plans]
    return stage_table(stages, {p.stage.name: parameter_counts(p.shapes, p.trainable) for p in plans})


def claim_run_dir(config: ExperimentConfig, file: str = CONFIG) -> None:
    """Makes the directory this configuration's, or checks that it already is.

    Args:
      config: what is asked for now.
      file: the configuration is compared with this file of the directory, and saved in it.

    Raises:
      UserError: it holds a run with another configuration; lists the fields that differ.
    """
    path = place(config.run_dir) / file
    if path.is_file():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not readable ({error}); choose another --config.run_dir") from None
        with contextlib.suppress(UserError):  # fields that were added since have their defaults
            saved = config_lib.to_dict(config_lib.from_dict(type(config), saved))
        changed = [
            (field, old, new)
            for field, old, new in config_lib.differences(saved, config)
            if not any(field == free or field.startswith(free + ".") for free in RESTARTABLE_FIELDS)
        ]
        if changed:
            listed = "; ".join(f"{field}: {old!r} there, {new!r} now" for field, old, new in changed)
            raise UserError(
                f"{config.run_dir} holds a run with another configuration ({listed}). "
                "Use these values to go on with it, another --config.run_dir=DIR to start a new run, "
                "or delete the folder"
            )
    config_lib.save_json(config, path)


def record_batches(config: ExperimentConfig, stage: Stage, *, tokenizer: Tokenizer) -> Loader | MixtureLoader:
    """Packed batches of this process from the stage's sources, or data sets; relative source paths are below the data
    folder.
    """
    if stage.sets:
        return mixture_batches(config, stage, tokenizer)
    sources = [dataclasses.replace(source, path=str(data_folder(config) / source.path)) for source in stage.sources]
    if stage.objective in SPEECH_BATCHES:
        return speech_batches(config, stage, sources, tokenizer)
    return make_loader(
        sources,
        example_context(config, tokenizer, stage),
        objective=stage.objective,
        batch_size=stage.batch_size // jax.process_count(),
        row_length=stage.row_length,
        row_tiles=stage.row_tiles,
        row_clips=stage.row_clips,
        clip_frames=stage.clip_frames,
        seed=config.seed + config.stages.index(stage),
        reading=config.data.reading,
        max_bad_fraction=config.data.max_bad_fraction,
        lanes=lanes_of_process(config.data.lanes, jax.process_index(), jax.process_count()),
    )


def mixture_batches(config: ExperimentConfig, stage: Stage, tokenizer: Tokenizer) -> MixtureLoader:
    """A batch of each of the stage's data sets, this process's part of it."""

    def placed(source: SourceConfig) -> SourceConfig:
        return dataclasses.replace(source, path=str(data_folder(config) / source.path))

    return make_mixture_loader(
        [dataclasses.replace(data, sources=tuple(map(placed, data.sources))) for data in stage.sets],
        DocumentContext(tokenizer, config.image),
        seed=config.seed + config.stages.index(stage),
        reading=config.data.reading,
        max_bad_fraction=config.data.max_bad_fraction,
        lanes=lanes_of_process(config.data.lanes, jax.process_index(), jax.process_count()),
        processes=jax.process_count(),
    )


def gathered_state(batches: BatchIterator) -> dict[str, Any]:
    """The state of the data of all processes together."""
    states = gather(batches.get_state())
    return states[0] if len(states) == 1 else merge_states(states)


# ---------------------------------------------------------------------------------------------------------------------
# One stage
# ---------------------------------------------------------------------------------------------------------------------


def run_stage(run: Run, plan: StagePlan) -> None:
    """Brings one stage to its end, from wherever it stands, and reports it."""
    stage, clock = plan.stage, Clock()
    folder = checkpoint_folder(run.config.run_dir, stage.name)
    # Before the checkpoints are opened, which all processes do together.
    meta = on_first(lambda: newest_usable(folder, lambda line: run.stream.write(f"{stage.title}: {line}\n")))
    with StageCheckpoints(folder, run.config.checkpoint.keep, run.config.checkpoint.milestones) as checkpoints:
        if meta is not None and meta["finished"]:
            run.stream.write(f"{stage.title}: already finished\n")
        else:
            with contextlib.closing(run.make_batches(run.config, stage)) as batches:
                train_stage(run, plan, checkpoints, meta, batches, clock)
    on_first(lambda: call_hook(run, plan, folder))


def call_hook(run: Run, plan: StagePlan, folder: Path) -> None:
    """Calls `after_stage` for the stage with these checkpoints, if that was not done.

    Of several processes only this one is there, so nothing may lie on the devices of others.
    """
    done = folder.parent / HOOK_DONE
    if run.after_stage is None or done.exists():
        return
    if jax.process_count() == 1:
        run.after_stage(plan.stage, load_params(folder, unflatten(plan.shardings)).params)
    else:
        with use_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            run.after_stage(plan.stage, load_params(folder).params)
    done.touch()


def starting_state(
    run: Run, plan: StagePlan, checkpoints: StageCheckpoints, meta: dict[str, Any] | None, batches: BatchIterator
) -> tuple[TrainState, FlatParams]:
    """State and frozen parameters: from the stage's own checkpoint with this JSON part, else from its starts."""
    abstract = plan.abstract_state(run.mesh)
    window = None if plan.loss_window is None else empty_window(plan.loss_window)
    if meta is None:
        trainable, frozen = plan.split(initial_params(run.config, run.model, plan, run.stream.write))
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
        opt_state = jax.jit(plan.optimizer.init, out_shardings=layout)(trainable)
        step, rng = np.int32(0), plan.rng
    else:
        snapshot = checkpoints.restore(meta["step"], plan.abstract_params(), abstract.opt_state, meta)
        trainable, frozen = plan.split(flatten(snapshot.params))
        opt_state = snapshot.opt_state
        step, rng = np.int32(meta["step"]), np.asarray(meta["rng"], np.uint32)
        if window is not None:
            losses, count = meta["progress"]["losses"]
            window = LossWindow(np.asarray(losses, np.float32), np.int32(count))
        batches.set_state(meta["data_state"])
        run.stream.write(f"{plan.stage.title}: going on from step {meta['step']} of {plan.stage.steps}\n")
    if plan.stage.objective == "speech_decoder":
        check_codes(run.config, plan.stage, {**frozen, **trainable})
    step, rng, window = put_replicated((step, rng, window), run.mesh)
    return TrainState(step, trainable, opt_state, rng, window), frozen


def train_stage(
    run: Run,
    plan: StagePlan,
    checkpoints: StageCheckpoints,
    meta: dict[str, Any] | None,
    batches: BatchIterator,
    clock: Clock,
) -> None:
    """Trains from the checkpoint with this JSON part (None: from the start) to the last step, and saves that.

    The part `progress` of a checkpoint holds what the loop counts: steps since the last report, bad steps, and the
    losses that spikes are judged by.
    """
    config, stage, run_dir = run.config, plan.stage, place(run.config.run_dir)
    state, frozen = starting_state(run, plan, checkpoints, meta, batches)
    step_fn = compiled_step(run.model, plan, run.mesh)
    meta = meta or {}
    first = saved = meta.get("step", 0)
    seconds = meta.get("seconds", 0.0)
    clock.before = taken_up(read_spent(meta.get("spent", {})), run.metrics.rewind(stage.name, first), time.time())
    speed = speed_of(config, stage, run.mesh.devices.flat)
    if formula := speed.formula():
        run.stream.write(f"{stage.title}: {formula}\n")
    reporter = Reporter(run.metrics, run.stream, stage, config.log.every_steps, first, speed, clock)
    bad_steps = BadSteps(config.guard, run_dir, stage, reporter.say)
    if progress := meta.get("progress"):
        reporter.set_state(progress["window"])
        bad_steps.set_state(progress["bad_steps"])
    reporter.on_finished = functools.partial(observe, bad_steps)
    compilations = Compilations(step_fn, state, reporter.say)

    def save(step: int) -> None:
        progress = {"window": reporter.state(), "bad_steps": bad_steps.state(), "losses": None}
        with clock.saving():
            rng = [int(word) for word in np.asarray(state.rng)]
            if state.window is not None:
                progress["losses"] = [np.asarray(state.window.losses).tolist(), int(state.window.count)]
            total, spent = seconds + reporter.elapsed(), clock.spent().numbers()
            saved_meta = snapshot_meta(config, stage, step, rng, gathered_state(batches), total, progress, spent)
            run.metrics.send()
            checkpoints.save(step, unflatten({**frozen, **state.trainable}), state.opt_state, saved_meta)

    with Watchdog(config.guard, run_dir, stage) as watchdog, StepTrace(config.profile, run_dir, stage.name) as trace:
        for step in range(first, stage.steps):
            stop = run.agreed(run.stop.received or 0)
            due = step % config.checkpoint.every_steps == 0 or step in config.checkpoint.milestones
            if step > saved and (due or stop):
                save(step)
                saved = step
            if stop:
                checkpoints.wait()
                reporter.close()
                raise Stopped(stage.name, step, stop)
            host_batch, num_tokens = fetch(plan, batches, reporter)
            bad_steps.keep(step + 1, host_batch)
            batch = put(host_batch, run.mesh, reporter)
            with trace.step(step + 1), jax.transfer_guard("disallow"):
                state, values = step_fn(state, frozen, batch)
            compilations.check(step + 1, state, batch)
            trace.done(step + 1, values)
            reporter.add(step + 1, values, num_tokens)
            watchdog.beat(step + 1)
        reporter.finish()

    total = seconds + reporter.elapsed()
    summary = {"trainable": count_parameters(state.trainable), "frozen": count_parameters(frozen)}
    summary |= {"title": stage.title, "seconds": total, "skipped": bad_steps.skipped}
    run.metrics.stage(stage.name, {"step": stage.steps, **summary, SHARE: clock.spent().share})
    save(stage.steps)
    with clock.saving():
        checkpoints.wait()
    lines = [f"{stage.steps} steps in {format_duration(total)}", described(clock.spent())]
    if bad_steps.skipped:
        lines.append(f"{bad_steps.skipped} bad steps skipped, see {run_dir / BAD_BATCHES}")
    if batches.counts is not None and batches.counts.bad:
        reasons = ", ".join(f"{number} {reason}" for reason, number in batches.counts.reasons.items())
        lines.append(f"{batches.counts.bad} of {batches.counts.seen} records left out ({reasons})")
    run.stream.write("".join(f"{stage.title}: {line}\n" for line in lines))


def described(spent: Spent) -> str:
    """The goodput of a stage, with how long its starts took, and how long none was running."""
    down = f"; {format_duration(spent.down)} between starts" if spent.down >= 1 else ""
    return f"{describe_spent(spent)} of {format_duration(spent.elapsed)}{down}"


def observe(bad_steps: BadSteps, numbers: StepNumbers) -> None:
    """Tells a step that has finished to those who count the bad ones."""
    skipped = bool(np.asarray(numbers.values["skipped"]))
    loss, norm = (float(np.asarray(numbers.values[name])) if skipped else 0.0 for name in ("loss", "grad_norm"))
    bad_steps.observe(numbers.step, skipped, loss, norm)


def fetch(plan: StagePlan, batches: BatchIterator, reporter: Reporter) -> tuple[dict[str, np.ndarray], int]:
    """What the objective reads of the next batch of this process, and how many tokens all processes' batches hold.

    Counts the time that the device may have waited for it, as `put` does.
    """
    before = time.monotonic()
    batch = next(batches)
    objective = plan.objective
    missing = [key for key in objective.batch_keys if key not in batch]
    if missing:
        raise UserError(
            f"stage {plan.stage.name!r}: objective {plan.stage.objective!r} needs {', '.join(missing)}, "
            "which its data does not have"
        )
    keys = (*objective.batch_keys, *(key for key in objective.optional_keys if key in batch))
    tokens = objective.num_tokens(batch) * jax.process_count()
    reporter.waited(time.monotonic() - before)
    return {key: batch[key] for key in keys}, tokens


def put(batch: Mapping[str, np.ndarray], mesh: Mesh, reporter: Reporter) -> dict[str, jax.Array]:
    """The batch on the mesh."""
    before = time.monotonic()
    on_device = put_batch(batch, mesh)
    reporter.waited(time.monotonic() - before)
    return on_device
