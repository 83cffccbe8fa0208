"""Names of the published codec: three state dicts, `encoder`, `generator` and `quantizer`, with or without weight norm.

Torch keeps a convolution's weight as (out, in, taps) and a transposed one's as (in, out, taps); here both are
(taps in out).
"""

from __future__ import annotations

from vita_jax.conversion.tables import Rule, Table, copy, linear
from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.encoder import FIRST_KERNEL, LAST_KERNEL
from vita_jax.models.codec.generator import END_KERNEL
from vita_jax.models.codec.residual import used_dilations

# How many batches the batch norm has seen; torch fills it in where a file lacks it.
IGNORED = (r".*\.num_batches_tracked",)


def conv1d(
    torch: str,
    path: str,
    inputs: int,
    outputs: int,
    taps: int,
    *,
    weight_norm: bool,
    bias: bool = True,
    transposed: bool = False,
) -> tuple[Rule, ...]:
    """One convolution; weight norm's length per output channel, or per input channel of a transposed one."""
    shape, permute = ((inputs, outputs, taps), (2, 0, 1)) if transposed else ((outputs, inputs, taps), (2, 1, 0))
    if weight_norm:
        g_shape = (1, inputs, 1) if transposed else (1, 1, outputs)
        rules: tuple[Rule, ...] = (
            copy(f"{torch}.weight_g", f"{path}/kernel_g", g_shape, (shape[0], 1, 1)),
            Rule(f"{torch}.weight_v", f"{path}/kernel_v", shape, permute=permute),
        )
    else:
        rules = (Rule(f"{torch}.weight", f"{path}/kernel", shape, permute=permute),)
    return (*rules, copy(f"{torch}.bias", f"{path}/bias", (outputs,))) if bias else rules


def _resblocks(config: CodecConfig, stage: int, channels: int, blocks: list[tuple[int, tuple[int, ...]]]) -> list[Rule]:
    rules: list[Rule] = []
    names = ("convs1", "convs2") if config.resblock == "1" else ("convs",)
    for j, (taps, dilations) in enumerate(blocks):
        index = stage * len(blocks) + j
        for name in names:
            for i in range(len(used_dilations(config, dilations))):
                torch, path = f"resblocks.{index}.{name}.{i}", f"resblocks_{index}/{name}_{i}"
                rules += conv1d(torch, path, channels, channels, taps, weight_norm=config.weight_norm)
    return rules


def _blocks(config: CodecConfig) -> list[tuple[int, tuple[int, ...]]]:
    return list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))


def generator_table(config: CodecConfig) -> Table:
    """The generator; paths are relative to its own parameters."""
    c, wn = config, config.weight_norm
    channels = c.upsample_initial_channel
    rules = [*conv1d("conv_pre", "conv_pre", c.latent_dim, channels, END_KERNEL, weight_norm=wn)]
    for i, taps in enumerate(c.upsample_kernel_sizes):
        before, channels = channels, c.stage_channels(i)
        rules += conv1d(f"ups.{i}", f"ups_{i}", before, channels, taps, weight_norm=wn, transposed=True)
        rules += _resblocks(c, i, channels, _blocks(c))
    rules += conv1d("conv_post", "conv_post", channels, 1, END_KERNEL, weight_norm=wn)
    return Table(tuple(rules))


def global_encoder_table(config: CodecConfig) -> Table:
    """The utterance branch; paths are relative to its own parameters."""
    inputs, hidden, width, taps, _ = config.global_feature_conv
    rules: list[Rule] = []
    for index, (before, after) in ((0, (inputs, hidden)), (2, (hidden, hidden)), (4, (hidden, width))):
        rules += conv1d(f"conv.{index}", f"conv_{index}", before, after, taps, weight_norm=False, bias=False)
    rules += linear("fn.0", "fn_0", (width,), (width,))
    for theirs, ours in (("weight", "scale"), ("bias", "bias")):
        rules.append(copy(f"fn.2.{theirs}", f"fn_2/{ours}", (width,)))
    rules += [copy(f"fn.2.{name}", f"fn_2/{name}", (width,)) for name in ("running_mean", "running_var")]
    return Table(tuple(rules), ignore=IGNORED)


def encoder_table(config: CodecConfig) -> Table:
    """The encoder; paths are relative to its own parameters."""
    c, wn = config, config.weight_norm
    channels = c.base_channels
    rules = [*conv1d("conv_pre", "conv_pre", 1, channels, FIRST_KERNEL, weight_norm=wn)]
    blocks = _blocks(c)[::-1]
    for i, taps in enumerate(c.upsample_kernel_sizes[::-1]):
        before, channels = channels, 2 * channels
        rules += conv1d(f"ups.{i}", f"ups_{i}", before, channels, taps, weight_norm=wn)
        rules += _resblocks(c, i, channels, blocks)
        for n in range(i * len(blocks), (i + 1) * len(blocks)):
            rules.append(copy(f"normalize.{n}.weight", f"normalize_{n}/scale", (channels,)))
            rules.append(copy(f"normalize.{n}.bias", f"normalize_{n}/bias", (channels,)))
    rules += conv1d("conv_post", "conv_post", channels, c.latent_dim, LAST_KERNEL, weight_norm=False)
    rules += linear("linear.0", "linear", (c.global_dim,), (c.global_dim,))
    branch = global_encoder_table(c).prefixed(torch="GlobalTokenEncoder.", path="global_encoder/")
    return Table(tuple(rules)) + branch


def quantizer_table(config: CodecConfig) -> Table:
    """The quantiser; paths are relative to its own parameters. The first layer's name has no number."""
    c = config
    width, global_width = c.latent_dim // c.num_code_groups, c.global_dim // c.num_global_codes
    rules = []
    for layer in range(c.num_residual_layers):
        name = f"quantizer_modules{layer + 1 if layer else ''}"
        for group in range(c.num_code_groups):
            torch, path = f"{name}.{group}.embedding.weight", f"codebook_{layer}_{group}"
            rules.append(copy(torch, path, (c.num_codes, width)))
    for j in range(c.num_global_codes):
        torch = f"quantizer_modules_globaltokens.{j}.embedding.weight"
        rules.append(copy(torch, f"global_codebook_{j}", (c.num_codes, global_width)))
    return Table(tuple(rules))


def weight_table(config: CodecConfig) -> Table:
    """The whole codec, its three state dicts under `encoder.`, `generator.` and `quantizer.`."""
    return (
        encoder_table(config).prefixed(torch="encoder.", path="encoder/")
        + generator_table(config).prefixed(torch="generator.", path="generator/")
        + quantizer_table(config).prefixed(torch="quantizer.", path="quantizer/")
    )
