"""Configurations of whole published checkpoints: the fields of `config.json` and what tensor shapes tell, both ways.

The released `config.json` holds the language model's fields and names of folders where the towers came from; what
these folders would say is read from the shapes of the tensors, which are all there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.audio import tower_weights
from vita_jax.models.connectors.projectors import DEFAULT_PROJECTOR, ProjectorConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.state_head import StateHeadConfig, two_class_head
from vita_jax.models.vision import internvit_weights
from vita_jax.models.vita import VitaConfig
from vita_jax.models.vita_weights import VISION_PREFIX

EMBEDDING = "model.embed_tokens.weight"
STATE_HEAD = "predictor_head.weight"

Shapes = Mapping[str, tuple[int, ...]]


def config_from_hf(
    values: Mapping[str, Any],
    shapes: Shapes,
    *,
    vision: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> VitaConfig:
    """The configuration of a VITA checkpoint.

    The number of vocabulary rows is that of the tensors: tools cut or pad it without a change to the config.

    Args:
      values: content of `config.json`; towers may be described under `vision_config` as in a public InternViT.
      shapes: torch name -> shape of all tensors.
      vision: content of the tower's own `config.json`, where it is at hand.
      train: content of the speech encoder's `train.yaml`, where it is at hand.

    Raises:
      UserError: a tensor that tells a size is missing, or parts do not fit each other.
      UnsupportedOption: see `decoder_weights.config_from_hf`.
    """
    if EMBEDDING not in shapes:
        raise UserError(f"the checkpoint has no tensor {EMBEDDING}; it is not that of a whole VITA model")
    language = decoder_weights.config_from_hf({**values, "vocab_size": shapes[EMBEDDING][0]})
    towers = without_prefix(shapes, VISION_PREFIX)
    vision = values.get("vision_config") or vision
    tower = internvit_weights.config_from_hf(vision) if vision else internvit_weights.config_from_shapes(towers)
    kind = values.get("mm_projector_type") or DEFAULT_PROJECTOR
    audio = without_prefix(shapes, tower_weights.VITA_PREFIX)
    state_head = None
    if STATE_HEAD in shapes:
        classes, width = shapes[STATE_HEAD]
        state_head = two_class_head(width) if classes == 3 else StateHeadConfig(width, classes)
    return VitaConfig(
        vision=tower,
        projector=ProjectorConfig(kind, tower.output_size, language.hidden_size),
        language=language,
        audio=tower_weights.config_of_tensors(audio, train) if audio else None,
        state_head=state_head,
    )


def config_to_hf(config: VitaConfig) -> dict[str, Any]:
    """The fields of a `config.json` that `config_from_hf` and the original read.

    Raises:
      UnsupportedOption: the original has no such language model.
    """
    language = decoder_weights.config_to_hf(config.language)
    sparse = config.language.num_experts > 0
    if not sparse and not config.language.qkv_bias:
        raise UnsupportedOption("the original VITA has no LLaMA (qkv_bias=False, dense); export it in parts")
    fields = {
        **language,
        "architectures": ["VITAMixtralForCausalLM" if sparse else "VITAQwen2ForCausalLM"],
        "model_type": "vita-mixtral" if sparse else "vita-Qwen2",
        "mm_vision_tower": "InternViT-300M-448px",
        "vision_config": internvit_weights.config_to_hf(config.vision),
        "mm_projector_type": config.projector.projector_type,
        "mm_hidden_size": config.vision.output_size,
        "use_mm_proj": True,
        "image_aspect_ratio": "square",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": config.language.max_positions,
    }
    if config.audio is not None:
        fields |= {
            "mm_audio_encoder": "audio_encoder",
            "freeze_audio_encoder": True,
            "freeze_audio_encoder_adapter": True,
            "audio_prompt_finetune": config.audio.num_prompt_tokens > 0,
            "audio_prompt_num": config.audio.num_prompt_tokens or None,
        }
    return fields


def without_prefix(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The entries behind a prefix."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def around(base: VitaConfig, **parts: Any) -> VitaConfig:
    """A whole model around parts of it: the base with these parts, its other widths fitted to them.

    A checkpoint of one part is stored as the part of a whole model that it is, for a stage to start from.

    Args:
      base: where everything else is taken from.
      parts: fields of `VitaConfig`.
    """
    config = {name: parts.get(name, getattr(base, name)) for name in ("vision", "language", "audio", "projector")}
    if "language" not in parts:
        widths = [part.output_size for part in (parts.get("projector"),) if part is not None]
        widths += [parts["audio"].adapter.output_size] if "audio" in parts else []
        for width in widths:
            config["language"] = replace(config["language"], hidden_size=width)
    width = config["language"].hidden_size
    config["projector"] = replace(config["projector"], input_size=config["vision"].output_size, output_size=width)
    config["audio"] = replace(config["audio"], adapter=replace(config["audio"].adapter, output_size=width))
    return replace(base, **{**parts, **config})
