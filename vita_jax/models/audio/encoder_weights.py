"""Names and layout of published weights of the speech encoder."""

from __future__ import annotations

from vita_jax.conversion import tables
from vita_jax.models.audio.encoder import AudioEncoderConfig


def weight_table(config: AudioEncoderConfig) -> tables.Table:
    """Names as in the encoder's own `final.pt`; in a VITA checkpoint they follow `model.audio_encoder.encoder.`."""
    d, m = config.hidden_size, config.input_dim
    conv, transformer = "enc.0.core.conv", "enc.1"
    rules: list[tables.Rule] = []
    if config.cmvn != "none":
        rules += [tables.copy(f"global_cmvn.{name}", f"cmvn/{name}", (m,)) for name in ("mean", "istd")]
    rules += [
        *tables.conv2d(f"{conv}.0", "subsampling/conv1", (d, 1, 3, 3)),
        *tables.conv2d(f"{conv}.2", "subsampling/conv2", (d, d, 3, 3)),
        # Its input is flattened channel-major; ours keeps frequencies before channels.
        tables.Rule(
            "enc.0.core.out.0.weight",
            "subsampling/out/kernel",
            (d, d * config.subsampled_dim),
            split=(d, d, config.subsampled_dim),
            permute=(2, 1, 0),
        ),
        tables.copy("enc.0.core.out.0.bias", "subsampling/out/bias", (d,)),
        *tables.linear(f"{transformer}.embed.0", "transformer/embed_linear", (d,), (d,)),
        *tables.norm(f"{transformer}.embed.1", "transformer/embed_norm", d),
        *_layer_rules(config, f"{transformer}.encoders.{{i}}", "transformer/layers"),
    ]
    if config.normalize_before:
        rules += tables.norm(f"{transformer}.after_norm", "transformer/norm", d)
    return tables.Table(tuple(rules))


def _layer_rules(config: AudioEncoderConfig, torch: str, path: str) -> list[tables.Rule]:
    d, layers = config.hidden_size, config.num_layers
    heads = (config.num_heads, config.head_dim)
    attention, ours = f"{torch}.self_attn", f"{path}/attention"
    rules: list[tables.Rule] = []
    for name in "qkv":
        rules += tables.linear(f"{attention}.linear_{name}", f"{ours}/{name}_proj", (d,), heads, layers=layers)
    rules += tables.linear(f"{attention}.linear_out", f"{ours}/o_proj", heads, (d,), layers=layers)
    if config.positions != "abs-enc":
        rules += tables.linear(f"{attention}.linear_pos", f"{ours}/pos_proj", (d,), heads, bias=False, layers=layers)
        for name in ("pos_bias_u", "pos_bias_v"):
            rules.append(tables.copy(f"{attention}.{name}", f"{ours}/{name}", heads, layers=layers))
    for name in ("norm1", "norm2"):
        rules += tables.norm(f"{torch}.{name}", f"{path}/{name}", d, layers=layers)
    if config.concat_after:
        rules += tables.linear(f"{torch}.concat_linear", f"{path}/concat", (2 * d,), (d,), layers=layers)
    return rules + _feed_forward_rules(config, f"{torch}.feed_forward", f"{path}/mlp")


def _feed_forward_rules(config: AudioEncoderConfig, torch: str, path: str) -> list[tables.Rule]:
    d, wide = config.hidden_size, config.intermediate_size
    kernel, layers = config.feed_forward_kernel, config.num_layers
    match config.feed_forward:
        case "conv1d":
            first = tables.conv1d(f"{torch}.w_1", f"{path}/fc1", (wide, d, kernel), layers=layers)
            second = tables.conv1d(f"{torch}.w_2", f"{path}/fc2", (d, wide, kernel), layers=layers)
        case "conv1d-linear":
            pointwise, shape = f"{torch}.w_1.1", (wide, d)
            first = (
                tables.Rule(
                    f"{torch}.w_1.0.weight",
                    f"{path}/depthwise_kernel",
                    (d, 1, kernel),
                    split=(d, kernel),
                    permute=(1, 0),
                    layers=layers,
                ),
                tables.copy(f"{torch}.w_1.0.bias", f"{path}/depthwise_bias", (d,), layers=layers),
                tables.Rule(
                    f"{pointwise}.weight", f"{path}/fc1/kernel", (*shape, 1), split=shape, permute=(1, 0), layers=layers
                ),
                tables.copy(f"{pointwise}.bias", f"{path}/fc1/bias", (wide,), layers=layers),
            )
            second = tables.linear(f"{torch}.w_2", f"{path}/fc2", (wide,), (d,), layers=layers)
        case _:
            first = tables.linear(f"{torch}.w_1", f"{path}/fc1", (d,), (wide,), layers=layers)
            second = tables.linear(f"{torch}.w_2", f"{path}/fc2", (wide,), (d,), layers=layers)
    return [*first, *second]
