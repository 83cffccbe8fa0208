"""Names of open_flamingo checkpoints around a LLaMA.

    vision_encoder.<open_clip>, perceiver.<resampler>
    lang_encoder.model.embed_tokens.weight, lang_encoder.model.norm.weight, lang_encoder.lm_head.weight
    lang_encoder.model.layers.<i>.decoder_layer.<LLaMA layer>
    lang_encoder.model.layers.<i>.gated_cross_attn_layer.<block>        for layers that have one

A file may give layers and blocks a second time, or only, under shorter names, start every name with `module.`, and
stack q, k and v of the tower; `view` gives the names of the tables. What training saves lacks everything that was
frozen (`trained_table`); the language model and the tower then come from files of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vita_jax.conversion.tables import Rule, Table, copy, iter_export, linear, norm
from vita_jax.conversion.views import Source, View, joined
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.connectors import perceiver_resampler_weights
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.language import gated_cross_attention_weights
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.language.decoder_weights import layer_rules
from vita_jax.models.language.gated_cross_attention import GatedCrossAttentionConfig
from vita_jax.models.language.gated_decoder import block_numbers
from vita_jax.models.vision import clip_weights
from vita_jax.models.vision.encoder import ViTConfig

VISION_PREFIX, LANGUAGE_PREFIX = "vision_encoder.", "lang_encoder."
LAYER = f"{LANGUAGE_PREFIX}model.layers.{{i}}."
# Second names of layers and of blocks.
ALIASES = (
    (re.compile(r"lang_encoder\.old_decoder_blocks\.(\d+)\.(.*)"), "decoder_layer"),
    (re.compile(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.(.*)"), "gated_cross_attn_layer"),
)
# Where other language models keep their layers and tables, and what is in a layer of theirs; what training saves has
# the tables alone, and second names of layers do not say whose they are.
OTHER_MODELS = {
    "transformer.blocks.": "MPT",
    "gpt_neox.layers.": "GPT-NeoX",
    "model.decoder.layers.": "OPT",
    "transformer.h.": "GPT-J",
    "gpt_neox.embed_in.": "GPT-NeoX",
    "model.decoder.embed_tokens.": "OPT",
    "old_decoder_blocks.0.attn.Wqkv.": "MPT",
    "old_decoder_blocks.0.attention.query_key_value.": "GPT-NeoX",
    "old_decoder_blocks.0.self_attn_layer_norm.": "OPT",
    "old_decoder_blocks.0.attn.q_proj.": "GPT-J",
    "transformer.wte.": "MPT or GPT-J",
}
HEAD_WIDTH = 64
# Buffers that follow from the config, and what training saves of a frozen tower because its name has "embed" in it.
IGNORED = (r".*rotary_emb\.inv_freq",)
SAVED_BY_NAME = (r"vision_encoder\.(class_embedding|positional_embedding)",)


def weight_table(config: FlamingoConfig) -> Table:
    """The table of the whole model, for the names that `view` gives."""
    c = config.language
    language = (
        _embedding(config),
        *_layers(config),
        *norm(f"{LANGUAGE_PREFIX}model.norm", "norm", c.hidden_size, bias=False),
        *linear(f"{LANGUAGE_PREFIX}lm_head", "lm_head", (c.hidden_size,), (c.vocab_size,), bias=False),
    )
    table = clip_weights.open_clip_table(config.vision).prefixed(torch=VISION_PREFIX, path="vision/")
    return table + _trained(config) + Table(language, IGNORED).prefixed(path="language/")


def trained_table(config: FlamingoConfig) -> Table:
    """The table of a training checkpoint: resampler, gated blocks, and the embedding table with the new tokens."""
    return _trained(config) + Table((_embedding(config),), SAVED_BY_NAME).prefixed(path="language/")


def _trained(config: FlamingoConfig) -> Table:
    resampler = perceiver_resampler_weights.weight_table(config.resampler)
    numbers = block_numbers(config.language.num_layers, config.cross_attention_every)
    blocks = gated_cross_attention_weights.weight_table(
        config.cross_attention, f"{LAYER}gated_cross_attn_layer.", numbers
    )
    return resampler.prefixed(torch=perceiver_resampler_weights.FLAMINGO_PREFIX, path="resampler/") + blocks.prefixed(
        path="cross_attention/"
    )


def _layers(config: FlamingoConfig) -> tuple[Rule, ...]:
    rules = layer_rules(config.language, "layers")
    return tuple(replace(rule, torch=rule.torch.replace("layers.{i}.", f"{LAYER}decoder_layer.")) for rule in rules)


def _embedding(config: FlamingoConfig) -> Rule:
    shape = (config.language.vocab_size, config.language.hidden_size)
    return copy(f"{LANGUAGE_PREFIX}model.embed_tokens.weight", "embed_tokens/embedding", shape)


def view(tensors: Mapping[str, np.ndarray]) -> View:
    """A file's tensors under the names of the tables.

    Raises:
      UnsupportedOption: a language model whose layers are not the decoder's.
      UserError: two tensors for one name.
    """
    sources: dict[str, Source] = {}
    aliases: dict[str, Source] = {}
    _check_language_model([name.removeprefix("module.") for name in tensors])
    for name, source in clip_weights.open_clip_sources(tensors).items():
        plain = name.removeprefix("module.")
        canonical = _canonical(plain)
        target = sources if canonical == plain else aliases
        if canonical in target:
            raise UserError(f"the checkpoint has two tensors for {canonical}: {target[canonical].name}, {source.name}")
        target[canonical] = source
    return View(tensors, {**aliases, **sources})


def config_of_tensors(
    shapes: Mapping[str, tuple[int, ...]], language: DecoderConfig, vision: ViTConfig | None = None
) -> FlamingoConfig:
    """The sizes of a published checkpoint, whose heads are all 64 wide, under the names that `view` gives.

    Args:
      shapes: of the tensors.
      language: from its own `config.json`; the rows of its table are taken from the tensors.
      vision: of a checkpoint without its tower; else None.

    Raises:
      UserError: a tensor is not there that tells a size.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"there is no tensor {name}")
        return shapes[name]

    if vision is None:
        vision = _vision_of_tensors(shapes, shape)
    language = replace(language, vocab_size=shape(f"{LANGUAGE_PREFIX}model.embed_tokens.weight")[0])
    blocks = rf"{re.escape(LANGUAGE_PREFIX)}model\.layers\.([0-9]+)\.gated_cross_attn_layer\..*"
    numbers = _numbers(shapes, blocks)
    if not numbers:
        raise UserError("there is no gated cross-attention in it (...gated_cross_attn_layer...)")
    block = LAYER.replace("{i}", str(numbers[0])) + "gated_cross_attn_layer."
    start = perceiver_resampler_weights.FLAMINGO_PREFIX
    latents, width = shape(f"{start}latents")
    return FlamingoConfig(
        vision,
        ResamplerConfig(
            width,
            num_layers=len(_numbers(shapes, rf"{re.escape(start)}layers\.([0-9]+)\..*")),
            num_heads=shape(f"{start}layers.0.0.to_q.weight")[0] // HEAD_WIDTH,
            head_dim=HEAD_WIDTH,
            num_latents=latents,
            feed_forward_multiple=shape(f"{start}layers.0.1.1.weight")[0] // width,
            max_frames=shapes.get(f"{start}frame_embs", (0,))[0],
            max_media=shapes.get(f"{start}media_time_embs", (0,))[0],
        ),
        language,
        GatedCrossAttentionConfig(
            language.hidden_size,
            width,
            num_heads=shape(f"{block}attn.to_q.weight")[0] // HEAD_WIDTH,
            head_dim=HEAD_WIDTH,
            feed_forward_multiple=shape(f"{block}ff.1.weight")[0] // language.hidden_size,
        ),
        cross_attention_every=numbers[0] + 1,
    )


def _vision_of_tensors(shapes: Mapping[str, tuple[int, ...]], shape: Callable[[str], tuple[int, ...]]) -> ViTConfig:
    width, _, patch, _ = shape(f"{VISION_PREFIX}conv1.weight")
    blocks = f"{VISION_PREFIX}transformer.resblocks."
    return ViTConfig(
        hidden_size=width,
        num_layers=len(_numbers(shapes, rf"{re.escape(blocks)}([0-9]+)\..*")),
        num_heads=width // HEAD_WIDTH,
        intermediate_size=shape(f"{blocks}0.mlp.c_fc.weight")[0],
        image_size=patch * math.isqrt(shape(f"{VISION_PREFIX}positional_embedding")[0] - 1),
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        projection_size=shapes.get(f"{VISION_PREFIX}proj", (0, 0))[1],
    )


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def is_whole(names: Iterable[str]) -> bool:
    """Whether a file has the language model's layers, under the names that `view` gives, and not only what trained."""
    return any(".decoder_layer." in name for name in names)


def stacks(config: FlamingoConfig) -> Mapping[str, Source]:
    """Names of the tables -> where they stand in published files; for `vita_jax.conversion.views.joined`."""
    return clip_weights.open_clip_stacks(weight_table(config).torch_names)


def _canonical(name: str) -> str:
    for pattern, part in ALIASES:
        if match := pattern.fullmatch(name):
            return f"{LAYER.replace('{i}', match[1])}{part}.{match[2]}"
    return name


def _check_language_model(names: Iterable[str]) -> None:
    names = list(names)
    for start, model in OTHER_MODELS.items():
        name = next((name for name in names if name.startswith(LANGUAGE_PREFIX + start)), None)
        if name is not None:
            raise UnsupportedOption(
                f"the checkpoint's language model is {model} ({name}), whose layers are not this decoder's; only "
                "Flamingo around a LLaMA is offered"
            )


def export_tensors(config: FlamingoConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(torch name, array) of every tensor of a whole checkpoint, in the published layout; the inverse of an import
    through `view`.
    """
    return joined(iter_export(weight_table(config), params), stacks(config))
