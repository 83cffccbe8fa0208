"""Codec, its parts and its streaming decode against the golden cases of `speech_out`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.cases import Case
from vita_jax.conversion.tables import export_params, import_params
from vita_jax.inference.codec_stream import StreamOptions, split_at_quiet, stream_chunks, stream_segments
from vita_jax.models.codec import codec_weights
from vita_jax.models.codec.codec import Codec, consistency_loss
from vita_jax.models.codec.config import CodecConfig, config_from_published
from vita_jax.models.codec.encoder import Encoder
from vita_jax.models.codec.generator import Generator
from vita_jax.models.codec.global_encoder import GlobalTokenEncoder, apply_updates
from vita_jax.models.codec.quantizer import Quantizer
from vita_jax.nn.convolution import fold_weight_norm

Outputs = dict[str, Any]
# Fields of a whole codec that the cases of its parts leave out.
GENERATOR_FREE = {"upsample_rates": (2, 2), "upsample_kernel_sizes": (4, 4), "upsample_initial_channel": 16}
GENERATOR_FREE |= {"resblock": "1", "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}


def channels_first(x: Any) -> np.ndarray:
    """(b t c) -> (b c t)."""
    return np.moveaxis(np.asarray(x), -1, -2)


channels_last = channels_first  # the same swap, back


def _generator_config(case: Case) -> CodecConfig:
    values = dict(case.config)
    width = values.get("inject_dim", 8)
    values.setdefault("global_feature_conv", (width, width, width, 3, 1))
    values.setdefault("global_code_num", 1)
    return config_from_published(values)


def global_encoder(case: Case) -> Outputs:
    config = config_from_published(GENERATOR_FREE | case.config | {"global_code_num": 1})
    params = import_params(codec_weights.global_encoder_table(config), case.weights)
    model, x = GlobalTokenEncoder(config), channels_last(case.inputs["x"])
    trained, kept = model.apply({"params": params}, x, train=True, mutable=["updates"])
    after = apply_updates(params, kept["updates"])["fn_2"]
    return {
        "out_eval": model.apply({"params": params}, x),
        "out_train_mode": trained,
        "running_mean_after": after["running_mean"],
        "running_var_after": after["running_var"],
    }


def quantizer(case: Case) -> Outputs:
    width = case.inputs["global_features"].shape[1]
    latent = case.inputs["x"].shape[1]
    published = GENERATOR_FREE | {"global_feature_conv": (width, width, width, 3, 1), "latent_dim": latent}
    config = config_from_published(published | case.config)
    variables = {"params": import_params(codec_weights.quantizer_table(config), case.weights)}
    model = Quantizer(config)
    out = jax.jit(model.apply)(variables, channels_last(case.inputs["x"]), case.inputs["global_features"])
    embed_global = model.apply(variables, out.global_codes, method=Quantizer.embed_global)
    return {
        "codes": out.codes,
        "global_codes": out.global_codes[:, None],
        "quantized_st": channels_first(out.latent),
        "global_quantized_st": out.global_vector,
        "loss": out.loss,
        "embed": channels_first(model.apply(variables, out.codes, method=Quantizer.embed)),
        "embed_gst": embed_global[..., None],
    }


def generator(case: Case) -> Outputs:
    config = _generator_config(case)
    params = import_params(codec_weights.generator_table(config), case.weights)
    apply = jax.jit(partial(Generator(config).apply, mutable=["intermediates"]))
    wave, kept = apply({"params": params}, channels_last(case.inputs["x"]), case.inputs["global_features"])
    kept = kept["intermediates"]
    outputs = {name: channels_first(kept[f"after_{name}"][0]) for name in ("conv_pre", "conv_post")}
    outputs |= {f"ups{i}": channels_first(kept[f"after_ups_{i}"][0]) for i in range(config.num_stages)}
    return outputs | {"resblock0": channels_first(kept["blocks_0"][0][0]), "wav": wave[:, None]}


def weight_norm_fold(case: Case) -> Outputs:
    config = _generator_config(case)
    params = fold_weight_norm(import_params(codec_weights.generator_table(config), case.weights))
    folded = config_from_published(case.config | {"weight_norm": False, "global_code_num": 1})
    return export_params(codec_weights.generator_table(folded), params, prefix="folded/")


def _load(case: Case) -> tuple[Codec, Any]:
    config = config_from_published(case.config)
    return Codec(config), import_params(codec_weights.weight_table(config), case.weights)


def codec(case: Case) -> Outputs:
    model, params = _load(case)
    config, variables, i = model.config, {"params": params}, dict(case.inputs)
    i |= {name: i[name].reshape(len(i[name]), -1) for name in ("wav", "wav2")}
    encode = jax.jit(partial(Encoder(config).apply, mutable=["intermediates"]))
    (latent, vector), kept = encode({"params": params["encoder"]}, i["wav"])
    kept = kept["intermediates"]
    vector2 = Encoder(config).apply({"params": params["encoder"]}, i["wav2"], method=Encoder.global_vector)
    codes, global_codes = model.apply(variables, i["wav"], method=Codec.encode)
    decode = jax.jit(partial(model.apply, method=Codec.decode))
    outputs = {"enc_conv_pre": kept["after_conv_pre"][0], "enc_out": latent}
    outputs |= {f"enc_ups{n}": kept[f"after_ups_{n}"][0] for n in range(config.num_stages)}
    blocks = config.num_stages * len(config.resblock_kernel_sizes)
    outputs |= {f"enc_norm{n}": kept[f"after_normalize_{n}"][0] for n in range(blocks)}
    return {name: channels_first(x) for name, x in outputs.items()} | {
        "global_features": vector,
        "global_features2": vector2,
        "consistency_loss": consistency_loss(vector, vector2),
        "codes": codes,
        "global_codes": global_codes[:, None],
        "recon_wav": decode(variables, codes, global_codes)[:, None],
        "decode_given_wav": decode(variables, i["codes"], i["global_codes"][:, 0])[:, None],
    }


def quiet_split(case: Case) -> Outputs:
    outputs: Outputs = {}
    held = np.zeros((0,), np.float32)
    for n in range(len(case.inputs)):
        wave = case.inputs[f"chunk{n}"].reshape(-1)
        held, segment = split_at_quiet(held, wave, case.config["N"], case.config["threshold"])
        outputs[f"emitted_is_none{n}"] = np.int32(segment is None)
        outputs[f"emitted{n}"] = (held[:0] if segment is None else segment)[None, None]
        outputs[f"buffer{n}"] = held[None, None]
    return outputs


def codec_stream(case: Case) -> Outputs:
    model, params = _load(case)
    voice = case.inputs["global_tokens"].reshape(1, -1)
    apply = jax.jit(partial(model.apply, method=Codec.decode))
    hop, lengths = model.config.hop, []

    def decode(window: np.ndarray) -> np.ndarray:
        lengths.append(len(window))
        return np.asarray(apply({"params": params}, window[None, :, None], voice)[0])

    c, tokens = case.config, case.inputs["tokens"]
    full = decode(tokens)
    lengths.clear()
    context = c["codec_padding_size"]
    chunks = list(stream_chunks(tokens.tolist(), decode, hop, c["codec_chunk_size"], context))
    outputs: Outputs = {"decode_call_lengths": np.asarray(lengths, np.int32), "full_wav": full[None, None]}
    outputs |= {f"trimmed_chunk{n}": wave[None, None] for n, (wave, last) in enumerate(chunks) if not last}
    options = StreamOptions(c["codec_chunk_size"], context, c["N"], c["seg_threshold"])
    segments = list(stream_segments(tokens.tolist(), decode, hop, options, context))
    outputs["segment_lengths"] = np.asarray([len(segment) for segment in segments], np.int32)
    return outputs | {"stream_wav": jnp.concatenate(segments)[None, None]}


MODULES = {
    "codec_global_encoder": global_encoder,
    "codec_quantizer": quantizer,
    "codec_generator": generator,
    "codec": codec,
    "weight_norm_fold": weight_norm_fold,
    "quiet_split": quiet_split,
    "codec_stream": codec_stream,
}
