"""Published names and fields of the decoder, in transformers' Qwen2 layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vita_jax.conversion.tables import Rule, Table, copy, linear, norm
from vita_jax.errors import UnsupportedOption
from vita_jax.models.language.decoder import DecoderConfig

# Buffers that older releases of transformers saved; they hold nothing that is not computed from the config.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def weight_table(config: DecoderConfig) -> Table:
    """The table of one decoder; paths are relative to its own parameters.

    The number of vocabulary rows is `config.vocab_size`. Released tools also write files cut to the tokenizer's length
    (151665 rows instead of 152064): read those with a config that says so.
    """
    c, hidden = config, (config.hidden_size,)
    return Table(
        (
            copy("model.embed_tokens.weight", "embed_tokens/embedding", (c.vocab_size, c.hidden_size)),
            *layer_rules(c, "model.layers"),
            *norm("model.norm", "norm", c.hidden_size, bias=False),
            *linear("lm_head", "lm_head", hidden, (c.vocab_size,), bias=False),
        ),
        ignore=IGNORED,
    )


def layer_rules(config: DecoderConfig, torch: str, path: str = "layers") -> tuple[Rule, ...]:
    """The rules of a stack of layers that the checkpoint names `<torch>.<i>...` and the parameter tree `<path>/...`."""
    c, layer, stacked = config, f"{torch}.{{i}}", {"layers": config.num_layers}
    query, key_value, hidden, wide = (
        (c.num_heads, c.head_dim),
        (c.num_kv_heads, c.head_dim),
        (c.hidden_size,),
        (c.intermediate_size,),
    )
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    after = f"{layer}.post_attention_layernorm"
    return (
        *linear(f"{attention}.q_proj", f"{path}/attention/q_proj", hidden, query, bias=c.qkv_bias, **stacked),
        *linear(f"{attention}.k_proj", f"{path}/attention/k_proj", hidden, key_value, bias=c.qkv_bias, **stacked),
        *linear(f"{attention}.v_proj", f"{path}/attention/v_proj", hidden, key_value, bias=c.qkv_bias, **stacked),
        *linear(f"{attention}.o_proj", f"{path}/attention/o_proj", query, hidden, bias=False, **stacked),
        *linear(f"{mlp}.gate_proj", f"{path}/mlp/gate_proj", hidden, wide, bias=False, **stacked),
        *linear(f"{mlp}.up_proj", f"{path}/mlp/up_proj", hidden, wide, bias=False, **stacked),
        *linear(f"{mlp}.down_proj", f"{path}/mlp/down_proj", wide, hidden, bias=False, **stacked),
        *norm(f"{layer}.input_layernorm", f"{path}/input_norm", c.hidden_size, bias=False, **stacked),
        *norm(after, f"{path}/post_attention_norm", c.hidden_size, bias=False, **stacked),
    )


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration from the fields of a public Qwen2 `config.json`; absent fields take that class's defaults.

    Raises:
      UnsupportedOption: a switch that no Qwen2 used by VITA sets: another activation, a sliding window, a tied output
        head.
    """
    for name, default in (("hidden_act", "silu"), ("use_sliding_window", False), ("tie_word_embeddings", False)):
        if values.get(name, default) != default:
            raise UnsupportedOption(f"decoder config: {name} {values[name]!r} is not offered; only {default!r} is")
    hidden_size, num_heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    return DecoderConfig(
        vocab_size=values.get("vocab_size", 151936),
        hidden_size=hidden_size,
        num_layers=values.get("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads", 32),
        head_dim=values.get("head_dim", hidden_size // num_heads),
        intermediate_size=values.get("intermediate_size", 22016),
        rope_theta=values.get("rope_theta", 10000.0),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        max_positions=values.get("max_position_embeddings", 32768),
    )
