"""Golden cases of the language model and of the whole composition: `qwen2`, `vita`.

`vita` cases hold an audio side too. The audio tower is not built yet, so its own outputs are reported as pending and
its features are taken from the case's `audio_features`; everything after them (splice, labels, masks, positions,
hidden states, logits, loss, greedy tokens) is computed here and compared. Cases with a mixture-of-experts decoder are
pending as a whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tests.parity.cases import Case, Pending, Result
from vita_jax.conversion.tables import import_params
from vita_jax.data.splice import (
    AUDIO_PLACEHOLDER,
    IMAGE_PLACEHOLDER,
    FeatureLayout,
    FeatureSpan,
    Spliced,
    expand_placeholders,
    pad_rows,
)
from vita_jax.inference.generate import generate_from_embeds
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.language.decoder import Decoder
from vita_jax.models.state_head import language_labels
from vita_jax.models.vision import internvit_weights
from vita_jax.models.vision.frame_pooling import frame_lengths
from vita_jax.models.vita import Vita, VitaConfig, VitaInputs
from vita_jax.models.vita_weights import weight_table
from vita_jax.ops.losses import next_token_loss

AUDIO_OUTPUTS = ("audio_encoder_out", "audio_features", "audio_attention_mask")
SLOW_FAST_GRIDS = (12, 7)


def _greedy(decoder: Decoder, params: Any, embeds: Any, positions: Any, segment_ids: Any, count: int) -> jax.Array:
    generate = jax.jit(generate_from_embeds, static_argnames=("decoder", "max_new_tokens"))
    return generate(decoder, params, embeds, positions, segment_ids, max_new_tokens=count).tokens


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

    def positions_of(ids: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)

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
        outputs["greedy_ids"] = _greedy(decoder, params, embeds, positions_of(prompt), np.ones_like(prompt), steps)
    valid = {name: mask[..., None] for name in case.outputs if name.startswith(("hidden_states", "logits"))}
    return Result(outputs, valid)


def vita(case: Case) -> Result:
    """The whole model from raw tiles and placeholder ids."""
    if case.config["llm_kind"] == "mixtral":
        raise Pending("mixtral")
    config = _vita_config(case)
    params = import_params(weight_table(config), case.weights)
    model, tokens_per_tile = Vita(config), config.tokens_per_tile
    images = rearrange(case.inputs["images"], "n c h w -> n h w c")
    batch, labels = _spliced_batch(case, config, images)

    @jax.jit
    def run(params: Any, images: jax.Array, batch: VitaInputs) -> dict[str, jax.Array]:
        def apply(*args: Any, method: str) -> Any:
            return model.apply({"params": params}, *args, method=method)

        hidden = apply(batch, method="__call__")
        return {
            "vision_features": apply(images, method="tower_features"),
            "image_features": apply(images[:, None], method="encode_tiles")[:, :tokens_per_tile],
            "inputs_embeds": apply(batch, method="embed_inputs"),
            "last_hidden_state": hidden,
            "logits": apply(hidden, method="logits"),
        }

    outputs: dict[str, Any] = run(params, images, batch)
    kernel = params["language"]["lm_head"]["kernel"]
    lm_labels = language_labels(labels)  # some cases have state labels among them
    total, count = next_token_loss(outputs["last_hidden_state"], kernel, lm_labels, batch.segment_ids, chunk_size=7)
    mask = np.asarray(batch.segment_ids)
    outputs |= {"labels": labels, "attention_mask": mask, "position_ids": batch.positions, "loss": total / count}
    if "greedy_ids" in case.outputs:
        embeds, steps = outputs["inputs_embeds"], case.outputs["greedy_ids"].shape[1]
        args = (params["language"], embeds, batch.positions, batch.segment_ids, steps)
        outputs["greedy_ids"] = _greedy(model.decoder, *args)
    valid = {name: mask[..., None] for name in ("inputs_embeds", "last_hidden_state", "logits")}
    if "position_ids" in case.outputs:
        valid["position_ids"] = mask
    return Result(outputs, valid, pending={name: "audio" for name in AUDIO_OUTPUTS if name in case.outputs})


def _vita_config(case: Case) -> VitaConfig:
    vision = internvit_weights.config_from_hf(case.config["vision"])
    language = decoder_weights.config_from_hf(case.config["llm"])
    kind = case.config.get("mm_projector_type", "mlp2x_gelu")
    projector = ProjectorConfig(kind, input_size=vision.output_size, output_size=language.hidden_size)
    grids = SLOW_FAST_GRIDS if "sf_masks" in case.inputs else ()
    return VitaConfig(vision, projector, language, pooled_grids=grids)


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
    audio = case.outputs["audio_features"]  # see the docstring of this file
    tiles = np.zeros((len(ids), num_tiles, *images.shape[1:]), images.dtype)
    extra = np.zeros((len(ids), num_clips, *audio.shape[1:]), audio.dtype)
    rows: list[Spliced] = []
    for i, (tile_numbers, clip_numbers) in enumerate(zip(own_tiles, own_clips, strict=True)):
        tiles[i, : len(tile_numbers)] = images[tile_numbers]
        extra[i, : len(clip_numbers)] = audio[clip_numbers]
        lengths = case.config["audio"].get("prompt_num", 0) + inputs["audio_lengths_for_llm"][clip_numbers]
        starts = layout.extra_start(num_tiles) + np.arange(len(clip_numbers)) * audio.shape[1]
        rows.append(
            expand_placeholders(
                ids[i],
                labels[i],
                [layout.tile_span(slot, kept[number]) for slot, number in enumerate(tile_numbers)],
                [FeatureSpan(int(start), int(length)) for start, length in zip(starts, lengths, strict=True)],
                audio_labels=inputs["state_labels"][clip_numbers] if "state_labels" in inputs else None,
                max_length=case.config.get("tokenizer_model_max_length"),
                visual_position_stride=case.config.get("shared_v_pid_stride"),
            )
        )
    padded = pad_rows(rows, side=case.config.get("tokenizer_padding_side", "right"))
    spliced_labels = padded.pop("labels")
    extra = rearrange(extra, "b m n d -> b (m n) d")
    return VitaInputs(tiles=jnp.asarray(tiles), extra_features=jnp.asarray(extra), **padded), spliced_labels


def _owned(counts: list[int]) -> list[list[int]]:
    """Which entries of the flat list belong to each row; a row without any consumes one that it does not use."""
    owned, start = [], 0
    for count in counts:
        owned.append(list(range(start, start + count)))
        start += max(count, 1)
    return owned


MODULES = {"qwen2": qwen2, "vita": vita}
