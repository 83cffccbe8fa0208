"""Names and layout of published CLIP vision weights and configurations: transformers' layout and open_clip's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vita_jax.conversion import tables
from vita_jax.conversion.views import Source
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vision.encoder_weights import encoder_rules

# What public files of the tower alone put before every name.
HF_PREFIX = "vision_model."
# open_clip stacks the rows of these three; the tables have them apart.
IN_PROJ, PROJECTIONS = "in_proj_", ("q_proj", "k_proj", "v_proj")


def config_from_hf(values: Mapping[str, Any]) -> ViTConfig:
    """The configuration from the fields of a public `config.json`; a nested `vision_config` is unwrapped.

    Absent fields take the public configuration class's defaults (those of ViT-B/32).
    """
    values = values.get("vision_config", values)
    return ViTConfig(
        hidden_size=values.get("hidden_size", 768),
        num_layers=values.get("num_hidden_layers", 12),
        num_heads=values.get("num_attention_heads", 12),
        intermediate_size=values.get("intermediate_size", 3072),
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 32),
        hidden_act=values.get("hidden_act", "quick_gelu"),
        layer_norm_eps=values.get("layer_norm_eps", 1e-5),
        num_channels=values.get("num_channels", 3),
    )


def config_to_hf(config: ViTConfig) -> dict[str, Any]:
    """The fields of a public `config.json`, as `config_from_hf` reads them."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "num_channels": config.num_channels,
    }


def config_from_open_clip(values: Mapping[str, Any], hidden_act: str = "quick_gelu") -> ViTConfig:
    """The configuration from open_clip's fields, of which a `vision_cfg` has some.

    Args:
      values: `image_size`, `patch_size`, `width`, `layers`, `heads` (or `head_width`), `mlp_ratio`, `output_dim`.
      hidden_act: quick GELU for OpenAI's weights, "gelu" for those that open_clip trained.
    """
    width = values["width"]
    return ViTConfig(
        hidden_size=width,
        num_layers=values["layers"],
        num_heads=values.get("heads") or width // values.get("head_width", 64),
        intermediate_size=int(width * values.get("mlp_ratio", 4.0)),
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        hidden_act=hidden_act,
        layer_norm_eps=1e-5,
        projection_size=values.get("output_dim", 0),
    )


def weight_table(config: ViTConfig, prefix: str = HF_PREFIX) -> tables.Table:
    """Names as in transformers' public files; CLIP's text half, and the matrix into its space, are not read.

    prefix: what stands before every name; files written by transformers 5 inside other models have nothing there.
    """
    d, patch = config.hidden_size, config.patch_size
    patch_shape = (d, config.num_channels, patch, patch)
    rules = (
        tables.copy("embeddings.class_embedding", "embeddings/class_embedding", (d,)),
        tables.copy(
            "embeddings.position_embedding.weight", "embeddings/position_embedding", (1 + config.num_patches, d)
        ),
        *tables.conv2d("embeddings.patch_embedding", "embeddings/patch_embed", patch_shape, bias=False),
        *tables.norm("pre_layrnorm", "pre_norm", d),  # the public name has this spelling
        *encoder_rules(config, "encoder.layers", "encoder/layers"),
        *tables.norm("post_layernorm", "post_norm", d),
    )
    return tables.Table(rules, ignore=(r"embeddings\.position_ids",)).prefixed(torch=prefix)


def open_clip_table(config: ViTConfig) -> tables.Table:
    """Names as in open_clip's `VisionTransformer`, except that q, k and v are apart: see `open_clip_sources`."""
    d, patch, layers = config.hidden_size, config.patch_size, config.num_layers
    heads, wide = (config.num_heads, config.head_dim), (config.intermediate_size,)
    torch, path = "transformer.resblocks.{i}", "encoder/layers"
    rules = [
        tables.copy("class_embedding", "embeddings/class_embedding", (d,)),
        tables.copy("positional_embedding", "embeddings/position_embedding", (1 + config.num_patches, d)),
        *tables.conv2d("conv1", "embeddings/patch_embed", (d, config.num_channels, patch, patch), bias=False),
        *tables.norm("ln_pre", "pre_norm", d),
        *tables.norm(f"{torch}.ln_1", f"{path}/norm1", d, layers=layers),
        *tables.norm(f"{torch}.ln_2", f"{path}/norm2", d, layers=layers),
        *tables.linear(f"{torch}.attn.out_proj", f"{path}/attention/o_proj", heads, (d,), layers=layers),
        *tables.linear(f"{torch}.mlp.c_fc", f"{path}/mlp/fc1", (d,), wide, layers=layers),
        *tables.linear(f"{torch}.mlp.c_proj", f"{path}/mlp/fc2", wide, (d,), layers=layers),
        *tables.norm("ln_post", "post_norm", d),
    ]
    for name in PROJECTIONS:
        rules += tables.linear(f"{torch}.attn.{name}", f"{path}/attention/{name}", (d,), heads, layers=layers)
    if config.projection_size:
        # Not a `Linear` but a matrix that is multiplied from the right, as here.
        rules.append(tables.copy("proj", "projection/kernel", (d, config.projection_size)))
    return tables.Table(tuple(rules))


def open_clip_sources(names: Iterable[str]) -> dict[str, Source]:
    """Names as in open_clip's files -> the view that `open_clip_table` reads: stacked q, k and v are cut apart."""
    sources: dict[str, Source] = {}
    for name in names:
        stacked = re.fullmatch(rf"(.*\.attn\.){IN_PROJ}(weight|bias)", name)
        if stacked is None:
            sources[name] = Source(name)
            continue
        for part, projection in enumerate(PROJECTIONS):
            sources[f"{stacked[1]}{projection}.{stacked[2]}"] = Source(name, part, len(PROJECTIONS))
    return sources


def open_clip_stacks(names: Iterable[str]) -> dict[str, Source]:
    """Names of `open_clip_table` -> where they stand in open_clip's files; for `vita_jax.conversion.views.joined`."""
    sources: dict[str, Source] = {}
    for name in names:
        part = re.fullmatch(rf"(.*\.attn\.)({'|'.join(PROJECTIONS)})\.(weight|bias)", name)
        sources[name] = (
            Source(name)
            if part is None
            else Source(f"{part[1]}{IN_PROJ}{part[3]}", PROJECTIONS.index(part[2]), len(PROJECTIONS))
        )
    return sources
