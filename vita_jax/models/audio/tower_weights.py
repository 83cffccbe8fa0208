"""Names of published audio towers: those of the checkpoints, and those of the serving code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vita_jax.conversion.tables import Rule, Table, copy
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.audio import encoder_weights
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors import audio_adapters_weights
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig

# Where a VITA checkpoint keeps the tower.
VITA_PREFIX = "model.audio_encoder."

# Checkpoint -> serving code (`web_demo/vllm_tools/vllm_file/whale.py`); the first that fits a name's start is applied.
SERVING_NAMES = {
    "encoder.enc.0.core.conv.": "audio_tower.subsampling.conv_in.",
    "encoder.enc.0.core.out.0.": "audio_tower.subsampling.out.",
    "encoder.enc.1.embed.": "audio_tower.embeddings.embedding.",
    "encoder.enc.1.encoders.": "audio_tower.encoder.layers.",
    "encoder.enc.1.after_norm.": "audio_tower.encoder.layer_norm.",
    "adpter.bn2.": "audio_projector.norm.",
    "adpter.conv1d2.": "audio_projector.conv1d.",
    "adpter.project.": "audio_projector.linear.",
}


def config_from_train(values: Mapping[str, Any]) -> AudioTowerConfig:
    """The configuration from the content of an encoder's `train.yaml`; the adapter is VITA-1.5's (right padding).

    Raises:
      UserError: a field is missing.
      UnsupportedOption: another stack than "subsampling-transformer" with linear feed-forwards.
    """
    try:
        conf, model = values["encoder_conf"], values["model_conf"]
        stack = conf["overview_conf"]["encoder-layer-config"]
        part = {name.removeprefix("transformer-"): x for name, x in conf["para_conf"]["transformer"].items()}
        kinds = (stack, part["input-layer"], part["positionwise-layer-type"])
        if kinds != ("subsampling-transformer", "linear", "linear"):
            raise UnsupportedOption(
                f"audio encoder {kinds}: only 'subsampling-transformer' with 'linear' layers is read from a train.yaml"
            )
        encoder = AudioEncoderConfig(
            input_dim=values["input_dim"],
            hidden_size=part["attention-dim"],
            num_layers=part["num-blocks"],
            num_heads=part["attention-heads"],
            intermediate_size=part["linear-units"],
            chunk_size=part["chunk_size"],
            left_chunks=part["left_chunks"],
            dynamic_chunks=part["dynamic-chunks"],
            positions=part["pos-enc-class"],
            normalize_before=part["normalize-before"],
            concat_after=part["concat-after"],
            dropout=part["dropout-rate"],
            positional_dropout=part["positional-dropout-rate"],
            attention_dropout=part["attention-dropout-rate"],
        )
        adapter = AudioAdapterConfig(
            kind=model["adpter_type"],
            input_size=model["enc_out_dim"],
            output_size=model["llm_embed_dim"],
            kernel_size=model["kernel_size"],
            activation=model["activation_func"],
            norm=model["norm"],
        )
    except KeyError as error:
        raise UserError(f"the encoder's train.yaml lacks the field {error}") from None
    return AudioTowerConfig(encoder, adapter)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> AudioTowerConfig:
    """The configuration that shapes imply, with full context as in the serving code; a `train.yaml` knows the chunks.

    Args:
      shapes: torch name, relative to `VITA_PREFIX`, -> shape.

    Raises:
      UserError: a tensor that tells a size is missing.
      UnsupportedOption: an adapter whose kind shapes do not tell, or absolute positions.
    """
    layer = "encoder.enc.1.encoders.0"
    try:
        hidden = shapes["encoder.enc.0.core.conv.0.weight"][0]
        intermediate = shapes[f"{layer}.feed_forward.w_1.weight"][0]
        if f"{layer}.self_attn.pos_bias_u" not in shapes:
            raise UnsupportedOption("the speech encoder has no relative positions; give the folder with its train.yaml")
        encoder = AudioEncoderConfig(
            input_dim=shapes.get("encoder.global_cmvn.mean", (80,))[0],
            hidden_size=hidden,
            num_layers=len({name.split(".")[4] for name in shapes if name.startswith("encoder.enc.1.encoders.")}),
            num_heads=shapes[f"{layer}.self_attn.pos_bias_u"][0],
            intermediate_size=intermediate,
            normalize_before="encoder.enc.1.after_norm.weight" in shapes,
            concat_after=f"{layer}.concat_linear.weight" in shapes,
            cmvn=_cmvn(shapes),
        )
        if "adpter.adpter.weight" in shapes:
            output, inputs = shapes["adpter.adpter.weight"]
            return AudioTowerConfig(encoder, AudioAdapterConfig("linear", inputs, output))
        if "adpter.conv1d1.weight" in shapes:
            raise UnsupportedOption("the audio adapter has two convolutions; give the folder with its train.yaml")
        _, inputs, kernel = shapes["adpter.conv1d2.weight"]
        adapter = AudioAdapterConfig(
            input_size=inputs,
            output_size=shapes["adpter.project.weight"][0],
            kernel_size=kernel,
            norm="batch" if "adpter.bn2.running_mean" in shapes else "layer",
        )
    except KeyError as error:
        raise UserError(f"the weights of the audio tower lack {error}") from None
    return AudioTowerConfig(encoder, adapter)


def _cmvn(shapes: Mapping[str, tuple[int, ...]]) -> str:
    bins = shapes.get("encoder.global_cmvn.mean")
    return "none" if bins is None else "released" if bins == (80,) else "identity"


def config_of_tensors(shapes: Mapping[str, tuple[int, ...]], train: Mapping[str, Any] | None) -> AudioTowerConfig:
    """The configuration from `train.yaml` where there is one, else from shapes; prompts are told by shapes alone.

    Raises:
      UserError, UnsupportedOption: see `config_from_train`, `config_from_shapes`.
    """
    config = config_from_shapes(shapes) if train is None else config_from_train(train)
    if train is not None:
        two_convs = config.adapter.kind == "subsampling" and "adpter.conv1d1.weight" in shapes
        config = replace(
            config,
            encoder=replace(config.encoder, cmvn=_cmvn(shapes)),
            adapter=replace(config.adapter, two_convs=two_convs),
        )
    prompts = shapes.get("prompt_embeddings.weight", (0,))[0]
    return replace(config, num_prompt_tokens=prompts)


def config_to_train(config: AudioTowerConfig) -> dict[str, Any]:
    """The content of a `train.yaml` that `config_from_train` reads.

    Raises:
      UnsupportedOption: an encoder that no `train.yaml` describes.
    """
    encoder, adapter = config.encoder, config.adapter
    if encoder.feed_forward != "linear":
        raise UnsupportedOption(f"audio encoder: a train.yaml cannot say feed_forward {encoder.feed_forward!r}")
    transformer = {
        "input-dim": encoder.hidden_size,
        "output-dim": encoder.hidden_size,
        "attention-dim": encoder.hidden_size,
        "attention-heads": encoder.num_heads,
        "linear-units": encoder.intermediate_size,
        "num-blocks": encoder.num_layers,
        "dropout-rate": encoder.dropout,
        "attention-dropout-rate": encoder.attention_dropout,
        "positional-dropout-rate": encoder.positional_dropout,
        "input-layer": "linear",
        "pos-enc-class": encoder.positions,
        "normalize-before": encoder.normalize_before,
        "concat-after": encoder.concat_after,
        "positionwise-layer-type": "linear",
        "chunk_size": encoder.chunk_size,
        "left_chunks": encoder.left_chunks,
        "dynamic-chunks": encoder.dynamic_chunks,
    }
    subsampling = {
        "subsampling-rate": 4,
        "subsampling-input-dim": encoder.input_dim,
        "subsampling-output-dim": encoder.hidden_size,
        "subsampling-dropout-rate": encoder.dropout,
    }
    return {
        "input_dim": encoder.input_dim,
        "encoder_conf": {
            "overview_conf": {
                "encoder-input-dim": encoder.input_dim,
                "encoder-layer-config": "subsampling-transformer",
                "encoder-output-dim": encoder.hidden_size,
            },
            "para_conf": {
                "subsampling": subsampling,
                "transformer": {f"transformer-{name}": value for name, value in transformer.items()},
            },
        },
        "model_conf": {
            "enc_out_dim": adapter.input_size,
            "llm_embed_dim": adapter.output_size,
            "kernel_size": adapter.kernel_size,
            "adpter_type": adapter.kind,
            "activation_func": adapter.activation,
            "norm": adapter.norm,
        },
    }


def weight_table(config: AudioTowerConfig) -> Table:
    """Names relative to `VITA_PREFIX`."""
    table = encoder_weights.weight_table(config.encoder).prefixed(torch="encoder.", path="encoder/")
    table += audio_adapters_weights.weight_table(config.adapter).prefixed(torch="adpter.", path="adapter/")
    if config.num_prompt_tokens:
        shape = (config.num_prompt_tokens, config.adapter.output_size)
        table += Table((copy("prompt_embeddings.weight", "prompt", shape),))
    return table


def serving_weight_table(config: AudioTowerConfig) -> Table:
    """Names of the serving code, which normalises features while extracting them: the encoder's cmvn must be "none".

    Raises:
      UserError: a tower with parts that the serving code does not have.
    """
    return Table(tuple(_serving_rule(rule) for rule in weight_table(config).rules))


def _serving_rule(rule: Rule) -> Rule:
    for theirs, serving in SERVING_NAMES.items():
        if rule.torch.startswith(theirs):
            name = rule.torch.replace(theirs, serving, 1).replace(".self_attn.", ".attn.")
            return replace(rule, torch=name)
    raise UserError(
        f"the serving code has no name for {rule.torch}; it knows encoders with cmvn 'none' and one-convolution "
        "subsampling adapters without prompts"
    )
