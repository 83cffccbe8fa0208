"""Flamingo against the golden cases: resampler, gated blocks, the whole model and two steps of its training."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from tests.parity.adapters.language import positions_of
from tests.parity.adapters.vision_nets import channels_last
from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import flatten, import_params
from vita_jax.data.interleaved import interleaved_labels, pair_labels
from vita_jax.inference.generate_flamingo import generate_flamingo
from vita_jax.models.connectors import perceiver_resampler_weights
from vita_jax.models.connectors.perceiver_resampler import PerceiverResampler, ResamplerConfig
from vita_jax.models.flamingo import Flamingo, FlamingoConfig, FlamingoInputs
from vita_jax.models.flamingo_weights import export_tensors, view, weight_table
from vita_jax.models.language import decoder_weights, gated_cross_attention_weights
from vita_jax.models.language.gated_cross_attention import GatedBlock, GatedCrossAttentionConfig
from vita_jax.models.language.gated_decoder import block_numbers
from vita_jax.models.vision import clip_weights
from vita_jax.ops.losses import next_token_loss
from vita_jax.ops.media import media_times
from vita_jax.training.objectives.flamingo import DECAYED, TRAINED, flamingo_loss
from vita_jax.training.optimizer import OptimizerConfig, make_optimizer, warmup_constant
from vita_jax.training.stages import unflatten
from vita_jax.training.step import init_state, train_step


def _resampler_config(values: dict[str, Any], width: int) -> ResamplerConfig:
    return ResamplerConfig(
        hidden_size=width,
        num_layers=values["depth"],
        num_heads=values["heads"],
        head_dim=values["dim_head"],
        num_latents=values["num_latents"],
        feed_forward_multiple=values["ff_mult"],
        max_frames=values.get("max_num_frames") or 0,
        max_media=values.get("max_num_media") or 0,
    )


def perceiver_resampler(case: Case) -> dict[str, Any]:
    config = _resampler_config(case.config, case.config["dim"])
    params = import_params(perceiver_resampler_weights.weight_table(config), case.weights)
    y, captured = jax.jit(partial(PerceiverResampler(config).apply, capture=True))({"params": params}, case.inputs["x"])
    outputs = {"y": y}
    for i in range(config.num_layers):
        outputs |= {f"layer{i}.attn_out": captured["attention"][i], f"layer{i}.ff_out": captured["feed_forward"][i]}
    return outputs


def gated_xattn(case: Case) -> dict[str, Any]:
    values = case.config
    config = GatedCrossAttentionConfig(
        hidden_size=values["dim"],
        media_size=values["dim_visual"],
        num_heads=values["heads"],
        head_dim=values["dim_head"],
        feed_forward_multiple=values["ff_mult"],
        all_previous=not values["only_attend_immediate_media"],
        without_media="uniform",
    )
    params = import_params(gated_cross_attention_weights.weight_table(config), case.weights)
    x, times = case.inputs["x"], None
    if values["pass_locations"]:
        times = media_times(jnp.asarray(case.inputs["media_locations"], bool))
        if values["use_cached_media"]:  # new text sees what the end of the prompt sees
            times = jnp.broadcast_to(times[:, -1:], x.shape[:2])
    block = GatedBlock(config, capture=True)

    @jax.jit
    def run(params: Any, x: jax.Array, media: jax.Array) -> Any:
        keys_values = block.apply({"params": params}, media, method="media_keys_values")
        return block.apply({"params": params}, x, keys_values, times)

    y, captured = run(params, x, case.inputs["media"])
    return {
        "y": y,
        "attn_out": captured["attention"],
        "after_attn": captured["after_attention"],
        "ff_out": captured["feed_forward"],
    }


def _config(case: Case) -> FlamingoConfig:
    vision = clip_weights.config_from_open_clip(case.config["vision"])
    language = decoder_weights.config_from_hf({"model_type": "llama", **case.config["lm"]})
    cross = case.config["xattn"]
    return FlamingoConfig(
        vision=vision,
        resampler=_resampler_config(case.config["perceiver"], vision.hidden_size),
        language=language,
        cross_attention=GatedCrossAttentionConfig(
            hidden_size=language.hidden_size,
            media_size=vision.hidden_size,
            num_heads=cross["heads"],
            head_dim=cross["dim_head"],
            feed_forward_multiple=cross["ff_mult"],
            without_media="uniform",
        ),
        cross_attention_every=case.config["cross_attn_every_n_layers"],
    )


def _inputs(case: Case, ids: np.ndarray, mask: np.ndarray, images: np.ndarray) -> FlamingoInputs:
    """images: (b t f c h w)."""
    times = media_times(jnp.asarray(ids == case.config["media_token_id"]))
    return FlamingoInputs(ids, positions_of(ids), np.asarray(mask), times, channels_last(images))


def flamingo(case: Case) -> Result:
    """Every stage of a tiny model, its loss and gradients, and greedy continuations of each row alone."""
    config = _config(case)
    params, model = import_params(weight_table(config), view(case.weights)), Flamingo(config)
    ids, mask, labels = (case.inputs[name] for name in ("lang_x", "attention_mask", "labels"))
    inputs = _inputs(case, ids, mask, case.inputs["vision_x"])

    @jax.jit
    def run(params: Any, inputs: FlamingoInputs) -> dict[str, jax.Array]:
        def apply(*args: Any, method: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, method=method, **kwargs)

        pixels = rearrange(inputs.images, "b t f h w c -> (b t f) h w c")
        media = apply(inputs.images, method="encode_media")
        keys_values = apply(media, method="media_keys_values")
        text = (inputs.tokens, inputs.positions, inputs.segment_ids, keys_values, inputs.media_times)
        hidden, _, captured = apply(*text, capture=True, method="hidden_states")
        outputs = {f"layer{i}.hidden": x for i, x in enumerate(captured["hidden"])}
        numbers = block_numbers(config.language.num_layers, config.cross_attention_every)
        blocks = zip(numbers, captured["gated"], strict=True)
        outputs |= {f"layer{i}.after_gated_xattn": x for i, x in blocks}
        return outputs | {
            "vision_tokens": apply(pixels, method="tower_features"),
            "vision_pooled": apply(pixels, method=lambda model, x: model.vision(x)["image_embeds"]),
            "perceiver": media,
            "final_norm": hidden,
            "logits": apply(hidden, method="logits"),
        }

    def mean_loss(params: Any) -> jax.Array:
        hidden = model.apply({"params": params}, inputs)
        total, count = next_token_loss(hidden, params["language"]["lm_head"]["kernel"], labels, mask, chunk_size=5)
        return total / count

    outputs = run(params, inputs)
    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    outputs["loss"] = loss
    tensors = {f"grad/{name}": x for name, x in export_tensors(config, grads)}
    outputs |= {name: tensors[name] for name in case.outputs if name.startswith("grad/")}
    if "greedy_tokens" in case.outputs:
        count = case.outputs["greedy_tokens"].shape[1]
        tokens = np.asarray(generate_flamingo(model, params, inputs, max_new_tokens=count).tokens)
        outputs |= {"greedy_tokens": tokens, "greedy_min_margin": _margin(model, params, inputs, tokens)}
    text = ("layer", "final_norm", "logits")
    return Result(outputs, {name: mask[..., None] for name in case.outputs if name.startswith(text)})


def _margin(model: Flamingo, params: Any, inputs: FlamingoInputs, tokens: np.ndarray) -> np.ndarray:
    """The smallest gap between the two largest logits on the way to the tokens, by one full pass without a cache."""
    count, lengths = tokens.shape[1], np.sum(np.asarray(inputs.segment_ids), axis=1)
    shape = (len(tokens), int(lengths.max()) + count - 1)
    ids, times, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for i, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        real, end = np.asarray(inputs.segment_ids[i]) > 0, length + count - 1
        seen = np.asarray(inputs.media_times[i])[real]
        ids[i, :end] = np.concatenate([np.asarray(inputs.tokens[i])[real], row[:-1]])
        times[i, :end] = np.concatenate([seen, np.full(count - 1, seen[-1])])
        segments[i, :end] = 1
    whole = FlamingoInputs(ids, positions_of(ids), segments, times, inputs.images)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden = model.apply({"params": params}, whole)
        return model.apply({"params": params}, hidden, method="logits")

    logits = np.sort(np.asarray(run(params)), axis=-1)
    gaps = logits[..., -1] - logits[..., -2]
    return np.asarray(min(gaps[i, n - 1 : n + count - 1].min() for i, n in enumerate(lengths)), np.float32)


def flamingo_train_step(case: Case) -> dict[str, Any]:
    """Steps of the two-dataset loop with the package's train step."""
    config, values = _config(case), case.config
    params, model = flatten(import_params(weight_table(config), view(case.weights))), Flamingo(config)
    trainable = {path: jnp.asarray(x) for path, x in params.items() if TRAINED.search(path)}
    frozen = {path: x for path, x in params.items() if path not in trainable}
    optimizer = make_optimizer(
        OptimizerConfig(
            beta1=values["adam_betas"][0],
            beta2=values["adam_betas"][1],
            epsilon=values["adam_eps"],
            weight_decay=values["weight_decay"],
            clip_norm=values["clip_norm"],
        ),
        dict.fromkeys(trainable, 1.0),
        decayed=DECAYED,
    )
    weights = {"pairs": values["loss_multiplier_pair"], "interleaved": values["loss_multiplier_interleaved"]}
    new_tokens = (values["eoc_token_id"], values["media_token_id"])
    loss_fn = partial(flamingo_loss, model, weights=weights, new_tokens=new_tokens)
    step = jax.jit(
        partial(
            train_step,
            loss_fn=loss_fn,
            optimizer=optimizer,
            schedule=lambda step: warmup_constant(step, values["warmup_steps"], values["lr"]),
        )
    )

    @jax.jit
    def clipped(trainable: Any, batch: Any) -> Any:
        grads = jax.grad(lambda t: loss_fn(unflatten({**frozen, **t}), batch, None).loss)(trainable)
        return optax.clip_by_global_norm(values["clip_norm"]).update(grads, optax.EmptyState())[0]

    def named(flat: dict[str, jax.Array], prefix: str) -> dict[str, np.ndarray]:
        whole = unflatten({**frozen, **flat})
        tensors = {f"{prefix}{name}": x for name, x in export_tensors(config, whole)}
        return {name: x for name, x in tensors.items() if name in case.outputs}

    state = init_state(trainable, optimizer, jax.random.key_data(jax.random.key(0)))
    outputs: dict[str, Any] = {}
    metrics = []
    for i in range(sum(name.endswith("pair_ids") for name in case.inputs)):
        batch = _train_batch(case, f"step{i}.")
        outputs |= named(clipped(state.trainable, batch), f"step{i}.clipped_grad/")
        state, step_metrics = step(state, frozen, batch)
        metrics.append({name: float(x) for name, x in step_metrics.items()})
    losses = [[m["pairs_loss"], m["interleaved_loss"]] for m in metrics]
    outputs["losses_pair_inter_per_step"] = np.asarray(losses, np.float32)
    outputs["grad_norms_before_clip"] = np.asarray([m["grad_norm"] for m in metrics], np.float32)
    outputs["learning_rates"] = np.asarray([m["lr"] for m in metrics], np.float32)
    return outputs | named(state.trainable, "after_two_steps/")


def _train_batch(case: Case, prefix: str) -> dict[str, jax.Array]:
    """Both data sets of a step. A captioned picture is a document of one picture."""
    pad, tag, end = case.config["lm"].get("pad_token_id", 0), case.config["media_token_id"], case.config["eoc_token_id"]
    batch: dict[str, jax.Array] = {}
    for name, given in (("pairs", "pair"), ("interleaved", "inter")):
        ids, mask, images = (case.inputs[f"{prefix}{given}_{what}"] for what in ("ids", "mask", "images"))
        images = images[:, None, None] if images.ndim == 4 else images[:, :, None]
        labels = pair_labels(ids, pad, tag) if name == "pairs" else interleaved_labels(ids, pad, tag, end)
        fields = {**vars(_inputs(case, ids, mask, images)), "labels": labels}
        batch |= {f"{name}/{field}": jnp.asarray(value) for field, value in fields.items()}
    return batch


MODULES = {
    "perceiver_resampler": perceiver_resampler,
    "gated_xattn": gated_xattn,
    "flamingo": flamingo,
    "flamingo_train_step": flamingo_train_step,
}
