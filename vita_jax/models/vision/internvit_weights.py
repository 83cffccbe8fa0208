"""Names and layout of published InternViT weights and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vita_jax.conversion import tables
from vita_jax.errors import UserError
from vita_jax.models.vision.internvit import InternViTConfig

# Where a VITA checkpoint keeps the tower.
VITA_PREFIX = "model.vision_tower.vision_tower."


def config_from_hf(values: Mapping[str, Any]) -> InternViTConfig:
    """The configuration from the fields of a public `config.json`; a nested `vision_config` is unwrapped.

    Absent fields take the public configuration class's defaults (those of the 6B model).
    """
    values = values.get("vision_config", values)
    return InternViTConfig(
        hidden_size=values.get("hidden_size", 3200),
        num_layers=values.get("num_hidden_layers", 48),
        num_heads=values.get("num_attention_heads", 25),
        intermediate_size=values.get("intermediate_size", 12800),
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 14),
        norm_type=values.get("norm_type", "rms_norm"),
        layer_norm_eps=values.get("layer_norm_eps", 1e-6),
        qkv_bias=values.get("qkv_bias", False),
        qk_normalization=values.get("qk_normalization", True),
        layer_scale_init=values.get("initializer_factor", 0.1),
        drop_path_rate=values.get("drop_path_rate", 0.0),
        num_channels=values.get("num_channels", 3),
        hidden_act=values.get("hidden_act", "gelu"),
    )


# Channels -> heads of the published towers: all that shapes do not tell.
PUBLISHED_HEADS = {1024: 16, 3200: 25}


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> InternViTConfig:
    """The configuration that shapes imply; the number of heads only for widths of published towers.

    Args:
      shapes: torch name, relative to `VITA_PREFIX`, -> shape.

    Raises:
      UserError: a tensor that tells a size is missing, or another width.
    """
    layer = "encoder.layers.0"
    try:
        width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
        side = round((shapes["embeddings.position_embedding"][1] - 1) ** 0.5)
        intermediate = shapes[f"{layer}.mlp.fc1.weight"][0]
    except KeyError as error:
        raise UserError(f"the weights of the vision tower lack {error}") from None
    if width not in PUBLISHED_HEADS:
        raise UserError(
            f"a vision tower of width {width} is none of the published ones; describe it in the config's vision_config"
        )
    return InternViTConfig(
        hidden_size=width,
        num_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
        num_heads=PUBLISHED_HEADS[width],
        intermediate_size=intermediate,
        image_size=side * patch,
        patch_size=patch,
        norm_type="layer_norm" if f"{layer}.norm1.bias" in shapes else "rms_norm",
        qkv_bias=f"{layer}.attn.qkv.bias" in shapes,
        qk_normalization=f"{layer}.attn.q_norm.weight" in shapes,
        num_channels=channels,
    )


def config_to_hf(config: InternViTConfig) -> dict[str, Any]:
    """The fields of a public `config.json`, as `config_from_hf` reads them."""
    return {
        "model_type": "intern_vit_6b",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "norm_type": config.norm_type,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_normalization,
        "initializer_factor": config.layer_scale_init,
        "drop_path_rate": config.drop_path_rate,
        "num_channels": config.num_channels,
        "hidden_act": config.hidden_act,
    }


def weight_table(config: InternViTConfig) -> tables.Table:
    """Names as in the public InternViT files; in a VITA checkpoint they follow `VITA_PREFIX`."""
    d, layers, patch = config.hidden_size, config.num_layers, config.patch_size
    heads = (config.num_heads, config.head_dim)
    layer = "encoder.layers.{i}"
    norm_bias = config.norm_type == "layer_norm"
    rules = [
        tables.copy("embeddings.class_embedding", "embeddings/class_embedding", (1, 1, d)),
        tables.copy("embeddings.position_embedding", "embeddings/position_embedding", (1, 1 + config.grid_side**2, d)),
        *tables.conv2d("embeddings.patch_embedding", "embeddings/patch_embed", (d, config.num_channels, patch, patch)),
        *tables.norm(f"{layer}.norm1", "layers/norm1", d, bias=norm_bias, layers=layers),
        *tables.norm(f"{layer}.norm2", "layers/norm2", d, bias=norm_bias, layers=layers),
        *tables.linear(
            f"{layer}.attn.qkv", "layers/attention/qkv", (d,), (3, *heads), bias=config.qkv_bias, layers=layers
        ),
        *tables.linear(f"{layer}.attn.proj", "layers/attention/o_proj", heads, (d,), layers=layers),
        *tables.linear(f"{layer}.mlp.fc1", "layers/mlp/fc1", (d,), (config.intermediate_size,), layers=layers),
        *tables.linear(f"{layer}.mlp.fc2", "layers/mlp/fc2", (config.intermediate_size,), (d,), layers=layers),
        tables.copy(f"{layer}.ls1", "layers/ls1", (d,), layers=layers),
        tables.copy(f"{layer}.ls2", "layers/ls2", (d,), layers=layers),
    ]
    if config.qk_normalization:
        for name in ("q_norm", "k_norm"):
            rules += tables.norm(f"{layer}.attn.{name}", f"layers/attention/{name}", d, bias=False, layers=layers)
    return tables.Table(tuple(rules))
