"""Golden cases of the language model, the whole composition and its training: `qwen2`, `vita`, `vita_train_step`."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tests.parity.adapters.audio import tower_config
from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import Table, export_params, flatten, import_params
from vita_jax.data.splice import (
    AUDIO_PLACEHOLDER,
    IMAGE_PLACEHOLDER,
    FeatureLayout,
    Spliced,
    expand_placeholders,
    pad_rows,
)
from vita_jax.inference.generate import generate_from_embeds
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.language.decoder import Decoder
from vita_jax.models.language.experts import ROUTER, router_logits
from vita_jax.models.state_head import language_labels
from vita_jax.models.vision import internvit_weights
from vita_jax.models.vision.frame_pooling import frame_lengths
from vita_jax.models.vita import Vita, VitaConfig, VitaInputs
from vita_jax.models.vita_weights import weight_table
from vita_jax.ops.experts import balance
from vita_jax.ops.losses import next_token_loss
from vita_jax.training.objectives import LossSums, language_modeling_loss
from vita_jax.training.optimizer import OptimizerConfig, learning_rate_multipliers, make_optimizer
from vita_jax.training.stages import unflatten
from vita_jax.training.step import init_state, train_step

SLOW_FAST_GRIDS = (12, 7)
# What each `trainable_mode` of the cases trains, as paths of the parameter tree.
TRAINABLE = {"projector": r"projector/", "adapter": r"audio/adapter/", "full": r"(vision|projector|language)/"}


def greedy(decoder: Decoder, params: Any, embeds: Any, positions: Any, segment_ids: Any, count: int) -> jax.Array:
    """The `count` most likely tokens after (b s d), each given those before it."""
    generate = jax.jit(generate_from_embeds, static_argnames=("decoder", "max_new_tokens"))
    return generate(decoder, params, embeds, positions, segment_ids, max_new_tokens=count).tokens


def positions_of(ids: np.ndarray) -> np.ndarray:
    """(b s) int32: every row counts from 0."""
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def qwen2(case: Case) -> Result:
    """The bare language model: every hidden state, logits, loss, explicit positions, greedy continuation."""
    config = decoder_weights.config_from_hf(case.config)
    params = import_params(decoder_weights.weight_table(config), case.weights)
    decoder, inputs = Decoder(config), case.inputs
    mask = inputs["attention_mask"]

    @jax.jit
    def run(params: Any, ids: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> tuple:
        variables = {"params": params}
        embeds = decoder.apply(variables, ids, method="embed")
        (hidden, _), kept = decoder.apply(variables, embeds, positions, segment_ids, mutable=["intermediates"])
        states = kept["intermediates"]["layers"]["layer_input"][0]
        return states, hidden, decoder.apply(variables, hidden, method="logits")

    ids = inputs["input_ids"]
    states, hidden, logits = run(params, ids, positions_of(ids), mask)
    outputs = {f"hidden_states.{i}": state for i, state in enumerate([*states, hidden])}
    total, count = next_token_loss(hidden, params["lm_head"]["kernel"], inputs["labels"], mask, chunk_size=5)
    outputs |= {"logits": logits, "loss": total / count}
    if "position_ids" in inputs:
        outputs["logits_position_ids"] = run(params, ids, inputs["position_ids"], mask)[2]
    if "greedy_prompt_ids" in inputs:
        prompt = inputs["greedy_prompt_ids"]
        embeds = decoder.apply({"params": params}, prompt, method="embed")
        steps = case.outputs["greedy_ids"].shape[1]
        outputs["greedy_ids"] = greedy(decoder, params, embeds, positions_of(prompt), np.ones_like(prompt), steps)
    valid = {name: mask[..., None] for name in case.outputs if name.startswith(("hidden_states", "logits"))}
    return Result(outputs, valid)


def vita(case: Case) -> Result:
    """The whole model from raw tiles and placeholder ids."""
    config = _vita_config(case)
    params = import_params(weight_table(config), case.weights)
    model, tokens_per_tile = Vita(config), config.tokens_per_tile
    images = rearrange(case.inputs["images"], "n c h w -> n h w c")
    batch, labels = _spliced_batch(case, config, images)

    @jax.jit
    def run(params: Any, images: jax.Array, audios: jax.Array, lengths: jax.Array, batch: VitaInputs) -> dict[str, Any]:
        def apply(*args: Any, method: str) -> Any:
            return model.apply({"params": params}, *args, method=method)

        hidden, kept = model.apply({"params": params}, batch, mutable=[ROUTER])
        routed = {"router_logits": router_logits(kept)} if config.language.num_experts else {}
        return routed | {
            "vision_features": apply(images, method="tower_features"),
            "image_features": apply(images[:, None], method="encode_tiles")[:, :tokens_per_tile],
            "audio": apply(audios, lengths, method="audio_features"),
            "inputs_embeds": apply(batch, method="embed_inputs"),
            "last_hidden_state": hidden,
            "logits": apply(hidden, method="logits"),
        }

    outputs = run(params, images, case.inputs["audios"], case.inputs["audio_lengths"], batch)
    audio = outputs.pop("audio")
    outputs |= {
        "audio_encoder_out": audio.hidden,
        "audio_features": audio.embeds,
        "audio_attention_mask": np.asarray(audio.valid, np.int32),
    }
    kernel = params["language"]["lm_head"]["kernel"]
    lm_labels = language_labels(labels)  # some cases have state labels among them
    total, count = next_token_loss(outputs["last_hidden_state"], kernel, lm_labels, batch.segment_ids, chunk_size=7)
    mask = np.asarray(batch.segment_ids)
    outputs |= {"labels": labels, "attention_mask": mask, "position_ids": batch.positions, "loss": total / count}
    if "router_logits" in outputs:
        logits = outputs.pop("router_logits")
        aux = balance(logits, config.language.experts_per_token, mask).loss
        outputs |= {f"router_logits.{i}": rearrange(x, "b s e -> (b s) e") for i, x in enumerate(logits)}
        coefficient = case.config["llm"]["router_aux_loss_coef"]  # the config has it, but switched off
        outputs |= {"aux_loss": aux, "loss_with_aux": outputs["loss"] + coefficient * aux}
    if "greedy_ids" in case.outputs:
        embeds, steps = outputs["inputs_embeds"], case.outputs["greedy_ids"].shape[1]
        args = (params["language"], embeds, batch.positions, batch.segment_ids, steps)
        outputs["greedy_ids"] = greedy(model.decoder, *args)
    valid = {name: mask[..., None] for name in ("inputs_embeds", "last_hidden_state", "logits")}
    prompts = config.audio.num_prompt_tokens
    own_embeds = np.pad(audio.valid, ((0, 0), (prompts, 0)), constant_values=True)
    valid |= {"audio_encoder_out": audio.hidden_valid[..., None], "audio_features": own_embeds[..., None]}
    valid |= {"position_ids": mask}
    valid |= {name: mask.reshape(-1, 1) for name in case.outputs if name.startswith("router_logits")}
    return Result(outputs, {name: where for name, where in valid.items() if name in case.outputs})


def vita_train_step(case: Case) -> Result:
    """One optimiser step of the training code, from the weights of the case."""
    config, settings = _vita_config(case), case.config["optimizer"]
    table = weight_table(config)
    batch, labels = _spliced_batch(case, config, rearrange(case.inputs["images"], "n c h w -> n h w c"))
    arrays = {name: value for name, value in vars(batch).items() if value is not None} | {"labels": labels}
    params = flatten(import_params(table, case.weights))
    pattern = TRAINABLE[case.config["trainable_mode"]]
    trainable = {path: jnp.asarray(x) for path, x in params.items() if re.match(pattern, path)}
    frozen = {path: x for path, x in params.items() if path not in trainable}
    vision_rate = settings.get("vision_tower_lr")
    scales = ()
    if vision_rate and any(path.startswith("vision/") for path in trainable):
        scales = (("^vision/", vision_rate / settings["lr"]),)
    optimizer = make_optimizer(
        OptimizerConfig(
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            epsilon=settings["eps"],
            weight_decay=settings["weight_decay"],
            clip_norm=settings["max_grad_norm"],
        ),
        learning_rate_multipliers(scales, list(trainable)),
    )
    model = Vita(config)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> LossSums:
        return language_modeling_loss(model, params, batch, key)

    def mean_loss(trainable: Any) -> jax.Array:
        sums = loss_fn(unflatten({**frozen, **trainable}), arrays, jax.random.key(0))
        return sums.loss / sums.count

    before, grads = jax.jit(jax.value_and_grad(mean_loss))(trainable)
    step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, schedule=lambda _: jnp.float32(settings["lr"]))
    state = init_state(trainable, optimizer, jax.random.key_data(jax.random.key(0)))
    state, metrics = jax.jit(step)(state, frozen, arrays)
    rules = Table(tuple(rule for rule in table.rules if rule.path in trainable))
    outputs = {"loss_before": before, "grad_norm": metrics["grad_norm"], "loss_after": mean_loss(state.trainable)}
    outputs |= export_params(rules, unflatten(grads), prefix="grad/")
    return Result(outputs | export_params(rules, unflatten(state.trainable), prefix="updated/"))


def _vita_config(case: Case) -> VitaConfig:
    vision = internvit_weights.config_from_hf(case.config["vision"])
    language = decoder_weights.config_from_hf(case.config["llm"])
    kind = case.config.get("mm_projector_type", "mlp2x_gelu")
    projector = ProjectorConfig(kind, input_size=vision.output_size, output_size=language.hidden_size)
    grids = SLOW_FAST_GRIDS if "sf_masks" in case.inputs else ()
    values = case.config["audio"]
    values = {**values, "llm_dim": language.hidden_size, "kernel": values.get("kernel_size", 5)}
    audio = tower_config(values, dropout=0.0, positional_dropout=0.0)
    return VitaConfig(vision, projector, language, pooled_grids=grids, audio=audio)


def _spliced_batch(case: Case, config: VitaConfig, images: np.ndarray) -> tuple[VitaInputs, np.ndarray]:
    """Rows in the package's own form, and their labels.

    The case lists tiles and clips of all rows one after the other, with a dummy for a row that has none.
    """
    inputs, layout = case.inputs, FeatureLayout(config.tokens_per_tile, config.pooled_grids)
    mask = inputs["attention_mask"].astype(bool)
    ids = [row[real] for row, real in zip(inputs["input_ids"], mask, strict=True)]
    labels = [row[real] for row, real in zip(inputs["labels"], mask, strict=True)]
    own_tiles = _owned([int(np.sum(row == IMAGE_PLACEHOLDER)) for row in ids])
    own_clips = _owned([int(np.sum(row == AUDIO_PLACEHOLDER)) for row in ids])
    whole = config.tokens_per_tile
    kept = frame_lengths(inputs["sf_masks"], whole) if "sf_masks" in inputs else [whole] * len(images)

    num_tiles, num_clips = (max(len(own) for own in owned) for owned in (own_tiles, own_clips))
    audio, num_frames = inputs["audios"], inputs["audios"].shape[1]
    per_clip = config.audio.num_tokens(num_frames)
    tiles = np.zeros((len(ids), num_tiles, *images.shape[1:]), images.dtype)
    clips = np.zeros((len(ids), num_clips, *audio.shape[1:]), audio.dtype)
    clip_lengths = np.zeros((len(ids), num_clips), np.int32)
    rows: list[Spliced] = []
    for i, (tile_numbers, clip_numbers) in enumerate(zip(own_tiles, own_clips, strict=True)):
        tiles[i, : len(tile_numbers)] = images[tile_numbers]
        clips[i, : len(clip_numbers)] = audio[clip_numbers]
        clip_lengths[i, : len(clip_numbers)] = inputs["audio_lengths"][clip_numbers]
        kept_tokens = config.audio.num_prompt_tokens + inputs["audio_lengths_for_llm"][clip_numbers]
        rows.append(
            expand_placeholders(
                ids[i],
                labels[i],
                [layout.tile_span(slot, kept[number]) for slot, number in enumerate(tile_numbers)],
                [layout.clip_span(num_tiles, slot, per_clip, int(count)) for slot, count in enumerate(kept_tokens)],
                audio_labels=inputs["state_labels"][clip_numbers] if "state_labels" in inputs else None,
                max_length=case.config.get("tokenizer_model_max_length"),
                visual_position_stride=case.config.get("shared_v_pid_stride"),
            )
        )
    padded = pad_rows(rows, side=case.config.get("tokenizer_padding_side", "right"))
    spliced_labels = padded.pop("labels")
    return VitaInputs(tiles=tiles, audio=clips, audio_lengths=clip_lengths, **padded), spliced_labels


def _owned(counts: list[int]) -> list[list[int]]:
    """Which entries of the flat list belong to each row; a row without any consumes one that it does not use."""
    owned, start = [], 0
    for count in counts:
        owned.append(list(range(start, start + count)))
        start += max(count, 1)
    return owned


MODULES = {"qwen2": qwen2, "vita": vita, "vita_train_step": vita_train_step}
