"""Speech decoders, sampling filters, dialogue states and text clean-up against the golden cases of `speech_out`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import import_params
from vita_jax.inference import speech_text
from vita_jax.inference.speech_tokens import SpeechSampling, speech_step, start_speech
from vita_jax.models import state_head
from vita_jax.models.speech.config import ROPE_THETA, SpeechDecoderConfig
from vita_jax.models.speech.nar_decoder import NarDecoder, length_mask
from vita_jax.models.speech.speech_decoder import (
    SpeechBatch,
    SpeechDecoder,
    speech_labels,
    speech_loss,
    teacher_mask,
)
from vita_jax.models.speech.speech_decoder_weights import weight_table
from vita_jax.ops.rope import rotary_tables
from vita_jax.ops.sampling_filters import filtered_probabilities

Outputs = dict[str, Any]


def _load(case: Case) -> tuple[SpeechDecoder, Any]:
    c = case.config
    config = SpeechDecoderConfig(
        num_codes=c["vocab"],
        hidden_size=c["hidden"],
        intermediate_size=c["intermediate"],
        num_heads=c["heads"],
        num_layers=c["num_blocks"],
        prefix=bool(c.get("prefix", 0)),
    )
    return SpeechDecoder(config), import_params(weight_table(config), case.weights)


def _layers(name: str, inputs: jax.Array, last: jax.Array) -> Outputs:
    """The output of every layer: the input of the next one, and the stack's own for the last."""
    return {f"{name}{i}": x for i, x in enumerate([*inputs[1:], last])}


def nar_decoder(case: Case) -> Result:
    model, params = _load(case)
    lengths = case.inputs["hidden_lens"]
    run = jax.jit(lambda p, x: NarDecoder(model.config).apply({"params": p}, x, lengths, mutable=["intermediates"]))
    out, kept = run(params["nar"], case.inputs["hidden"])
    inputs = kept["intermediates"]["layers"]["layer_input"][0]
    outputs = {"out": out} | _layers("pre_nn_layer", inputs, out)
    real = np.asarray(length_mask(lengths, out.shape[1]))[..., None]
    return Result(outputs, {name: real for name in outputs})


def ar_train(case: Case) -> Result:
    model, params = _load(case)
    i, c, variables = case.inputs, model.config, {"params": params}
    batch = SpeechBatch(
        i["x"], i["x_lens"], jnp.asarray(i["y"]), i["y_lens"], i.get("x_prefix"), i.get("x_prefix_lens")
    )
    (_, rows, _), steps = i["x"].shape, i["y"].shape[1]
    embeds, positions, mask = model.apply(variables, batch, method=SpeechDecoder.teacher_inputs)
    normed, kept = jax.jit(lambda p, b: model.apply({"params": p}, b, mutable=["intermediates"]))(params, batch)
    kept = kept["intermediates"]
    logits = model.apply(variables, normed[:, rows + 1 :], method=SpeechDecoder.logits)
    labels = speech_labels(batch.codes, batch.code_lengths, c)
    total, count = speech_loss(logits, labels, c)
    outputs: Outputs = {"inputs_embeds": embeds, "attend_allowed": mask.astype(jnp.int32), "norm": normed}
    outputs |= {"position_ids": positions[:1], "logits": logits, "labels": labels, "loss_sum": total}
    outputs |= {"loss_mean_per_token": total / count, "num_label_tokens": count.astype(jnp.int32)}
    cos, sin = rotary_tables(positions[:1], c.hidden_size // c.num_heads, ROPE_THETA)
    outputs |= {"rotary_cos": jnp.tile(cos[0], 2), "rotary_sin": jnp.tile(sin[0], 2)}  # the original stores both halves
    nar_out = embeds[:, 1 : rows + 1]
    outputs |= _layers("pre_nn_layer", kept["nar"]["layers"]["layer_input"][0], nar_out)
    outputs |= _layers("ar_layer", kept["ar"]["layers"]["layer_input"][0], kept["ar_output"][0])

    real = np.asarray(teacher_mask(batch.feature_lengths, batch.code_lengths, rows, steps)[1])[..., None]
    text = np.asarray(length_mask(batch.feature_lengths, rows))[..., None]
    is_speech = np.arange(real.shape[1])[:, None] > rows
    valid = {"norm": real, "logits": real[:, rows + 1 :], "inputs_embeds": real | is_speech}
    valid |= {name: text if name.startswith("pre_nn") else real for name in outputs if "layer" in name}
    if batch.prefix is not None:
        prefix = _layers("prefix_layer", kept["prefix"]["layers"]["layer_input"][0], kept["prefix"]["output"][0])
        before = np.asarray(length_mask(batch.prefix_lengths, batch.prefix.shape[1]))[..., None]
        outputs, valid = outputs | prefix, valid | {name: before for name in prefix}
    return Result(outputs, valid)


def ar_decoder(case: Case) -> Outputs:
    model, params = _load(case)
    hidden, prefix = case.inputs["hidden"], case.inputs.get("prefix")
    lengths = np.full(len(hidden), hidden.shape[1], np.int32)
    prefix_lengths = None if prefix is None else np.full(len(prefix), prefix.shape[1], np.int32)
    max_tokens = case.config["max_tokens"]
    sampling = SpeechSampling(
        top_k=case.config["top_k"],
        penalty=case.config["penalty"],
        penalty_window=max(case.config["penalty_window_size"], 0),
        forbid_special=False,  # the original draws from all ids
        greedy=True,
    )

    @jax.jit
    def run(params: Any) -> tuple:
        state = start_speech(
            model,
            params,
            hidden,
            lengths,
            key=jax.random.key(0),
            max_tokens=max_tokens,
            sampling=sampling,
            prefix=prefix,
            prefix_lengths=prefix_lengths,
        )
        slots = state.cache.num_slots
        started = model.apply(
            {"params": params}, hidden, lengths, slots, prefix, prefix_lengths, method=SpeechDecoder.start
        )
        _, steps = jax.lax.scan(
            lambda state, _: speech_step(model, params, state, sampling), state, None, length=max_tokens
        )
        return started[1], started[2], jax.tree.map(lambda x: x[:, 0], steps)  # the only row

    prompt, last_layer, steps = run(params)
    tokens = np.asarray(steps.tokens)
    ends = np.flatnonzero(tokens == model.config.eos)
    count = int(ends[0]) + 1 if len(ends) else len(tokens)
    return {
        "prefill_inputs_embeds": prompt,
        "prefill_hidden_last_layer": last_layer,
        "step_normed_hidden": steps.normed[:count],
        "step_logits": steps.logits[:count],
        "step_logits_after_penalty": steps.penalised[:count],
        "step_probs_after_topk": steps.probabilities[:count],
        "step_positions": steps.positions[:count],
        "sampled_ids": tokens[:count],
        "tokens_yielded": tokens[: count - 1] if len(ends) else tokens,
        "ended_with_eos": np.int32(len(ends) > 0),
    }


def sampling_filter(case: Case) -> Outputs:
    logits = jnp.asarray(case.inputs["logits"])
    return {f"probs_{i}": filtered_probabilities(logits, *s) for i, s in enumerate(case.config["settings"])}


def dialogue_state_head(case: Case) -> Outputs:
    config = state_head.StateHeadConfig(case.config["hidden"], case.config["num_states"])
    params = import_params(state_head.weight_table(config), case.weights)
    logits = state_head.StateHead(config).apply({"params": params}, case.inputs["last_hidden_state"][:, -1])
    probabilities, states = state_head.dialogue_states(logits)
    codes = np.asarray([case.config["codes"][name] for name in state_head.DIALOGUE_STATES], np.int32)
    return {"state_logits": logits, "state_probs": probabilities, "next_state_code": codes[np.asarray(states)]}


def speech_text_cleanup(case: Case) -> list[str]:
    functions = {
        "post_process": speech_text.clean_for_freeze_omni,
        "server_clean": speech_text.clean_for_speech,
        "remove_uncommon_punctuation": speech_text.remove_uncommon_punctuation,
        "split_into_sentences": speech_text.split_sentences,
        "replace_equation": speech_text.verbalise_formulas,
        "remove_special_tokens": speech_text.remove_markers,
    }
    mismatches = []
    for name, pairs in case.table.items():
        if not isinstance(pairs, list):
            continue
        if name not in functions:
            mismatches.append(f"{name}: unknown function")
            continue
        for text, want in pairs:
            got = functions[name](text)
            if got != want:
                mismatches.append(f"{name}({text!r}): got {got!r}, expected {want!r}")
    return mismatches


MODULES = {
    "nar_decoder": nar_decoder,
    "ar_train": ar_train,
    "ar_decoder": ar_decoder,
    "sampling_filter": sampling_filter,
    "state_head": dialogue_state_head,
    "speech_text_cleanup": speech_text_cleanup,
}
