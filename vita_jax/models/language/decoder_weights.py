"""Published names and fields of the decoder: transformers' Qwen2, Mixtral (one tensor per expert) and LLaMA layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
    query, key_value, hidden = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim), (c.hidden_size,)
    attention = f"{layer}.self_attn"
    after = f"{layer}.post_attention_layernorm"
    return (
        *linear(f"{attention}.q_proj", f"{path}/attention/q_proj", hidden, query, bias=c.qkv_bias, **stacked),
        *linear(f"{attention}.k_proj", f"{path}/attention/k_proj", hidden, key_value, bias=c.qkv_bias, **stacked),
        *linear(f"{attention}.v_proj", f"{path}/attention/v_proj", hidden, key_value, bias=c.qkv_bias, **stacked),
        *linear(f"{attention}.o_proj", f"{path}/attention/o_proj", query, hidden, bias=False, **stacked),
        *_feed_forward_rules(c, layer, path),
        *norm(f"{layer}.input_layernorm", f"{path}/input_norm", c.hidden_size, bias=False, **stacked),
        *norm(after, f"{path}/post_attention_norm", c.hidden_size, bias=False, **stacked),
    )


def _feed_forward_rules(config: DecoderConfig, layer: str, path: str) -> tuple[Rule, ...]:
    hidden, wide = (config.hidden_size,), (config.intermediate_size,)
    stacked = {"layers": config.num_layers, "bias": False}
    if not config.num_experts:
        torch, path = f"{layer}.mlp", f"{path}/mlp"
        names = ("gate_proj", "up_proj", "down_proj")
    else:
        torch, path = f"{layer}.block_sparse_moe", f"{path}/moe"
        router = linear(f"{torch}.gate", f"{path}/router", hidden, (config.num_experts,), **stacked)
        torch, names = f"{torch}.experts.{{e}}", ("w1", "w3", "w2")
        stacked["experts"] = config.num_experts
    gate, up, down = (f"{torch}.{name}" for name in names)
    rules = (
        *linear(gate, f"{path}/gate_proj", hidden, wide, **stacked),
        *linear(up, f"{path}/up_proj", hidden, wide, **stacked),
        *linear(down, f"{path}/down_proj", wide, hidden, **stacked),
    )
    return (*router, *rules) if config.num_experts else rules


@dataclass(frozen=True)
class Family:
    """How one family writes its `config.json`.

    Attributes:
      model_type: word that its `model_type` holds, whatever the case and what is around it.
      architecture: name of its public class.
      defaults: of the public configuration class (transformers 4.41.1), for fields that a file leaves out. Without a
        default for `num_key_value_heads` every query head has its own.
      fixed: switches that none of the models here sets, and the only value offered.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    MappingProxyType(
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
        }
    ),
    MappingProxyType({"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}),
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    MappingProxyType(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
        }
    ),
    MappingProxyType(
        {"hidden_act": "silu", "sliding_window": None, "tie_word_embeddings": False, "router_jitter_noise": 0.0}
    ),
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    MappingProxyType(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
        }
    ),
    MappingProxyType(
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        }
    ),
)
FAMILIES = (MIXTRAL, LLAMA, QWEN2)


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a `config.json`: by its `model_type`; without one a Mixtral if it has experts, else a Qwen2.

    Raises:
      UnsupportedOption: another family, such as MPT, GPT-NeoX or OPT, whose layers are not this decoder's.
    """
    said = str(values.get("model_type") or "").lower()
    for family in FAMILIES:
        if family.model_type in said:
            return family
    if said:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise UnsupportedOption(
            f"decoder config: model_type {values['model_type']!r} is not offered: its layers differ from the decoder's "
            f"(RMS norms, rotary positions, SwiGLU); use a checkpoint of one of {known}"
        )
    return MIXTRAL if "num_local_experts" in values else QWEN2


def config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration from the fields of a public `config.json`; absent fields take that class's defaults.

    The load-balancing loss has a weight only if `output_router_logits` is set, as in the original.

    Raises:
      UnsupportedOption: another family, see `family_of`; or a switch that none of the models here sets: another
        activation, a sliding window, a tied output head, scaled positions, noise on the router.
    """
    family = family_of(values)
    for name, fixed in family.fixed.items():
        if values.get(name, fixed) != fixed:
            raise UnsupportedOption(f"decoder config: {name} {values[name]!r} is not offered; only {fixed!r} is")
    v = {**family.defaults, **values}
    experts: dict[str, Any] = {}
    if family is MIXTRAL:
        experts = {
            "num_experts": v["num_local_experts"],
            "experts_per_token": v["num_experts_per_tok"],
            "router_aux_loss_coef": v["router_aux_loss_coef"] if v["output_router_logits"] else 0.0,
        }
    return DecoderConfig(
        vocab_size=v["vocab_size"],
        hidden_size=v["hidden_size"],
        num_layers=v["num_hidden_layers"],
        num_heads=v["num_attention_heads"],
        num_kv_heads=v.get("num_key_value_heads") or v["num_attention_heads"],
        head_dim=v.get("head_dim") or v["hidden_size"] // v["num_attention_heads"],
        intermediate_size=v["intermediate_size"],
        rope_theta=v["rope_theta"],
        rms_norm_eps=v["rms_norm_eps"],
        qkv_bias=family is QWEN2,
        max_positions=v["max_position_embeddings"],
        **experts,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a public `config.json`, as `config_from_hf` reads them.

    Raises:
      UnsupportedOption: biases and experts, which no published family has together.
    """
    if config.qkv_bias and config.num_experts:
        raise UnsupportedOption(
            f"decoder: qkv_bias=True with num_experts={config.num_experts} is neither Qwen2 (biases, dense) nor "
            "Mixtral (no biases, experts) nor LLaMA (no biases, dense)"
        )
    family = QWEN2 if config.qkv_bias else MIXTRAL if config.num_experts else LLAMA
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        **family.fixed,
    }
    if config.head_dim != config.hidden_size // config.num_heads:
        fields["head_dim"] = config.head_dim
    if family is MIXTRAL:
        fields |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "router_aux_loss_coef": config.router_aux_loss_coef or MIXTRAL.defaults["router_aux_loss_coef"],
            "output_router_logits": config.router_aux_loss_coef > 0,
        }
    return fields
