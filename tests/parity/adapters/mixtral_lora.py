"""Golden cases of the mixture-of-experts decoder and of low-rank adapters: `mixtral`, `lora`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tests.parity.adapters.language import greedy, positions_of
from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import export_params, import_params
from vita_jax.models.language import decoder_weights
from vita_jax.models.language.decoder import Decoder
from vita_jax.models.language.experts import ROUTER, router_logits
from vita_jax.models.lora import attach, merge
from vita_jax.models.lora_weights import import_adapters, sites_of_names, wrapped_table
from vita_jax.ops.experts import balance, route
from vita_jax.ops.losses import next_token_loss
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.rope import rotary_tables


def mixtral(case: Case) -> Result:
    """The bare language model: hidden states, routing and experts of every layer, losses, greedy continuation."""
    config = decoder_weights.config_from_hf(case.config)
    params = import_params(decoder_weights.weight_table(config), case.weights)
    decoder, ids, mask = Decoder(config), case.inputs["input_ids"], case.inputs["attention_mask"]

    @jax.jit
    def run(params: Any, ids: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> tuple:
        variables = {"params": params}
        embeds = decoder.apply(variables, ids, method="embed")
        kinds = ["intermediates", ROUTER]
        (hidden, _), kept = decoder.apply(variables, embeds, positions, segment_ids, mutable=kinds)
        logits = decoder.apply(variables, hidden, method="logits")
        return hidden, logits, kept["intermediates"]["layers"], router_logits(kept)

    hidden, logits, kept, routed = run(params, ids, positions_of(ids), mask)
    outputs = {f"hidden_states.{i}": state for i, state in enumerate([*kept["layer_input"][0], hidden])}
    for i, layer in enumerate(rearrange(routed, "l b s e -> l (b s) e")):
        routing = route(layer, config.experts_per_token)
        outputs |= {f"router_logits.{i}": layer, f"top2_weights.{i}": routing.weights}
        outputs |= {f"top2_experts.{i}": routing.experts}
        outputs |= {f"moe_{end}.{i}": kept["moe"][end][0][i] for end in ("input", "output")}
    total, count = next_token_loss(hidden, params["lm_head"]["kernel"], case.inputs["labels"], mask, chunk_size=5)
    loss, aux = total / count, balance(routed, config.experts_per_token, mask).loss
    unmasked = balance(_padding_routed(decoder, params, ids, mask), config.experts_per_token).loss
    outputs |= {"logits": logits, "loss": loss, "aux_loss": aux, "aux_loss_no_mask": unmasked}
    outputs["loss_with_aux"] = loss + case.config["router_aux_loss_coef"] * aux
    prompt = case.inputs["greedy_prompt_ids"]
    embeds, steps = decoder.apply({"params": params}, prompt, method="embed"), case.outputs["greedy_ids"].shape[1]
    outputs["greedy_ids"] = greedy(decoder, params, embeds, positions_of(prompt), np.ones_like(prompt), steps)
    rows = ("router_logits", "top2")
    valid = {name: mask.reshape(-1, 1) for name in case.outputs if name.startswith(rows)}
    states = ("hidden_states", "logits", "moe")
    valid |= {name: mask[..., None] for name in case.outputs if name.startswith(states)}
    return Result(outputs, valid)


def _padding_routed(decoder: Decoder, params: Any, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
    """Router logits (l b s e) where padding attends as in the original, whose loss without a mask counts padding too.

    There a padded position attends to the real ones before it, or to everything where there are none; here it attends
    to nothing.
    """
    config = decoder.config
    everything = np.ones_like(mask)
    seen = make_attention_mask(everything, everything) & (mask[:, None, None, :] > 0)
    seen = seen | ~jnp.any(seen, axis=-1, keepdims=True)
    rotary = rotary_tables(positions_of(ids), config.head_dim, config.rope_theta)

    def layers(decoder: Decoder, ids: jax.Array) -> Any:
        return decoder.layers((decoder.embed(ids), None), jnp.arange(config.num_layers), rotary, seen, None)

    return router_logits(decoder.apply({"params": params}, ids, method=layers, mutable=[ROUTER])[1])


def lora(case: Case) -> Result:
    """The language model with adapters, without, and with the adapters merged into it."""
    config = decoder_weights.config_from_hf(case.config)
    table = decoder_weights.weight_table(config)
    adapters = {name: x for name, x in case.weights.items() if ".lora_" in name}
    base = {name: x for name, x in case.weights.items() if name not in adapters}
    sites = sites_of_names(table, adapters, "default")
    params = import_params(wrapped_table(table, sites), base)
    fields = {"r": case.config["lora_r"], "lora_alpha": case.config["lora_alpha"]}
    adapters = import_adapters(table, adapters, fields, "default")
    decoder, ids, mask = Decoder(config), case.inputs["input_ids"], case.inputs["attention_mask"]

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params}
        embeds = decoder.apply(variables, ids, method="embed")
        hidden, _ = decoder.apply(variables, embeds, positions_of(ids), mask)
        return hidden, decoder.apply(variables, hidden, method="logits")

    hidden, logits = run(attach(params, adapters))
    total, count = next_token_loss(hidden, params["lm_head"]["kernel"], case.inputs["labels"], mask, chunk_size=4)
    merged = merge(params, adapters)
    outputs = {"logits": logits, "loss": total / count, "logits_base": run(params)[1], "logits_merged": run(merged)[1]}
    outputs["merged_q_proj_0"] = export_params(table, merged)["model.layers.0.self_attn.q_proj.weight"]
    return Result(outputs, {name: mask[..., None] for name in case.outputs if name.startswith("logits")})


MODULES = {"mixtral": mixtral, "lora": lora}
