"""Names and layout of the published weights of the stack in `encoder.py`."""

from __future__ import annotations

from vita_jax.conversion import tables
from vita_jax.models.vision.encoder import ViTConfig


def encoder_rules(config: ViTConfig, torch: str, path: str) -> tuple[tables.Rule, ...]:
    """Rules of the stack: torch names under `torch` ("encoder.layers"), parameters under `path` ("encoder/layers")."""
    d, layers = config.hidden_size, config.num_layers
    heads = (config.num_heads, config.head_dim)
    layer = f"{torch}.{{i}}"
    rules: list[tables.Rule] = []
    for theirs, ours in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
        rules += tables.norm(f"{layer}.{theirs}", f"{path}/{ours}", d, layers=layers)
    for name in ("q_proj", "k_proj", "v_proj"):
        rules += tables.linear(f"{layer}.self_attn.{name}", f"{path}/attention/{name}", (d,), heads, layers=layers)
    rules += tables.linear(f"{layer}.self_attn.out_proj", f"{path}/attention/o_proj", heads, (d,), layers=layers)
    rules += tables.linear(f"{layer}.mlp.fc1", f"{path}/mlp/fc1", (d,), (config.intermediate_size,), layers=layers)
    rules += tables.linear(f"{layer}.mlp.fc2", f"{path}/mlp/fc2", (config.intermediate_size,), (d,), layers=layers)
    return tuple(rules)
