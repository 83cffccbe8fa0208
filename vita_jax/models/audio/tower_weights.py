"""Names of published audio towers: those of the checkpoints, and those of the serving code."""

from __future__ import annotations

from dataclasses import replace

from vita_jax.conversion.tables import Rule, Table, copy
from vita_jax.errors import UserError
from vita_jax.models.audio import encoder_weights
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors import audio_adapters_weights

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
