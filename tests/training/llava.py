"""LLaVA in a few thousand parameters and its two stages, on the synthetic batches of `tiny`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.training import records, tiny
from vita_jax.data.images import ImageConfig
from vita_jax.data.llava_prompts import LlavaPromptOptions
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.llava import LlavaConfig
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.training.experiment import ExperimentConfig, TokenizerConfig


def llava_config(vocab_size: int = tiny.VOCAB, projector: str = "mlp2x_gelu") -> LlavaConfig:
    """Two layers each; 4 visual tokens per 8-pixel picture, as many as `tiny.make_batch` has places for."""
    vision = ViTConfig(8, 2, 2, 16, tiny.TILE, 4, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    language = DecoderConfig(
        vocab_size, 16, 2, 4, 4, 4, 24, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, max_positions=512
    )
    return LlavaConfig(vision, ProjectorConfig(projector, 8, 16), language)


def resampled_config(kind: str = "perceiver", latents: int = 4) -> LlavaConfig:
    """`llava_config` with one matrix behind a resampler, which gives as many tokens as there are places."""
    resampler = ResamplerConfig(8, num_layers=2, num_heads=2, head_dim=3, num_latents=latents, kind=kind)
    return replace(llava_config(projector="linear"), resampler=resampler)


def llava_experiment(run_dir: Path | str, **fields: Any) -> ExperimentConfig:
    """Stage `alignment` of the projector alone, then `tuning` of projector and language model."""
    model = fields.pop("model", llava_config())
    defaults: dict[str, Any] = {
        "model": model,
        "image": ImageConfig.clip(model.vision.image_size, aspect="pad"),
        "prompt": LlavaPromptOptions(),
        "template": "vicuna_v1",
        "stages": (
            tiny.stage("alignment", trainable=("^projector/",), template="plain"),
            tiny.stage("tuning", trainable=("^projector/", "^language/"), start_from="alignment"),
        ),
    }
    return tiny.experiment(run_dir, **{**defaults, **fields})


def llava_records(run_dir: Path | str, **fields: Any) -> ExperimentConfig:
    """The two stages on the files that `records.prepare_records` makes; its tokenizer needs the special token </s>."""
    pictures, text = SourceConfig("pictures"), SourceConfig("text", ratio=0.5)
    rows = {"steps": 3, "row_length": 96, "row_tiles": 4}
    stages = (
        tiny.stage(
            "alignment",
            trainable=("^projector/",),
            template="plain",
            sources=(SourceConfig("pictures", split_rounds=True),),
            **rows,
        ),
        tiny.stage(
            "tuning",
            trainable=("^projector/", "^language/"),
            sources=(pictures, text),
            start_from="alignment",
            **rows,
        ),
    )
    defaults = {
        "model": llava_config(records.VOCAB),
        "tokenizer": TokenizerConfig(records.VOCAB),
        "system_texts": SystemTexts("", "", "See."),
        "stages": stages,
    }
    return llava_experiment(run_dir, **{**defaults, **fields})
