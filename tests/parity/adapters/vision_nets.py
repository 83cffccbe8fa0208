"""Vision towers, projectors and frame pooling against the golden cases of area `vision`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.cases import Case
from vita_jax.conversion.tables import Table, export_params, import_params
from vita_jax.errors import UserError
from vita_jax.models.connectors import projectors_weights
from vita_jax.models.connectors.projectors import DEFAULT_PROJECTOR, Projector, ProjectorConfig
from vita_jax.models.vision import clip_weights, internvit_weights, siglip_weights
from vita_jax.models.vision.clip import ClipVision, select_feature
from vita_jax.models.vision.frame_pooling import frame_lengths, pool_frames, pool_tokens, slow_fast_plan
from vita_jax.models.vision.internvit import (
    Embeddings,
    InternViT,
    interpolate_positions,
    vita_tower_features,
)
from vita_jax.models.vision.siglip import DEFAULT_S2_SCALES, SiglipVision, s2_features
from vita_jax.ops.pixel_shuffle import pixel_shuffle
from vita_jax.ops.resize import resize_grid

Outputs = dict[str, Any]


def channels_last(images: np.ndarray) -> np.ndarray:
    """(... c height width) -> (... height width c)."""
    return np.moveaxis(images, -3, -1)


def unstack(captured: dict[str, jax.Array], layer_names: dict[str, str]) -> Outputs:
    """`hidden_states` -> `hidden_states.{i}`, and stacked intermediates -> `layers.{i}.<their name>`."""
    outputs = {f"hidden_states.{i}": x for i, x in enumerate(captured["hidden_states"])}
    for ours, theirs in layer_names.items():
        outputs |= {f"layers.{i}.{theirs}": x for i, x in enumerate(captured.get(ours, ()))}
    return outputs


def internvit(case: Case) -> Outputs:
    config = internvit_weights.config_from_hf(case.config)
    params = import_params(internvit_weights.weight_table(config), case.weights)
    apply = jax.jit(partial(InternViT(config).apply, capture=True))
    last, captured = apply({"params": params}, channels_last(case.inputs["pixel_values"]))
    names = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn", "norm2", "mlp")
    outputs = unstack(captured, {name: name for name in names})
    outputs |= {"last_hidden_state": last, "pooler_output": last[:, 0]}
    if "tower_features" in case.outputs:  # absent where the patch grid is odd
        outputs["tower_features"] = vita_tower_features(last)
    return outputs


def internvit_pos_interp(case: Case) -> Outputs:
    config = internvit_weights.config_from_hf(case.config)
    params = import_params(internvit_weights.weight_table(config), case.weights)
    model, embed = InternViT(config), Embeddings(config)
    position_embedding = jnp.asarray(params["embeddings"]["position_embedding"])
    outputs: Outputs = {}
    for name in case.outputs:
        what, _, size = name.partition(".")
        if what == "pos_embed_patches":
            rows, cols = map(int, size.split("x"))
            outputs[name] = interpolate_positions(position_embedding, config.grid_side, (rows, cols))[:, 1:]
        elif what == "resized_position_embedding":
            side = int(size) // config.patch_size
            outputs[name] = interpolate_positions(position_embedding, config.grid_side, (side, side))
        elif what == "embeddings":
            pixels = channels_last(case.inputs[f"pixel_values.{size}"])
            outputs[name] = embed.apply({"params": params["embeddings"]}, pixels)
        elif what == "last_hidden_state":
            outputs[name] = model.apply({"params": params}, channels_last(case.inputs[f"pixel_values.{size}"]))
    return outputs


def _encoder(case: Case) -> tuple[Table, Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]]:
    """Weight table of tower and projector, and (params, pixels) -> (tower features, image features)."""
    tower_config = internvit_weights.config_from_hf(case.config)
    projector_type = case.config.get("mm_projector_type", DEFAULT_PROJECTOR)
    projector_config = ProjectorConfig(projector_type, tower_config.output_size, case.config["llm_hidden_size"])
    tower_table = internvit_weights.weight_table(tower_config)
    projector_table = projectors_weights.weight_table(projector_config)
    table = tower_table.prefixed(torch=internvit_weights.VITA_PREFIX, path="vision/")
    table += projector_table.prefixed(torch=projectors_weights.VITA_PREFIX, path="projector/")

    def run(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        tower = vita_tower_features(InternViT(tower_config).apply({"params": params["vision"]}, pixels))
        return tower, Projector(projector_config).apply({"params": params.get("projector", {})}, tower)

    return table, run


def encode_images(case: Case) -> Outputs:
    table, run = _encoder(case)
    tower, features = jax.jit(run)(import_params(table, case.weights), channels_last(case.inputs["pixel_values"]))
    return {"tower_features": tower, "image_features": features}


def encode_images_grad(case: Case) -> Outputs:
    table, run = _encoder(case)

    def loss_fn(params: Any, pixels: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        tower, features = run(params, pixels)
        return jnp.sum(features * case.inputs["cotangent"]), (tower, features)

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    params = import_params(table, case.weights)
    (loss, (tower, features)), (grads, grad_pixels) = grad_fn(params, channels_last(case.inputs["pixel_values"]))
    outputs = {"tower_features": tower, "image_features": features, "loss": loss}
    outputs["grad_input"] = np.moveaxis(np.asarray(grad_pixels), -1, -3)
    return outputs | export_params(table, grads, prefix="grads/")


def shuffle(case: Case) -> Outputs:
    return {f"y.{name.removeprefix('x.')}": pixel_shuffle(x) for name, x in case.inputs.items()}


def projector(case: Case) -> Outputs:
    projector_type = case.config.get("mm_projector_type", DEFAULT_PROJECTOR)
    config = ProjectorConfig(projector_type, case.config["mm_hidden_size"], case.config["hidden_size"])
    params = import_params(projectors_weights.weight_table(config), case.weights)
    return {"y": jax.jit(Projector(config).apply)({"params": params}, case.inputs["x"])}


def frame_pooling(case: Case) -> Outputs:
    outputs: Outputs = {}
    for name in case.outputs:
        what, _, argument = name.partition(".")
        if what == "pool":
            outputs[name] = pool_tokens(jnp.asarray(case.inputs["x"]), int(argument))
        elif what == "pool2d":  # the first sample, without a batch axis
            outputs[name] = pool_tokens(jnp.asarray(case.inputs["x"][0]), int(argument))
    if "frames" in case.inputs:
        frames = jnp.asarray(case.inputs["frames"])
        lengths = frame_lengths(case.inputs["sf_masks"].tolist(), tokens=frames.shape[1])
        outputs["slow_fast.lengths"] = np.asarray(lengths, np.int32)
        outputs["slow_fast.concat"] = pool_frames(frames, lengths)
    return outputs


def clip_vision(case: Case) -> Outputs:
    config = clip_weights.config_from_hf(case.config)
    params = import_params(clip_weights.weight_table(config), case.weights)
    apply = jax.jit(partial(ClipVision(config).apply, capture=True))
    out = apply({"params": params}, channels_last(case.inputs["pixel_values"]))
    outputs = unstack(out, {"self_attn": "self_attn", "mlp": "mlp"})
    outputs |= {name: out[name] for name in ("embeddings", "last_hidden_state", "pooler_output")}
    outputs["vita_tower_features"] = select_feature(out["selected"])
    for feature in ("patch", "cls_patch"):
        outputs[f"llava_tower_features.{feature}"] = select_feature(out["selected"], feature)
    return outputs


def siglip_vision(case: Case) -> Outputs:
    config = siglip_weights.config_from_hf(case.config)
    variables = {"params": import_params(siglip_weights.weight_table(config), case.weights)}
    model = SiglipVision(config)
    out = jax.jit(partial(model.apply, capture=True))(variables, channels_last(case.inputs["pixel_values"]))
    outputs = unstack(out, {"self_attn": "self_attn", "mlp": "mlp"})
    outputs |= {name: out[name] for name in ("last_hidden_state", "pooler_output")}
    outputs["tower_features"] = out["selected"]
    if "pixel_values_s2" in case.inputs:
        pixels = jnp.asarray(channels_last(case.inputs["pixel_values_s2"]))
        listed = case.config.get("s2_scales", ",".join(map(str, DEFAULT_S2_SCALES)))
        scales = sorted(map(int, listed.split(",")) if isinstance(listed, str) else listed)
        outputs["s2_features"] = s2_features(lambda x: model.apply(variables, x)["selected"], pixels, scales)
        for i, scale in enumerate(scales):
            outputs[f"s2_input_resized.{i}"] = np.moveaxis(np.asarray(resize_grid(pixels, (scale, scale))), -1, -3)
    return outputs


def slow_fast_table(case: Case) -> list[str]:
    mismatches = []
    for row in case.table["rows"]:
        for variant, want in row.items():
            if variant == "frames":
                continue
            try:
                got: Any = slow_fast_plan(row["frames"], variant)
            except UserError:
                got = "error:ValueError"
            if got != want:
                mismatches.append(f"{variant}, {row['frames']} frames: got {got}, expected {want}")
    return mismatches


MODULES = {
    "internvit": internvit,
    "internvit_pos_interp": internvit_pos_interp,
    "encode_images": encode_images,
    "encode_images_grad": encode_images_grad,
    "pixel_shuffle": shuffle,
    "projector": projector,
    "frame_pooling": frame_pooling,
    "clip_vision": clip_vision,
    "siglip_vision": siglip_vision,
    "slow_fast_plan": slow_fast_table,
}
