"""Golden cases of area `audio`: features, encoder, adapters, tower, streaming, CTC."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import Table, export_params, import_params
from vita_jax.errors import UnsupportedOption
from vita_jax.models.audio import ctc_head_weights, encoder_weights, tower_weights
from vita_jax.models.audio.cmvn import RELEASED_ISTD, RELEASED_MEAN, cmvn_from_statistics
from vita_jax.models.audio.ctc_head import CtcHead
from vita_jax.models.audio.encoder import AudioEncoder, AudioEncoderConfig, make_cache
from vita_jax.models.audio.streaming import cached_frames, lagging_counter
from vita_jax.models.audio.tower import AudioFeatures, AudioTower, AudioTowerConfig
from vita_jax.models.connectors import audio_adapters, audio_adapters_weights
from vita_jax.models.connectors.audio_adapters import (
    RUNNING_STATS,
    AudioAdapter,
    AudioAdapterConfig,
    with_running_stats,
)
from vita_jax.ops import filter_bank
from vita_jax.ops.ctc import ctc_loss, reduce_ctc
from vita_jax.ops.filter_bank import FilterBankConfig
from vita_jax.ops.masks import chunk_mask, chunked_attention_mask, padding_mask

Outputs = dict[str, Any]
TABLE_LENGTH = 5000  # of the original's positions, for its counter


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def _filter_bank_config(values: dict[str, Any]) -> FilterBankConfig:
    window, snip_edges = values.get("window", "povey"), values.get("snip_edges", True)
    if window != "povey" or not snip_edges:
        raise UnsupportedOption(f"filter bank with window {window!r} and snip_edges {snip_edges}")
    names = (
        *("sample_rate", "num_mel_bins", "frame_length_ms", "frame_shift_ms"),
        *("preemphasis", "low_freq", "high_freq", "dither"),
    )
    return FilterBankConfig(**{name: values[name] for name in names if name in values})


def fbank(case: Case) -> Outputs:
    """The float32 features come from the device's path; the host's gives the steps before, and the float64 features."""
    config = _filter_bank_config(case.config)
    wave, inputs = case.inputs["waveform"], case.inputs
    features = jax.jit(partial(filter_bank.log_mel, config=config))(wave)[0]
    frames = filter_bank.windowed_frames(wave, config)[0]
    return {
        "fbank": features,
        "fbank_cmvn": (features - inputs["cmvn_mean"]) * inputs["cmvn_istd"],
        "fbank_f64": filter_bank.log_mel(wave.astype(np.float64), config)[0],
        "mel_banks": filter_bank.mel_filters(config),
        "window": filter_bank.povey_window(config.window_size),
        "windowed_frames_first4": frames[:4],
        "power_first4": filter_bank.power_spectrum(frames[:4]),
    }


def fbank_stream(case: Case) -> Outputs:
    config = FilterBankConfig()
    block, carried = case.config["block"], case.config["carry_frames"]
    assert case.config["carry_samples"] == config.window_size - config.window_shift
    wave = case.inputs["waveform"][0]
    wave = np.pad(wave, (0, -len(wave) % block))
    state = filter_bank.start_stream(config, carried_frames=carried)
    step = jax.jit(filter_bank.stream_block)
    windows = []
    for start in range(0, len(wave), block):
        state, window = step(state, wave[start : start + block])
        windows.append(window)
    silence = np.zeros(case.config["carry_samples"], np.float32)
    features = filter_bank.log_mel(np.concatenate([silence, wave]), config)
    full = np.concatenate([np.zeros((carried, config.num_mel_bins), np.float32), features])
    return {"chunks": np.stack(windows), "equivalent_full": full}


def resample(case: Case) -> Outputs:
    rates = case.config["orig"], case.config["new"]
    options = {name: case.config[name] for name in ("lowpass_filter_width", "rolloff") if name in case.config}
    return {
        "y": filter_bank.resample(jnp.asarray(case.inputs["x"]), *rates, **options),
        "kernel": filter_bank.resample_kernel(*rates, **options),
    }


def cmvn(case: Case) -> Outputs:
    stats = (case.inputs[name] for name in ("mean_stat", "var_stat"))
    frames = float(case.inputs["frame_num"].item())
    mean, istd = cmvn_from_statistics(*stats, frames, case.config["variance_floor"])
    return {"mean": mean, "istd": istd, "y": (case.inputs["x"] - mean) * istd}


def cmvn_constants(case: Case) -> list[str]:
    return [
        f"{name}: got {got[:2]}..., expected {case.table[name][:2]}..."
        for name, got in (("mean", RELEASED_MEAN), ("istd", RELEASED_ISTD))
        if list(got) != case.table[name]
    ]


def audio_lengths(case: Case) -> list[str]:
    mismatches = []
    for row in [*case.table["by_samples"], *case.table["by_frames"]]:
        frames = filter_bank.num_frames(row["samples_16k"]) if "samples_16k" in row else row["fbank_frames"]
        encoded = filter_bank.encoder_length(frames)
        got = {
            "fbank_frames": frames,
            "encoder_frames": encoded,
            "llm_tokens": filter_bank.token_length(encoded),
        }
        mismatches += [f"{row}: got {name} {value}" for name, value in got.items() if value != row[name]]
    return mismatches


def audio_masks(case: Case) -> Outputs:
    lengths, size = jnp.asarray(case.inputs["lengths"]), case.config["T"]
    encoded, encoded_size = filter_bank.encoder_length(lengths), filter_bank.encoder_length(size)
    valid = padding_mask(encoded, encoded_size)
    tokens = padding_mask(filter_bank.token_length(encoded), filter_bank.token_length(encoded_size))
    outputs: dict[str, jax.Array] = {}
    for name in case.outputs:
        what, *numbers = name.split("_")
        if what == "pad":
            outputs[name] = {"pad": padding_mask(lengths, size), "pad_sub4": valid, "pad_sub8": tokens}[name][:, None]
        elif what == "chunk":
            outputs[name] = chunk_mask(*map(int, numbers))[0, 0]
        else:  # static_{chunk}_{left}; dynamic chunks in evaluation: full, or fixed by the caller
            chunk, left = (encoded_size, -1) if name == "dynamic_full" else map(int, numbers[-2:])
            outputs[name] = chunked_attention_mask(valid, chunk, left)[:, 0]
    return {name: np.asarray(mask, np.float32) for name, mask in outputs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------------------------------


def encoder_config(values: dict[str, Any], **others: Any) -> AudioEncoderConfig:
    return AudioEncoderConfig(
        input_dim=values["input_dim"],
        hidden_size=values["dim"],
        num_layers=values["layers"],
        num_heads=values["heads"],
        intermediate_size=values["ffn"],
        chunk_size=values.get("chunk_size", -1),
        left_chunks=values.get("left_chunks", -1),
        positions=values.get("pos_enc", "rel-enc"),
        normalize_before=values.get("normalize_before", True),
        concat_after=values.get("concat_after", False),
        feed_forward=values.get("ffn_type", "linear"),
        feed_forward_kernel=values.get("ffn_kernel", 1),
        **{"cmvn": "identity", **others},
    )


def audio_encoder(case: Case) -> Result:
    config = encoder_config(case.config)
    params = import_params(encoder_weights.weight_table(config), case.weights)
    lengths = jnp.asarray(case.inputs["lengths"])
    apply = jax.jit(partial(AudioEncoder(config).apply, capture=True))
    hidden, valid, captured = apply({"params": params}, case.inputs["feats"], lengths)
    outputs = {name: captured[name] for name in ("cmvn", "subsample", "embed", "scaled", "pos_emb")}
    outputs |= {f"layer{i}": x for i, x in enumerate(captured["output"])}
    mask = np.asarray(captured["mask"][:, 0], np.float32)
    outputs |= {
        "conv": jnp.moveaxis(captured["conv"], -1, 1),
        "layer0_attn": captured["attn"][0],
        "layer0_ffn": captured["mlp"][0],
        "encoder_out": hidden,
        "attn_mask": mask,
        "mask": np.asarray(valid[:, None], np.float32),
        "out_lengths": filter_bank.encoder_length(lengths),
    }
    return Result(outputs)


def audio_encoder_stream(case: Case) -> Outputs:
    config = encoder_config(case.config, stream_positions="lagging")
    params = {"params": import_params(encoder_weights.weight_table(config), case.weights)}
    model, chunk = AudioEncoder(config), config.chunk_size
    feats = np.pad(case.inputs["feats"], ((0, 0), (3, 0), (0, 0)))
    step = jax.jit(partial(model.apply, method="stream_step"))
    cache, blocks, outputs = make_cache(config, len(feats)), [], {}
    counters: list[list[int]] = [[], []]
    for number in range((feats.shape[1] - 3) // (4 * chunk)):
        start = 4 * chunk * number
        hidden, cache = step(params, feats[:, start : start + 4 * chunk + 3], cache)
        blocks.append(hidden)
        filled = int(cached_frames(cache, chunk)[0])
        counters[0].append(filled)
        counters[1].append(int(lagging_counter(number + 1, chunk, config.left_chunks, TABLE_LENGTH)))
        for layer in range(config.num_layers):
            for kind, values in (("k", cache.k), ("v", cache.v)):
                kept = values[layer, :, values.shape[2] - filled :]
                outputs[f"cache_{kind}_l{layer}_step{number}"] = jnp.swapaxes(kept, 1, 2)
    lengths = np.full(len(feats), feats.shape[1])
    outputs["full_chunked_out"] = jax.jit(model.apply)(params, feats, lengths)[0]
    outputs["stream_out"] = jnp.concatenate(blocks, axis=1)
    outputs["cache_len_after_step"], outputs["pe_index_after_step"] = (np.asarray(x, np.int32) for x in counters)
    return outputs


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def adapter_config(values: dict[str, Any], source: str = "vita15") -> AudioAdapterConfig:
    """`source` is the code line: they choose the second convolution by width, or never."""
    kind, dim, llm_dim = values.get("adapter", "subsampling"), values["dim"], values["llm_dim"]
    return AudioAdapterConfig(
        kind=kind,
        input_size=dim,
        output_size=llm_dim,
        kernel_size=max(values.get("kernel", 5), 1),
        activation=values.get("act", "gelu"),
        norm=values.get("norm", "layer"),
        causal=source == "freeze_omni",
        two_convs=kind == "subsampling" and source in ("vita10", "freeze_omni") and 4 * dim < llm_dim,
    )


def audio_adapter(case: Case) -> Outputs:
    config = adapter_config(case.config, case.config["source"])
    table = audio_adapters_weights.weight_table(config)
    params = import_params(table, case.weights)
    model, x = AudioAdapter(config), case.inputs["x"]
    valid = jnp.asarray(case.inputs["mask"][:, 0]) > 0
    y, out_valid = jax.jit(model.apply)({"params": params}, x, valid)
    outputs = {"y": y, "mask": np.asarray(out_valid[:, None], np.float32)}
    if case.config.get("train_mode"):
        train = jax.jit(partial(model.apply, train=True, mutable=[RUNNING_STATS]))
        (outputs["y_train"], _), left = train({"params": params}, x, valid)
        updated = export_params(table, with_running_stats(params, left.get(RUNNING_STATS, {})))
        outputs |= {f"after_train/{name}": value for name, value in updated.items()}
    return outputs


def audio_adapter_stream(case: Case) -> Outputs:
    config = adapter_config(case.config, "freeze_omni")
    params = {"params": import_params(audio_adapters_weights.weight_table(config), case.weights)}
    model, x, chunk = AudioAdapter(config), case.inputs["x"], case.config["chunk"]
    step = jax.jit(partial(model.apply, method="stream_step"))
    cache, blocks, outputs = audio_adapters.make_cache(config, len(x)), [], {}
    for number, start in enumerate(range(0, x.shape[1], chunk)):
        y, cache = step(params, x[:, start : start + chunk], cache)
        blocks.append(y)
        outputs[f"cache_after_{number}"] = jnp.swapaxes(cache.inputs[-1], 1, 2)
    everything = np.ones(x.shape[:2], bool)
    full = jax.jit(model.apply)(params, x, everything)[0]
    return outputs | {"y_stream": jnp.concatenate(blocks, axis=1), "y_full": full}


# ---------------------------------------------------------------------------------------------------------------------
# Tower
# ---------------------------------------------------------------------------------------------------------------------


def tower_config(values: dict[str, Any], **encoder: Any) -> AudioTowerConfig:
    source = values.get("source", "vita15")
    return AudioTowerConfig(
        encoder_config(values, **encoder), adapter_config(values, source), values.get("prompt_num", 0)
    )


def tower_result(case: Case, config: AudioTowerConfig, features: Any, lengths: np.ndarray) -> Result:
    params = import_params(tower_weights.weight_table(config), case.weights)
    got: AudioFeatures = jax.jit(AudioTower(config).apply)({"params": params}, features, lengths)
    prompts = config.num_prompt_tokens
    outputs = {
        "encoder_out": got.hidden,
        "adapter_out": got.embeds[:, prompts:],
        "inputs_embeds": got.embeds,
        "attention_mask": np.asarray(got.valid, np.float32),
        "lengths_for_llm": jnp.sum(got.valid, axis=1, dtype=jnp.int32),
    }
    with_prompts = np.pad(got.valid, ((0, 0), (prompts, 0)), constant_values=True)
    # The original's adapter zeroes the encoder's output behind the end of a clip, in place.
    valid = {"encoder_out": got.hidden_valid, "adapter_out": got.valid, "inputs_embeds": with_prompts}
    return Result(outputs, {name: np.asarray(mask)[..., None] for name, mask in valid.items()})


def audio_tower(case: Case) -> Result:
    return tower_result(case, tower_config(case.config), case.inputs["feats"], case.inputs["lengths"])


def audio_pipeline(case: Case) -> Result:
    features = jax.jit(filter_bank.log_mel)(case.inputs["waveform"])
    lengths = np.full(len(features), features.shape[1], np.int32)
    result = tower_result(case, tower_config(case.config), features, lengths)
    return Result({**result.outputs, "fbank": features[0]}, result.valid)


def audio_tower_serving(case: Case) -> Result:
    config = tower_config(case.config, cmvn="none")
    params = import_params(tower_weights.serving_weight_table(config), case.weights)
    lengths = jnp.sum(jnp.asarray(case.inputs["mask"]) > 0, axis=1)
    got = jax.jit(AudioTower(config).apply)({"params": params}, case.inputs["feats_cmvn"], lengths)
    outputs = {
        "last_hidden_state": got.hidden,
        "projected": got.embeds,
        "mask": np.asarray(got.valid, np.float32),
    }
    return Result(outputs, {"last_hidden_state": got.hidden_valid[..., None], "projected": got.valid[..., None]})


# ---------------------------------------------------------------------------------------------------------------------
# CTC
# ---------------------------------------------------------------------------------------------------------------------


def ctc(case: Case) -> Outputs:
    inputs, blank = case.inputs, case.config["blank"]
    hidden, vocab = jnp.asarray(inputs["encoder_out"]), case.config["vocab"]
    params = import_params(ctc_head_weights.weight_table(hidden.shape[-1], vocab), case.weights)
    lengths, target_lengths = jnp.asarray(inputs["input_lengths"]), jnp.asarray(inputs["target_lengths"])
    targets = jnp.asarray(inputs["targets"])

    def losses(logits: jax.Array, zero_infinity: bool = True) -> jax.Array:
        return ctc_loss(logits, lengths, targets, target_lengths, blank=blank, zero_infinity=zero_infinity)

    def total(logits: jax.Array) -> jax.Array:
        return reduce_ctc(losses(logits), target_lengths)

    logits, of_hidden = jax.vjp(lambda x: CtcHead(vocab).apply({"params": params}, x), hidden)
    loss, grad = jax.value_and_grad(total)(logits)
    none = losses(logits)
    return {
        "logits": logits,
        "log_probs": jax.nn.log_softmax(logits),
        "argmax": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        "loss_none": losses(logits, zero_infinity=False),
        "loss_none_zero_inf": none,
        "loss_sum_zero_inf": reduce_ctc(none, target_lengths, "sum"),
        "loss_mean_zero_inf": reduce_ctc(none, target_lengths, "mean"),
        "loss_sum_over_batch": loss,
        "grad_logits": grad,
        "grad_encoder_out": of_hidden(grad)[0],
    }


def ctc_train_step(case: Case) -> Outputs:
    config, inputs = encoder_config(case.config), case.inputs
    encoder_table = encoder_weights.weight_table(config).prefixed(path="encoder/")
    head_table = ctc_head_weights.weight_table(config.hidden_size, case.config["vocab"]).prefixed(path="head/")
    table: Table = encoder_table + head_table
    params = import_params(table, case.weights)
    lengths, target_lengths = jnp.asarray(inputs["lengths"]), jnp.asarray(inputs["target_lengths"])
    targets, blank = jnp.asarray(inputs["targets"]), case.config["blank"]
    input_lengths = filter_bank.encoder_length(lengths)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, _ = AudioEncoder(config).apply({"params": params["encoder"]}, inputs["feats"], lengths)
        logits = CtcHead(case.config["vocab"]).apply({"params": params["head"]}, hidden)
        losses = ctc_loss(logits, input_lengths, targets, target_lengths, blank=blank)
        return reduce_ctc(losses, target_lengths), (hidden, logits)

    (loss, (hidden, logits)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    outputs = {
        "encoder_out": hidden,
        "input_lengths": input_lengths,
        "log_probs": jax.nn.log_softmax(logits),
        "loss": loss,
    }
    return outputs | export_params(table, grads, prefix="grad/")


MODULES = {
    "fbank": fbank,
    "fbank_stream": fbank_stream,
    "resample": resample,
    "cmvn": cmvn,
    "cmvn_constants": cmvn_constants,
    "audio_lengths": audio_lengths,
    "audio_masks": audio_masks,
    "audio_encoder": audio_encoder,
    "audio_encoder_stream": audio_encoder_stream,
    "audio_adapter": audio_adapter,
    "audio_adapter_stream": audio_adapter_stream,
    "audio_tower": audio_tower,
    "audio_tower_serving": audio_tower_serving,
    "audio_pipeline": audio_pipeline,
    "ctc": ctc,
    "ctc_train_step": ctc_train_step,
}
