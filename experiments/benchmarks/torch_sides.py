"""One model twice, ours and PyTorch's, with equal weights: the two sides of `torch_ratio`.

Weights are drawn here and carried over by the package's own tables. Language models then take transformers' way in, as
a public folder of any of them would; its vision tower has other names than the published files, see `internvl_tensors`.
PyTorch's side of an operation comes in several kinds (of attention, caches, experts). All of them must give what ours
gives, and the fastest is timed: see `fastest`.

Axes: b rows, s positions, v vocabulary, d width.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from experiments.benchmarks.turns import Call, pilot_seconds
from vita_jax.conversion.tables import Table, export_params, flatten
from vita_jax.conversion.torch_files import write_tensors
from vita_jax.errors import UserError
from vita_jax.inference.generate import decode_step, generate, prefill
from vita_jax.models.language import decoder_weights
from vita_jax.models.language.cache import KVCache
from vita_jax.models.language.decoder import Decoder, DecoderConfig, make_cache
from vita_jax.models.vision import internvit_weights
from vita_jax.models.vision.internvit import InternViT, InternViTConfig
from vita_jax.models.vita import Vita, text_inputs, vita_small
from vita_jax.training.objectives.base import LossSums
from vita_jax.training.objectives.language import language_modeling_loss
from vita_jax.training.optimizer import OptimizerConfig, make_optimizer
from vita_jax.training.step import LossFn, init_state, train_step

transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4  # of every number that is compared, relative where it is larger than 1
RATE = 1e-5  # hardly moves the weights, however many steps are timed
TRAIN_CHECKS = 3  # steps compared: the second and third see what the optimiser made of the first
NOISE = 0.1  # on biases and scales, which are drawn as 0 and 1 and would hide a mistake in their place
SHARD_BYTES = 5 * 10**9
OPTIMIZER = OptimizerConfig()
DECODED_ROWS = (1, 8)
STEPS = "stepwise"

# Kinds of PyTorch's side, of which the fastest counts.
ATTENTION = ("sdpa", "eager")
CACHES = ("dynamic", "static")
EXPERTS = ("grouped_mm", "eager")
DECODING_EXPERTS = (*EXPERTS, "batched_mm")  # the last one copies the matrices of every token, too many for a long row
ANSWERED = 16  # tokens of the prompts that are answered


@dataclass(frozen=True)
class Shape:
    """Sizes of the operations.

    Attributes:
      rows, length: b and s of training and the forward pass; for a tower only b, its tiles.
      prompt: s of the prefill, of one row.
      new_tokens: of every answer, after a prompt of `ANSWERED` tokens.
    """

    rows: int
    length: int = 0
    prompt: int = 0
    new_tokens: int = 0


class Kind(NamedTuple):
    """A way to run PyTorch's side; None where a model or an operation has no such choice."""

    attention: str
    experts: str | None = None
    cache: str | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """As printed."""
        return ", ".join(filter(None, (*self[:3], "torch.compile" if self.compiled else None)))


class Operation(NamedTuple):
    """One operation both ways.

    Attributes:
      ours: returns arrays.
      theirs: the model and a cache's kind -> PyTorch's call, which returns tensors.
      model: that is copied for every kind.
      kinds: to choose from.
      checks: calls whose results are compared, one after the other.
      spared: so many of them may differ. A token whose next best expert is as good within rounding may go to either,
        which changes that step and no other.
    """

    ours: Call
    theirs: Callable[[torch.nn.Module, str | None], Call]
    model: torch.nn.Module
    kinds: tuple[Kind, ...]
    checks: int = 1
    spared: int = 0


Operations = dict[str, Callable[[], Operation]]


class Fastest(NamedTuple):
    """PyTorch's fastest side of an operation, and the largest difference of any of its numbers to ours."""

    call: Call
    kind: Kind
    difference: float


def fastest(operation: Operation, what: str, clock: str = "wall") -> Fastest:
    """Compares every kind of PyTorch's side with ours, and times it briefly.

    Raises:
      UserError: two results differ by more than `TOLERANCE`.
    """
    wanted = [_arrays(operation.ours()) for _ in range(operation.checks)]
    best: tuple[float, Call, Kind] | None = None
    largest = 0.0
    for kind in operation.kinds:
        model = copy.deepcopy(operation.model)
        model.set_attn_implementation(kind.attention)
        if kind.experts is not None:
            model.set_experts_implementation(kind.experts)
        if kind.compiled:
            model.forward = torch.compile(model.forward, dynamic=False)
        call = operation.theirs(model, kind.cache)
        differences = sorted(_difference(want, _arrays(call())) for want in wanted)
        difference = differences[len(wanted) - 1 - operation.spared]
        if not difference <= TOLERANCE:
            raise UserError(
                f"{what}: PyTorch ({kind.name}) differs from ours by {difference:.1e}, more than {TOLERANCE:.0e}; "
                "both must compute the same before they are timed"
            )
        largest = max(largest, difference)
        seconds = pilot_seconds(call, clock)
        if best is None or seconds < best[0]:
            best = (seconds, call, kind)
    return Fastest(best[1], best[2], largest)


def _arrays(results: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(result) for result in results]


def _difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest, relative to numbers above 1; infinite if shapes differ or a number is none."""
    if [array.shape for array in ours] != [array.shape for array in theirs]:
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    relative = [np.abs(a - b) / np.maximum(1.0, np.abs(b)) for a, b in pairs]
    return max(float(np.nan_to_num(array, nan=np.inf).max()) for array in relative)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def draw(module: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Parameters of a fresh module (nested), with noise on what is drawn as a constant."""
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(0)

    def shaken(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key in ("kernel", "embedding"):
            return leaf
        return leaf + jnp.asarray(NOISE * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(shaken, params)


def settled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with every parameter in memory of its own, not in a file's."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module.eval()


def language_sides(config: DecoderConfig) -> tuple[Vita, dict[str, Any], torch.nn.Module]:
    """Our model without its other parts, its parameters {"language"}, and transformers' with the same weights."""
    model = Vita(replace(vita_small(config.hidden_size, 1), language=config))
    token = jnp.zeros((1, 1), jnp.int32)
    params = draw(Decoder(config), jnp.zeros((1, 1, config.hidden_size)), token, token)
    table = decoder_weights.weight_table(config)
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder), export_params(table, params).items(), max_shard_bytes=SHARD_BYTES)
        fields = decoder_weights.config_to_hf(config)
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, {"language": params}, settled(loaded)


# Names of published towers -> transformers'; `attn.qkv`, one matrix there, is three here.
INTERNVL_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
    ("encoder.layers.", "encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
QKV = ".attention.qkv."


def internvl_tensors(table: Table, params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A tower's weights by transformers' names."""
    tensors = {}
    for name, array in export_params(table, params).items():
        for published, renamed in INTERNVL_NAMES:
            name = name.replace(published, renamed)
        if QKV in name:
            parts = zip("qkv", np.split(array, 3), strict=True)
            tensors |= {name.replace(QKV, f".attention.{letter}_proj."): part for letter, part in parts}
        else:
            tensors[name] = array
    return {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}


def vision_sides(config: InternViTConfig) -> tuple[InternViT, dict[str, Any], torch.nn.Module]:
    """Our tower, its parameters, and transformers' with the same weights."""
    model = InternViT(config)
    params = draw(model, jnp.zeros((1, config.image_size, config.image_size, config.num_channels)))
    theirs = transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            attention_bias=config.qkv_bias,
            use_qk_norm=config.qk_normalization,
            intermediate_size=config.intermediate_size,
            norm_type=config.norm_type,
            layer_norm_eps=config.layer_norm_eps,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    )
    theirs.load_state_dict(internvl_tensors(internvit_weights.weight_table(config), params))
    return model, params, settled(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train_ours(loss_fn: LossFn, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> Call:
    """Optimiser steps on one batch, one after the other: returns loss and norm of the gradient."""
    flat = {path: jnp.array(leaf) for path, leaf in flatten(params).items()}  # the step's own: it gives them away
    optimizer = make_optimizer(OPTIMIZER, dict.fromkeys(flat, 1.0))
    step = jax.jit(
        partial(train_step, loss_fn=loss_fn, optimizer=optimizer, schedule=lambda number: jnp.float32(RATE)),
        donate_argnums=0,
    )
    state = init_state(flat, optimizer, jax.random.key_data(jax.random.key(0)))

    def call() -> list[jax.Array]:
        nonlocal state
        state, metrics = step(state, {}, batch)
        jax.block_until_ready(state)
        return [metrics["loss"], metrics["grad_norm"]]

    return call


def train_theirs(loss_of: Callable[[torch.nn.Module], torch.Tensor], model: torch.nn.Module, cache: None) -> Call:
    """The same by torch's fused AdamW."""
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=RATE,
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        weight_decay=o.weight_decay,
        fused=True,
    )
    model.train()

    def call() -> list[torch.Tensor]:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.get_total_norm(_matrices(model))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), o.clip_norm, norm)
        optimizer.step()
        return [loss.detach(), norm.detach()]

    return call


def _matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """All gradients, with those of experts one by one: torch adds the squares of a tensor up in one float32, which in a
    stack of millions of numbers is off by more than `TOLERANCE`."""
    gradients = (parameter.grad for parameter in model.parameters())
    return [matrix for gradient in gradients for matrix in (gradient if gradient.ndim == 3 else (gradient,))]


# ---------------------------------------------------------------------------------------------------------------------
# Language models
# ---------------------------------------------------------------------------------------------------------------------


def language_operations(config: DecoderConfig, shape: Shape, compiled: bool = False) -> Operations:
    """What a language model is timed at.

    "train" is the package's step with its objective, every token a target; "forward" gives the logits of all positions;
    "prefill" those after the last one, and a filled cache; "decode b" answers b prompts in one call, and "stepwise"
    one prompt by a call for every token, as conversations are answered; both with their prefill.

    Args:
      config, shape: sizes.
      compiled: PyTorch's side also by `torch.compile`.
    """
    model, params, theirs = language_sides(config)
    size = (max(shape.rows, max(DECODED_ROWS)), max(shape.length, shape.prompt, ANSWERED))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, size)
    rows, prompt = tokens[: shape.rows, : shape.length], tokens[:1, : shape.prompt]
    kinds = partial(_kinds, config.num_experts > 0, compiled)

    def train() -> Operation:
        batch = {**vars(text_inputs(_ids(rows))), "labels": _ids(rows)}
        batch = {name: array for name, array in batch.items() if array is not None}
        target = torch.from_numpy(rows)

        def loss_of(model: torch.nn.Module) -> torch.Tensor:
            return model(input_ids=target, labels=target, use_cache=False).loss

        ours = train_ours(partial(language_modeling_loss, model), params, batch)
        spared = 1 if config.num_experts else 0
        return Operation(ours, partial(train_theirs, loss_of), theirs, kinds(), TRAIN_CHECKS + 2 * spared, spared)

    def forward() -> Operation:
        return Operation(_forward_ours(model, params, rows), partial(_forward_theirs, rows), theirs, kinds())

    def start() -> Operation:
        ours = _prefill_ours(model, params, prompt)
        return Operation(ours, partial(_prefill_theirs, prompt), theirs, kinds(caches=CACHES))

    def decode(number: int) -> Operation:
        prompts = tokens[:number, :ANSWERED]
        ours = _generate_ours(model, params, prompts, shape.new_tokens)
        return Operation(ours, partial(_generate_theirs, prompts, shape.new_tokens), theirs, kinds(caches=CACHES))

    def steps() -> Operation:
        return decode(1)._replace(ours=_steps_ours(model, params, tokens[:1, :ANSWERED], shape.new_tokens))

    decoding = {f"decode {number}": partial(decode, number) for number in DECODED_ROWS}
    return {"train": train, "forward": forward, "prefill": start, **decoding, STEPS: steps}


def _kinds(sparse: bool, compiled: bool, caches: tuple[str | None, ...] = (None,)) -> tuple[Kind, ...]:
    experts = (None,) if not sparse else EXPERTS if caches == (None,) else DECODING_EXPERTS
    kinds = [Kind(*chosen) for chosen in itertools.product(ATTENTION, experts, caches)]
    return (*kinds, Kind(ATTENTION[0], experts[0], caches[-1], compiled=True)) if compiled else tuple(kinds)


def _ids(tokens: np.ndarray) -> jax.Array:
    return jnp.asarray(tokens, jnp.int32)


def _forward_ours(model: Vita, params: Mapping[str, Any], tokens: np.ndarray) -> Call:
    @jax.jit
    def logits(params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        hidden = model.apply({"params": params}, text_inputs(tokens))
        return model.apply({"params": params}, hidden, method="logits")

    ids = _ids(tokens)
    return lambda: [jax.block_until_ready(logits(params, ids))]


def _forward_theirs(tokens: np.ndarray, model: torch.nn.Module, cache: None) -> Call:
    ids = torch.from_numpy(tokens)

    @torch.inference_mode()
    def call() -> list[torch.Tensor]:
        return [model(input_ids=ids, use_cache=False).logits]

    return call


def _start(model: Vita, slots: int) -> Callable[[Mapping[str, Any], jax.Array], tuple[jax.Array, KVCache]]:
    """(parameters, tokens (b s)) -> logits after the last one (b v), and a cache of `slots`; compiled."""

    @jax.jit
    def start(params: Mapping[str, Any], tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        inputs = text_inputs(tokens)
        embeds = model.apply({"params": params}, inputs, method="embed_inputs")
        cache = make_cache(model.config.language, len(tokens), slots, embeds.dtype)
        return prefill(model.decoder, params["language"], embeds, inputs.positions, inputs.segment_ids, cache)

    return start


def _prefill_ours(model: Vita, params: Mapping[str, Any], tokens: np.ndarray) -> Call:
    start, ids = _start(model, tokens.shape[1]), _ids(tokens)
    return lambda: [jax.block_until_ready(start(params, ids))[0]]


def _make_cache(kind: str, model: torch.nn.Module, slots: int) -> transformers.Cache:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=slots)
    return transformers.DynamicCache(config=model.config)


def _prefill_theirs(tokens: np.ndarray, model: torch.nn.Module, cache: str) -> Call:
    ids = torch.from_numpy(tokens)

    @torch.inference_mode()
    def call() -> list[torch.Tensor]:
        filled = _make_cache(cache, model, tokens.shape[1])
        return [model(input_ids=ids, past_key_values=filled, use_cache=True, logits_to_keep=1).logits[:, -1]]

    return call


def _generate_ours(model: Vita, params: Mapping[str, Any], prompts: np.ndarray, new_tokens: int) -> Call:
    inputs = text_inputs(_ids(prompts))
    return lambda: [jax.block_until_ready(generate(model, params, inputs, max_new_tokens=new_tokens).tokens)]


def _steps_ours(model: Vita, params: Mapping[str, Any], prompt: np.ndarray, new_tokens: int) -> Call:
    """A call of the compiled step for every token, which is read before the next one."""
    start = _start(model, prompt.shape[1] + new_tokens)

    @partial(jax.jit, donate_argnums=2)
    def step(params: Mapping[str, Any], token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        logits, cache = decode_step(model.decoder, params["language"], token, cache)
        return jnp.argmax(logits, axis=-1), cache

    ids = _ids(prompt)

    def call() -> list[np.ndarray]:
        logits, cache = start(params, ids)
        answer = [np.argmax(np.asarray(logits), axis=-1)]
        for _ in range(new_tokens - 1):
            token, cache = step(params, answer[-1], cache)
            answer.append(np.asarray(token))
        return [np.stack(answer, axis=1)]

    return call


def _generate_theirs(prompts: np.ndarray, new_tokens: int, model: torch.nn.Module, cache: str) -> Call:
    """A plain loop: `model.generate` does the same and more at every token."""
    ids = torch.from_numpy(prompts)

    @torch.inference_mode()
    def call() -> list[torch.Tensor]:
        filled = _make_cache(cache, model, prompts.shape[1] + new_tokens)
        given, answer = ids, []
        for _ in range(new_tokens):
            logits = model(input_ids=given, past_key_values=filled, use_cache=True, logits_to_keep=1).logits
            given = logits[:, -1].argmax(dim=-1, keepdim=True)
            answer.append(given)
        return [torch.cat(answer, dim=1)]

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Vision towers
# ---------------------------------------------------------------------------------------------------------------------


def vision_operations(config: InternViTConfig, shape: Shape, compiled: bool = False) -> Operations:
    """ "train" makes the mean square of what the tower gives smaller; "forward" gives its last hidden state."""
    model, params, theirs = vision_sides(config)
    side = config.image_size
    pixels = np.random.default_rng(1).standard_normal((shape.rows, side, side, config.num_channels), np.float32)
    mine, other = jnp.asarray(pixels), torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    kinds = _kinds(False, compiled)

    def train() -> Operation:
        def loss_fn(params: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array) -> LossSums:
            hidden = model.apply({"params": params}, batch["pixels"])
            return LossSums(jnp.sum(jnp.square(hidden)), jnp.float32(hidden.size), {})

        def loss_of(model: torch.nn.Module) -> torch.Tensor:
            return model(other).last_hidden_state.square().mean()

        ours = train_ours(loss_fn, params, {"pixels": mine})
        return Operation(ours, partial(train_theirs, loss_of), theirs, kinds, TRAIN_CHECKS)

    def forward() -> Operation:
        hidden = jax.jit(lambda params, pixels: model.apply({"params": params}, pixels))

        def others(model: torch.nn.Module, cache: None) -> Call:
            return torch.inference_mode()(lambda: [model(other).last_hidden_state])

        return Operation(lambda: [jax.block_until_ready(hidden(params, mine))], others, theirs, kinds)

    return {"train": train, "forward": forward}
