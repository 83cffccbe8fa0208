"""Names and layout of published CLIP vision weights and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vita_jax.conversion import tables
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vision.encoder_weights import encoder_rules


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


def weight_table(config: ViTConfig) -> tables.Table:
    """Names as in the public files, which start with "vision_model."; CLIP's text half is not read."""
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
    return tables.Table(rules, ignore=(r"embeddings\.position_ids",)).prefixed(torch="vision_model.")
