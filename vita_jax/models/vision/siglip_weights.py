"""Names and layout of published SigLIP vision weights and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vita_jax.conversion import tables
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vision.encoder_weights import encoder_rules


def config_from_hf(values: Mapping[str, Any]) -> ViTConfig:
    """The configuration from the fields of a public `config.json`; a nested `vision_config` is unwrapped.

    Absent fields take the public configuration class's defaults (those of the base model).
    """
    values = values.get("vision_config", values)
    return ViTConfig(
        hidden_size=values.get("hidden_size", 768),
        num_layers=values.get("num_hidden_layers", 12),
        num_heads=values.get("num_attention_heads", 12),
        intermediate_size=values.get("intermediate_size", 3072),
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 16),
        hidden_act=values.get("hidden_act", "gelu_pytorch_tanh"),
        layer_norm_eps=values.get("layer_norm_eps", 1e-6),
        num_channels=values.get("num_channels", 3),
    )


def weight_table(config: ViTConfig) -> tables.Table:
    """Names as in the public files, which start with "vision_model."."""
    d, patch, heads = config.hidden_size, config.patch_size, (config.num_heads, config.head_dim)
    qkv = tables.linear("head.attention.in_proj", "pooling/qkv", (d,), (3, *heads))
    rules = (
        tables.copy("embeddings.position_embedding.weight", "embeddings/position_embedding", (config.num_patches, d)),
        *tables.conv2d("embeddings.patch_embedding", "embeddings/patch_embed", (d, config.num_channels, patch, patch)),
        *encoder_rules(config, "encoder.layers", "encoder/layers"),
        *tables.norm("post_layernorm", "post_norm", d),
        tables.copy("head.probe", "pooling/probe", (1, 1, d)),
        # torch.nn.MultiheadAttention writes in_proj_weight where a linear layer writes in_proj.weight
        *(replace(rule, torch=rule.torch.replace("in_proj.", "in_proj_")) for rule in qkv),
        *tables.linear("head.attention.out_proj", "pooling/o_proj", heads, (d,)),
        *tables.norm("head.layernorm", "pooling/norm", d),
        *tables.linear("head.mlp.fc1", "pooling/mlp/fc1", (d,), (config.intermediate_size,)),
        *tables.linear("head.mlp.fc2", "pooling/mlp/fc2", (config.intermediate_size,), (d,)),
    )
    return tables.Table(rules, ignore=(r"embeddings\.position_ids",)).prefixed(torch="vision_model.")
