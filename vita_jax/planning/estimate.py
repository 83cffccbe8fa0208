"""How long a step takes at least, and what it keeps in memory, by formula from shapes and data sheets.

All numbers are of one device and one optimiser step. Symbols: W bytes of the parameters in the compute dtype, P float32
parameters of this device, D devices of a chip's share.

Arithmetic.  Model FLOPs (`vita_jax.training.flops`) plus those that rematerialisation repeats, one more forward pass of
  the layers it covers, at the chip's datasheet rate for bfloat16.
Memory.  Every pass over a layer reads its weights in the compute dtype once per micro-batch (forward, backward for
  inputs, backward for weights, and once more if the forward pass is repeated); the optimiser reads parameter, gradient
  and moments and writes parameter and moments, in the precision they are stored in; every layer writes and reads its
  input and what it keeps. Products that stay on the chip between operations are not counted, so this is a lower bound.
Links.  Bytes a device sends (`collectives`), at the chip's datasheet rate for all its links together.
Step.  The largest of the three: as if each hid behind the others. What a step really takes is never less.
MFU.  Model FLOPs (without repeated ones) / (step x peak): an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from vita_jax.parallel.chips import Chip
from vita_jax.parallel.mesh import BATCH_AXES
from vita_jax.planning.collectives import Collective
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.flops import StageFlops, stage_flops
from vita_jax.training.plan import StagePlan
from vita_jax.training.stages import Stage


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What stays in the memory of one device between steps: exact, from shapes and layouts."""

    trainable: float
    frozen: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.trainable + self.frozen + self.optimizer


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Least seconds of a step by what limits it, and what follows.

    Attributes:
      arithmetic, memory, links: see the head of the file.
      flops: model FLOPs of a step over all devices.
      tokens: positions of the language model in a step (or frames, samples: what a row is made of), over all devices.
      mfu: upper bound of the model FLOPs utilisation, 0 .. 1.
    """

    arithmetic: float
    memory: float
    links: float
    flops: float
    tokens: float
    mfu: float

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return max(self.arithmetic, self.memory, self.links)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(("arithmetic", "memory", "links"), key=lambda name: getattr(self, name))


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of one device's part of an abstract array."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return float(math.prod(shape) * np.dtype(leaf.dtype).itemsize)


def state_bytes(plan: StagePlan) -> StateBytes:
    """Parameters and optimiser state of one device."""
    mesh = next(iter(plan.shardings.values())).mesh
    sizes = {path: _param_bytes(plan, path) for path in plan.shapes}
    chosen = set(plan.trainable)
    moments = jax.tree.leaves(plan.abstract_state(mesh).opt_state)
    return StateBytes(
        trainable=sum(size for path, size in sizes.items() if path in chosen),
        frozen=sum(size for path, size in sizes.items() if path not in chosen),
        optimizer=sum(shard_bytes(leaf) for leaf in moments),
    )


def _param_bytes(plan: StagePlan, path: str) -> float:
    leaf = plan.shapes[path]
    return float(math.prod(plan.shardings[path].shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize)


def component_parameters(plan: StagePlan) -> dict[str, tuple[int, int]]:
    """Component -> number of parameters and how many of them train, over all devices. `language/moe` is on its own."""
    chosen, totals = set(plan.trainable), {}
    for path, leaf in plan.shapes.items():
        parts = path.split("/")
        name = "/".join(parts[:2]) if parts[0] == "audio" else parts[0]
        name = "language experts" if "moe" in parts and "router" not in parts else name
        number, trained = totals.get(name, (0, 0))
        size = math.prod(leaf.shape)
        totals[name] = (number + size, trained + (size if path in chosen else 0))
    return totals


def compute_bytes(config: ExperimentConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return 2 if config.dtypes.compute_dtype == "bfloat16" else 4


def used_parameters(plan: StagePlan, stage: Stage) -> list[str]:
    """Paths that a step of this stage computes with."""
    components = {
        "cell_naming": ("vision", "naming_head"),
        "ctc": ("audio", "ctc_head", "ctc_state"),
        "codec": ("codec", "codec_state", "discriminators"),
        "speech_decoder": ("speech",),
        "flamingo": ("vision", "resampler", "cross_attention", "language"),
    }.get(stage.objective)
    if components is None:
        components = ["language", "state_head"]
        components += ["vision", "projector"] if stage.row_tiles else []
        components += ["audio"] if stage.row_clips else []
    return [path for path in plan.shapes if path.split("/")[0] in components]


def memory_traffic(config: ExperimentConfig, stage: Stage, plan: StagePlan, state: StateBytes) -> float:
    """Bytes that one device moves to and from its memory in a step, at least."""
    mesh = next(iter(plan.shardings.values())).mesh
    # Parameters cut along `fsdp` are gathered before use: a device reads all that its tensor or expert shard needs.
    gathered = sum(_param_bytes(plan, path) / 4 * mesh.shape["fsdp"] for path in used_parameters(plan, stage))
    trains = bool(plan.trainable)
    passes = 1 + (2 if trains else 0) + (1 if config.model.language.remat != "none" else 0)
    weights = passes * stage.accumulation * gathered * compute_bytes(config)
    gradients = state.trainable
    update = 2 * state.trainable + 2 * state.optimizer + 2 * gradients
    return weights + update + activation_traffic(config, stage, mesh.shape)


def activation_traffic(config: ExperimentConfig, stage: Stage, mesh: Mapping[str, int]) -> float:
    """Inputs of the language model's layers, written once and read twice."""
    if stage.objective not in ("language_modeling", "text_pretraining"):
        return 0.0
    language = config.model.language
    return 3.0 * language.num_layers * device_tokens(stage, mesh) * language.hidden_size * compute_bytes(config)


def device_tokens(stage: Stage, mesh: Mapping[str, int]) -> float:
    """Positions of a step that one device holds."""
    shards = math.prod(mesh[axis] for axis in BATCH_AXES) * mesh["context"]
    return stage.batch_size * stage.row_length / shards


def repeated_share(config: ExperimentConfig) -> float:
    """Forward passes that are computed again, as a share of model FLOPs (forward 1, backward 2)."""
    return {"none": 0.0, "dots": 0.0}.get(config.model.language.remat, 1 / 3)


def step_time(
    config: ExperimentConfig,
    stage: Stage,
    plan: StagePlan,
    chip: Chip,
    sent: Sequence[Collective] | float,
    flops: StageFlops | None = None,
) -> StepTime:
    """Least time of a step.

    Args:
      config, stage, plan: what runs, and where.
      chip: its datasheet.
      sent: the program's collectives, or bytes that a device sends.
      flops: of the stage, if known.
    """
    mesh = next(iter(plan.shardings.values())).mesh
    flops = stage_flops(config, stage) if flops is None else flops
    share, rate = mesh.size, chip.peak_flops_bf16 / chip.devices
    moved = memory_traffic(config, stage, plan, state_bytes(plan))
    links = sent if isinstance(sent, float) else sum(one.total for one in sent)
    times = (
        flops.total * (1 + repeated_share(config)) / share / rate,
        moved / (chip.hbm_bandwidth / chip.devices),
        links / (chip.ici_bandwidth / chip.devices),
    )
    mfu = flops.total / share / rate / max(times)
    return StepTime(*times, flops=flops.total, tokens=stage.batch_size * stage.row_length, mfu=mfu)


# ---- without a compiler ---------------------------------------------------------------------------------------------


def formula_bytes_sent(config: ExperimentConfig, stage: Stage, plan: StagePlan) -> float:
    """What fully sharded training sends, by formula: weights gathered in the compute dtype for each pass over them,
    float32 gradients scattered once, and with `tensor` four sums of activations per layer (two forward, two backward).
    """
    mesh = next(iter(plan.shardings.values())).mesh
    fsdp, tensor, data = (mesh.shape[axis] for axis in ("fsdp", "tensor", "data"))
    used, chosen = used_parameters(plan, stage), set(plan.trainable)
    shard = sum(_param_bytes(plan, path) for path in used)
    trained = sum(_param_bytes(plan, path) for path in used if path in chosen)
    passes = (2 if plan.trainable else 1) + (1 if config.model.language.remat != "none" else 0)
    gathers = passes * stage.accumulation * shard / 4 * compute_bytes(config) * (fsdp - 1)
    scatters = stage.accumulation * trained * (fsdp - 1) + 2 * trained * (data - 1) / data
    language = config.model.language
    one_sum = (
        2 * device_tokens(stage, mesh.shape) * language.hidden_size * compute_bytes(config) * (tensor - 1) / tensor
    )
    return gathers + scatters + 4 * language.num_layers * one_sum


def formula_temporaries(config: ExperimentConfig, stage: Stage, plan: StagePlan) -> float:
    """Temporaries by formula: float32 gradients, the kept inputs of all layers, the working set of one layer, its
    gathered weights, and one chunk of logits. For machines without a compiler here, and to order what is compiled.
    """
    mesh = next(iter(plan.shardings.values())).mesh
    language, size = config.model.language, compute_bytes(config)
    gradients = sum(_param_bytes(plan, path) for path in plan.trainable)
    tokens = device_tokens(stage, mesh.shape) / stage.accumulation
    kept = {"none": 14.0, "dots": 6.0}.get(language.remat, 1.0) + (
        {"none": 3.0, "dots": 3.0}.get(language.remat, 0.0) * language.intermediate_size / language.hidden_size
    )
    layers = language.num_layers * tokens * language.hidden_size * size * kept
    width = language.intermediate_size * max(1, language.experts_per_token if language.num_experts else 1)
    working = tokens * (6 * language.hidden_size + 3 * width / mesh.shape["tensor"]) * size
    stacked = [path for path in plan.shapes if path.startswith("language/layers/")]
    layer = sum(_param_bytes(plan, path) for path in stacked) / 4 * size * mesh.shape["fsdp"] / language.num_layers
    head = language.vocab_size * language.hidden_size / mesh.shape["tensor"] * size
    logits = min(512, stage.row_length) * language.vocab_size / mesh.shape["tensor"] * 4 * 2
    return gradients + layers + working + 2 * layer + 2 * head + logits
