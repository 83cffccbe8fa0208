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
