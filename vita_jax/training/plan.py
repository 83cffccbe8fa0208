"""What a stage will do, worked out from shapes alone before anything is allocated, and its first parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from vita_jax.errors import UserError
from vita_jax.models.lora import is_adapter
from vita_jax.models.vision.clip import resize_positions
from vita_jax.parallel.mesh import replicated
from vita_jax.parallel.rules import check_whole, param_shardings, unbox
from vita_jax.storage import place
from vita_jax.training.adapters import Say, check_objective, draw_adapters, settle_adapters, with_adapters
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import ExperimentConfig, peak_learning_rate
from vita_jax.training.families import Model
from vita_jax.training.objectives import OBJECTIVES, Objective, init_extra, init_model, init_params, objective_of
from vita_jax.training.optimizer import (
    DECAYED,
    learning_rate_multipliers,
    make_optimizer,
    muon_matrices,
    warmup_constant,
    warmup_cosine,
    warmup_steps,
)
from vita_jax.training.stages import Stage, flatten, starts_of, trainable_paths, trained_so_far, unflatten
from vita_jax.training.step import FlatParams, Metrics, TrainState, init_state, train_step

# Purposes of the random keys drawn from the seed of the run; stages count on from the last.
PARAMETERS, FIRST_STAGE = 0, 1
ADAPTERS = (1 << 31) - 1  # from the key of a stage, whose steps count on from 0
DRAWN_AS_A_WHOLE = 1 << 26  # parameters: models up to 256 MB


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage, resolved.

    Attributes:
      stage: as configured.
      objective: its functions.
      shapes: path -> shape and dtype of all parameters, the objective's and the stage's adapters included.
      shardings: path -> layout.
      trainable: paths that train, in tree order.
      optimizer: update direction for these.
      schedule: step -> learning rate.
      rng: (2) uint32, key of the stage.
      loss_window, spike_factor: losses that spikes are judged by, and how; None = no judging.
    """

    stage: Stage
    objective: Objective
    shapes: dict[str, jax.ShapeDtypeStruct]
    shardings: dict[str, NamedSharding]
    trainable: list[str]
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    rng: jax.Array
    loss_window: int | None = None
    spike_factor: float | None = None

    def split(self, flat: FlatParams) -> tuple[FlatParams, FlatParams]:
        """(trainable, frozen)."""
        chosen = set(self.trainable)
        return (
            {path: flat[path] for path in self.trainable},
            {path: leaf for path, leaf in flat.items() if path not in chosen},
        )

    def abstract_params(self) -> dict[str, Any]:
        """All parameters as nested abstract arrays with their layout."""
        return unflatten({path: _abstract(shape, self.shardings[path]) for path, shape in self.shapes.items()})

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """The train state as abstract arrays: moments of the optimiser lie where their parameter lies."""
        trainable = {path: self.shapes[path] for path in self.trainable}
        shapes = jax.eval_shape(
            lambda t, rng: init_state(t, self.optimizer, rng, self.loss_window), trainable, self.rng
        )

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = getattr(path[-1], "key", None)
            same_shape = name in self.shapes and self.shapes[name].shape == leaf.shape
            return _abstract(leaf, self.shardings[name] if same_shape else replicated(mesh))

        return jax.tree_util.tree_map_with_path(place, shapes)


def _abstract(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: Model, objective: Objective) -> Any:
    """All parameters of a model and an objective as abstract arrays in Linen's boxes. Tracing takes seconds."""
    return jax.eval_shape(lambda key: init_params(model, objective, key), jax.random.key(0))


def plan_stage(config: ExperimentConfig, model: Model, stage: Stage, mesh: Mesh) -> StagePlan:
    """Resolves layout, trainable parameters, optimiser and schedule of a stage.

    Raises:
      UserError: a pattern matches nothing or a kernel that has an adapter, a parameter does not fit the mesh, or two
        starts trained the same parameter.
    """
    objective = objective_of(stage)
    check_objective(stage)
    boxed = with_adapters(parameter_shapes(model, objective), model.config, stage.lora)
    check_whole(boxed, mesh, config.mesh)
    shapes = flatten(unbox(boxed))
    chosen = set(trainable_paths(stage, list(shapes)))
    # What an objective adds has no value but in being trained.
    chosen.update(path for path in shapes if path.split("/")[0] in objective.extra_names)
    trainable = [path for path in shapes if path in chosen]
    _check_batch_norm(stage, list(shapes), trainable)
    _check_starts(config, stage, list(shapes))
    rate = peak_learning_rate(config, stage)
    purpose = FIRST_STAGE + config.stages.index(stage)
    matrices = muon_matrices({path: shapes[path] for path in trainable}) if stage.optimizer == "muon" else None
    if matrices is not None and not matrices:
        raise UserError(f'stages.{stage.name}.optimizer="muon", but it trains no matrix of the model; use "adamw"')
    return StagePlan(
        stage=stage,
        objective=objective,
        shapes=shapes,
        shardings=flatten(param_shardings(boxed, mesh)),
        trainable=trainable,
        optimizer=make_optimizer(
            config.optimizer,
            learning_rate_multipliers(stage.learning_rate_scale, trainable),
            matrices,
            factored=stage.optimizer == "adafactor",
            decayed=objective.decayed or DECAYED,
        ),
        schedule=lambda step: learning_rate(stage, step, rate),
        rng=jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), purpose)),
        loss_window=config.guard.loss_window,
        spike_factor=config.guard.spike_factor,
    )


def learning_rate(stage: Stage, step: jax.Array, peak: float) -> jax.Array:
    """Of optimiser step `step` (from 0) of a stage."""
    if stage.schedule == "constant":
        return warmup_constant(step, warmup_steps(stage.steps, stage.warmup_ratio), peak)
    return warmup_cosine(step, stage.steps, stage.warmup_ratio, peak)


def model_of_stage(model: Model, stage: Stage) -> Model:
    """The model as a stage runs it; its parameters are the same."""
    audio = model.config.audio
    if not stage.whole_clips or audio is None:
        return model
    encoder = dataclasses.replace(audio.encoder, dynamic_chunks=False)
    return model.clone(config=dataclasses.replace(model.config, audio=dataclasses.replace(audio, encoder=encoder)))


# The pass moves reductions of gradients out of the loop over micro-batches; with more than one loop around them it ends
# in an internal check of the compiler (RET_CHECK in while_loop_all_reduce_code_motion, libtpu 0.0.42).
TPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
# Of the vector memory of a v6e the compiler grants a kernel 32 MiB. The gradient of a grouped product takes all of that
# for its tiles and 4 % more, which ends in an error, as it does with 64 MiB; with what older chips grant it fits.
EXPERT_OPTIONS = {"TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": "16384"}}


def compiler_options(model: Model, mesh: Mesh) -> dict[str, str] | None:
    """What the compiler is told for a model on the devices of a mesh."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    return TPU_OPTIONS | (EXPERT_OPTIONS.get(device.device_kind, {}) if model.config.language.num_experts else {})


def compiled_step(model: Model, plan: StagePlan, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    """`(state, frozen, batch) -> (state, metrics)` of a stage, donating the state and keeping its layout."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state(mesh))
    step = functools.partial(
        train_step,
        loss_fn=functools.partial(plan.objective.loss, model_of_stage(model, plan.stage)),
        optimizer=plan.optimizer,
        schedule=plan.schedule,
        accumulation=plan.stage.accumulation,
        spike_factor=plan.spike_factor,
    )
    out = (layout, replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=compiler_options(model, mesh))


def _check_batch_norm(stage: Stage, paths: Sequence[str], trainable: Sequence[str]) -> None:
    """A step returns no running statistics, so an adapter with batch norm can be used but not trained."""
    normed = [path for path in paths if path.startswith("audio/adapter/") and path.endswith("/running_mean")]
    trained = [path for path in trainable if path.startswith("audio/adapter/")]
    if normed and trained:
        raise UserError(
            f"stages.{stage.name} trains {trained[0]}, but this audio adapter has batch norm ({normed[0]}), whose "
            "statistics training does not update; use model.audio.adapter kind 'subsampling' with norm 'layer' and "
            "one convolution, or freeze the adapter"
        )


def _check_starts(config: ExperimentConfig, stage: Stage, paths: Sequence[str]) -> None:
    """No parameter may have been trained by two of the stages this one starts from: it would be lost from one of
    them.
    """
    owner: dict[str, str] = {}
    names = {other.name for other in config.stages}
    for start in starts_of(stage):
        if start not in names:
            continue
        model_paths = [path for path in paths if path.split("/")[0] not in OBJECTIVES[stage.objective].extra_names]
        for path in trained_so_far(config.stage(start), config.stages, model_paths):
            if path in owner:
                raise UserError(
                    f"stages.{stage.name}.start_from: {owner[path]!r} and {start!r} have both trained {path}; "
                    "start from one of them"
                )
            owner[path] = start


def initial_params(config: ExperimentConfig, model: Model, plan: StagePlan, say: Say = lambda line: None) -> FlatParams:
    """The parameters a stage starts with, in their layout: what its starts contribute, the rest newly drawn.

    Args:
      config, model, plan: of the stage.
      say: takes a line about what becomes of adapters that it starts from.

    Raises:
      UserError: a start has no finished checkpoint, or its parameters have other shapes.
    """
    given = contributions(config, plan, say)
    if plan.stage.lora is not None and not any(is_adapter(path) for path in given):
        key = jax.random.fold_in(jax.random.wrap_key_data(plan.rng), ADAPTERS)
        given |= draw_adapters(model.config, plan.stage.lora, key, plan.shardings)
    missing = [path for path in plan.shapes if path not in given]
    extra = {path for path in missing if path.split("/")[0] in plan.objective.extra_names}
    key = jax.random.fold_in(jax.random.key(config.seed), PARAMETERS)

    def draw(init: Callable[[jax.Array], Any], paths: Sequence[str]) -> FlatParams:
        def chosen(key: jax.Array) -> FlatParams:
            drawn = flatten(unbox(init(key)))
            return {path: drawn[path] for path in paths}

        return jax.jit(chosen, out_shardings={path: plan.shardings[path] for path in paths})(key)

    if extra:
        given |= draw(lambda key: init_extra(model, plan.objective, key), sorted(extra))
    if len(missing) > len(extra):
        extra_names = plan.objective.extra_names
        whole = [path for path in plan.shapes if path.split("/")[0] not in extra_names and not is_adapter(path)]
        # Compiling takes longer than drawing a small model; a program that draws all of it serves all stages.
        small = sum(math.prod(plan.shapes[path].shape) for path in whole) <= DRAWN_AS_A_WHOLE
        drawn = draw(lambda key: init_model(model, key), whole if small else [p for p in missing if p not in extra])
        given |= {path: drawn[path] for path in missing if path not in extra}
    return {path: given[path] for path in plan.shapes}


POSITIONS = "vision/embeddings/position_embedding"  # of CLIP's tower


def other_resolution(plan: StagePlan, loaded: FlatParams, start: str, say: Say) -> FlatParams:
    """The tower's position embeddings for the size of picture that the stage has, where its start has another; else
    nothing.
    """
    old, new = loaded.get(POSITIONS), plan.shapes.get(POSITIONS)
    if old is None or new is None or len(old.shape) != 2 or old.shape == new.shape or old.shape[1] != new.shape[1]:
        return {}
    say(f"{plan.stage.title}: positions of {old.shape[0] - 1} patches of {start} are resized to {new.shape[0] - 1}\n")
    return {POSITIONS: jax.device_put(resize_positions(old, new.shape[0] - 1), plan.shardings[POSITIONS])}


def contributions(config: ExperimentConfig, plan: StagePlan, say: Say) -> FlatParams:
    """What the starts of a stage give it, adapters as `settle_adapters` says. Of several, a later one wins where both
    give (never where both were trained).
    """
    starts = starts_of(plan.stage)
    names = {stage.name for stage in config.stages}
    given: FlatParams = {}
    for start in starts:
        own = start in names
        folder = checkpoint_folder(config.run_dir, start) if own else place(start)
        saved = flatten(load_params(folder, unflatten(plan.shardings)).params)
        loaded = {path: leaf.astype(jnp.float32) for path, leaf in saved.items()}
        loaded = settle_adapters(plan.stage, loaded, plan.shapes, start, say)
        loaded |= other_resolution(plan, loaded, start, say)
        paths = set(loaded)
        if own and len(starts) > 1:
            paths = trained_so_far(config.stage(start), config.stages, list(loaded))
        for path in sorted(paths):
            if path not in plan.shapes or plan.shapes[path].shape != loaded[path].shape:
                want = plan.shapes[path].shape if path in plan.shapes else "no such parameter"
                raise UserError(
                    f"stages.{plan.stage.name}.start_from: {folder} has {path} with shape {loaded[path].shape}, "
                    f"the model of this run expects {want}"
                )
            given[path] = loaded[path]
    return given
