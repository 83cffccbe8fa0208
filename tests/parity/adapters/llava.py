"""LLaVA against the golden cases: `clip_preprocess`, `llava_hf` (transformers' layout), `llava` (the original's)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from tests.parity.adapters.language import greedy
from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import Table, export_params, flatten, import_params
from vita_jax.data.images import CLIP_MEAN, CLIP_STD, ImageConfig, normalise, pad_to_square, single_tile
from vita_jax.data.splice import IMAGE_PLACEHOLDER, FeatureLayout, Spliced, expand_placeholders, pad_rows
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.llava import Llava, LlavaConfig
from vita_jax.models.llava_weights import layout_of, weight_table
from vita_jax.models.vision import clip_weights
from vita_jax.models.vita import VitaInputs
from vita_jax.ops.losses import next_token_loss
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.rope import rotary_tables
from vita_jax.training.stages import unflatten


def clip_preprocess(case: Case) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    for name, pixels in case.inputs.items():
        image = Image.fromarray(np.asarray(pixels, np.uint8))
        for kind, aspect in (("default", "square"), ("pad", "pad")):
            config = ImageConfig(
                image_size=case.config["image_size"], max_tiles=1, mean=CLIP_MEAN, std=CLIP_STD, aspect=aspect
            )
            outputs[f"{name}.{kind}"] = np.moveaxis(normalise(single_tile(image, config), config), -1, 0)
        outputs[f"{name}.expand2square"] = np.asarray(pad_to_square(image, config))
    return {name: value for name, value in outputs.items() if name in case.outputs}


def _config(case: Case, projector_type: str, feature: str) -> LlavaConfig:
    vision = clip_weights.config_from_hf(case.config["vision"])
    language = decoder_weights.config_from_hf({"model_type": "llama", **case.config["lm"]})
    return LlavaConfig(
        vision=vision,
        projector=ProjectorConfig(projector_type, vision.hidden_size, language.hidden_size),
        language=language,
        select_layer=case.config.get("vision_feature_layer", -2),
        select_feature=feature,
    )


def _batch(
    rows: list[np.ndarray],
    labels: list[np.ndarray],
    images: np.ndarray,
    config: LlavaConfig,
    *,
    dummies: bool,
    side: str = "right",
    max_length: int | None = None,
    length: int | None = None,
) -> tuple[VitaInputs, np.ndarray]:
    """Rows of ids with -200 for every image, and labels; images of all rows are one list.

    dummies: a row without images consumes one that it does not use, as in the original.
    """
    layout, images = FeatureLayout(config.tokens_per_tile), rearrange(images, "n c h w -> n h w c")
    counts = [int(np.sum(row == IMAGE_PLACEHOLDER)) for row in rows]
    tiles = np.zeros((len(rows), max(counts), *images.shape[1:]), np.float32)
    spliced: list[Spliced] = []
    taken = 0
    for i, (row, label, count) in enumerate(zip(rows, labels, counts, strict=True)):
        tiles[i, :count] = images[taken : taken + count]
        taken += max(count, 1) if dummies else count
        spans = [layout.tile_span(slot) for slot in range(count)]
        spliced.append(expand_placeholders(row, label, spans, max_length=max_length))
    assert taken == len(images), f"{taken} of {len(images)} images were used"
    padded = pad_rows(spliced, length=length, side=side)
    labels_out = padded.pop("labels")
    return VitaInputs(tiles=tiles, **padded), labels_out


def _unpadded(case: Case) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    mask = case.inputs["attention_mask"].astype(bool)
    ids, labels = (
        [row[real] for row, real in zip(case.inputs[name], mask, strict=True)] for name in ("input_ids", "labels")
    )
    return ids, labels, mask


def _greedy_rows(model: Llava, params: Any, embeds: Any, batch: VitaInputs, count: int) -> np.ndarray:
    """Continuations; rows are independent, so all of them are one batch."""
    return np.asarray(greedy(model.decoder, params["language"], embeds, batch.positions, batch.segment_ids, count))


def _margin(model: Llava, params: Any, embeds: Any, batch: VitaInputs, tokens: np.ndarray) -> np.ndarray:
    """The smallest gap between the two largest logits on the way to the tokens, by one full pass without a cache."""
    table, embeds = np.asarray(params["language"]["embed_tokens"]["embedding"]), np.asarray(embeds)
    real = np.asarray(batch.segment_ids) > 0
    rows = [np.concatenate([embeds[i][real[i]], table[row[:-1]]]) for i, row in enumerate(tokens)]
    length = max(map(len, rows))
    whole = np.stack([np.pad(row, ((0, length - len(row)), (0, 0))) for row in rows])
    segments = np.stack([np.arange(length) < len(row) for row in rows]).astype(np.int32)
    places = np.broadcast_to(np.arange(length), segments.shape)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden, _ = model.decoder.apply({"params": params}, whole, places, segments)
        return model.decoder.apply({"params": params}, hidden, method="logits")

    logits = np.sort(np.asarray(run(params["language"])), axis=-1)
    gaps = logits[..., -1] - logits[..., -2]
    ends = [len(row) for row in rows]
    return np.asarray(min(gaps[i, end - tokens.shape[1] : end].min() for i, end in enumerate(ends)), np.float32)


def llava_hf(case: Case) -> Result:
    """Every stage of LLaVA-1.5 from prompts in which an image is repeated ids of its placeholder."""
    config = _config(case, "mlp2x_gelu", "patch")
    layout = layout_of(case.weights)
    params = import_params(weight_table(config, layout), case.weights)
    model = Llava(config)
    ids, labels, mask = _unpadded(case)
    placeholder = case.config["image_token_index"]
    pairs = [_collapsed(*pair, placeholder, config) for pair in zip(ids, labels, strict=True)]
    side = "right" if mask[:, 0].all() else "left"
    pixels = case.inputs["pixel_values"]
    batch, spliced_labels = _batch(
        *map(list, zip(*pairs, strict=True)), pixels, config, dummies=False, side=side, length=mask.shape[1]
    )

    def layers(model: Llava, embeds: jax.Array, batch: VitaInputs) -> list[jax.Array]:
        language = config.language
        attended = make_attention_mask(batch.segment_ids, batch.segment_ids)
        rotary = rotary_tables(batch.positions, language.head_dim, language.rope_theta)
        numbers = jnp.arange(language.num_layers)
        (last, _), _ = model.language.layers((embeds, None), numbers, rotary, attended, None)
        return last

    @jax.jit
    def run(params: Any, pixels: jax.Array, batch: VitaInputs) -> dict[str, jax.Array]:
        def apply(*args: Any, method: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, method=method, **kwargs)

        tower = apply(pixels, method=lambda model, x: model.vision(x, capture=True)["hidden_states"])
        embeds = apply(batch, method="embed_inputs")
        last, kept = apply(embeds, batch, method=layers, mutable=["intermediates"])
        entered = kept["intermediates"]["language"]["layers"]["layer_input"][0]
        hidden = apply(batch, method="__call__")
        outputs = {f"vision_hidden_{i}": x for i, x in enumerate(tower)}
        outputs |= {f"lm_layer{i}": x for i, x in enumerate([*entered[1:], last])}
        outputs["image_features"] = rearrange(apply(pixels[:, None], method="encode_tiles"), "n k d -> (n k) d")
        return outputs | {
            "inputs_embeds": embeds,
            "hidden_final_norm": hidden,
            "logits": apply(hidden, method="logits"),
        }

    outputs = run(params, np.moveaxis(pixels, 1, -1), batch)
    kernel = params["language"]["lm_head"]["kernel"]
    total, count = next_token_loss(outputs["hidden_final_norm"], kernel, spliced_labels, batch.segment_ids)
    outputs["loss"] = total / count
    outputs |= _greedy_outputs(case, model, params, outputs["inputs_embeds"], batch)
    names = ("inputs_embeds", "lm_layer", "hidden_final_norm", "logits")
    return Result(outputs, {name: mask[..., None] for name in case.outputs if name.startswith(names)})


def _greedy_outputs(case: Case, model: Llava, params: Any, embeds: Any, batch: VitaInputs) -> dict[str, Any]:
    if "greedy_tokens" not in case.outputs:
        return {}
    tokens = _greedy_rows(model, params, embeds, batch, case.outputs["greedy_tokens"].shape[1])
    return {"greedy_tokens": tokens, "greedy_min_margin": _margin(model, params, embeds, batch, tokens)}


def _collapsed(
    ids: np.ndarray, labels: np.ndarray, placeholder: int, config: LlavaConfig
) -> tuple[np.ndarray, np.ndarray]:
    """A row with one -200 in place of the repeated ids of an image, and its labels."""
    number = np.cumsum(ids == placeholder) - 1
    kept = (ids != placeholder) | (number % config.tokens_per_tile == 0)
    return np.where(ids == placeholder, IMAGE_PLACEHOLDER, ids)[kept], labels[kept]


def llava(case: Case) -> Result:
    """The original's composition: splice at -200, truncation, padding on either side, gradients of the projector."""
    config = _config(case, case.config["mm_projector_type"], case.config.get("select_feature", "patch"))
    table = weight_table(config, layout_of(case.weights))
    params, model = import_params(table, case.weights), Llava(config)
    images = case.inputs["images"]
    ids, labels, _ = _unpadded(case)
    batch, spliced_labels = _batch(
        ids,
        labels,
        images,
        config,
        dummies=True,
        side=case.config.get("padding_side", "right"),
        max_length=case.config.get("tokenizer_model_max_length"),
    )

    @jax.jit
    def run(params: Any, images: jax.Array, batch: VitaInputs) -> dict[str, jax.Array]:
        def apply(*args: Any, method: str) -> Any:
            return model.apply({"params": params}, *args, method=method)

        hidden = apply(batch, method="__call__")
        return {
            "clip_features": apply(images, method="tower_features"),
            "image_features": apply(images[:, None], method="encode_tiles"),
            "inputs_embeds": apply(batch, method="embed_inputs"),
            "hidden_final_norm": hidden,
            "logits": apply(hidden, method="logits"),
        }

    @jax.jit
    def loss_and_grads(flat: dict[str, jax.Array], batch: VitaInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss_fn(flat: dict[str, jax.Array]) -> jax.Array:
            params = unflatten(flat)
            hidden = model.apply({"params": params}, batch)
            kernel = params["language"]["lm_head"]["kernel"]
            total, count = next_token_loss(hidden, kernel, spliced_labels, batch.segment_ids, chunk_size=7)
            return total / count

        return jax.value_and_grad(loss_fn)(flat)

    outputs = run(params, np.moveaxis(images, 1, -1), batch)
    loss, grads = loss_and_grads(flatten(params), batch)
    mask = np.asarray(batch.segment_ids)
    outputs |= {
        "labels_out": spliced_labels,
        "attention_mask_out": mask,
        "position_ids": batch.positions,
        "loss": loss,
        **_wanted_grads(case, table, grads),
        **_greedy_outputs(case, model, params, _embeds_of_generation(config, params, batch), batch),
    }
    names = ("inputs_embeds", "hidden_final_norm", "logits")
    return Result(outputs, {name: mask[..., None] for name in names})


def _embeds_of_generation(config: LlavaConfig, params: Any, batch: VitaInputs) -> jax.Array:
    """What the original's `generate` continued from in these cases: features of the hidden state after `select_layer`.

    Every other output of a case, its logits among them, has those of `select_layer`, as the package's generation has.
    """
    later = Llava(replace(config, select_layer=config.select_layer + (config.select_layer < -1)))
    return jax.jit(later.apply, static_argnames="method")({"params": params}, batch, method="embed_inputs")


def _wanted_grads(case: Case, table: Table, grads: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    tensors = export_params(table, unflatten(grads), prefix="grad/")
    return {name: value for name, value in tensors.items() if name in case.outputs}


MODULES = {"clip_preprocess": clip_preprocess, "llava_hf": llava_hf, "llava": llava}
