"""LLaVA: a CLIP tower, a projector and a LLaMA, joined by the same gather as VITA (arXiv 2304.08485; v1.5: 2310.03744;
`llava/model/llava_arch.py`).

The data side expands every `<image>` to its positions and gives them indices into the row's feature table, exactly as
for VITA (`vita_jax.data.splice`), so inputs, splicing, packing and generation are those of `vita_jax.models.vita`. What
differs is what stands in the table: patch tokens of the hidden state before CLIP's last layer.

A resampler in front of the projector, which the public models lack, gives every picture a fixed number of tokens
(`vita_jax.models.connectors.perceiver_resampler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.connectors.plain_resamplers import make_resampler
from vita_jax.models.connectors.projectors import Projector, ProjectorConfig
from vita_jax.models.language.decoder import Decoder, DecoderConfig
from vita_jax.models.language.llama import llama_7b, llama_13b, vicuna_7b_v1_5, vicuna_13b_v1_5
from vita_jax.models.vision.clip import (
    CLIP_MEAN,
    CLIP_STD,
    ClipVision,
    clip_vit_large_224px,
    clip_vit_large_336px,
    select_feature,
)
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vita import VitaInputs, features_of_tiles, normalise_tiles, splice


@dataclass(frozen=True)
class LlavaConfig:
    """The configs of the parts, and which features of the tower are used.

    Attributes:
      vision, projector, language: the parts; their widths must fit each other.
      select_layer: which hidden state of the tower; -2 is the one before the last layer.
      select_feature: "patch" leaves the class token out, "cls_patch" keeps it.
      image_mean, image_std: per channel, of pixel values in 0..1; applied to uint8 images.
      resampler: what makes `num_latents` tokens of the tower's before the projector; None: the projector reads the
        tower's, as in the public models.
    """

    vision: ViTConfig
    projector: ProjectorConfig
    language: DecoderConfig
    select_layer: int = -2
    select_feature: str = "patch"
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    resampler: ResamplerConfig | None = None

    # What only VITA has; whoever asks for it finds none.
    audio: ClassVar[None] = None
    state_head: ClassVar[None] = None
    codec: ClassVar[None] = None
    speech: ClassVar[None] = None
    ctc_vocab_size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.projector.kind not in ("linear", "mlp", "identity"):
            raise UnsupportedOption(
                f"projector.projector_type {self.projector.projector_type!r} is none of LLaVA's; use linear, "
                "mlp<n>x_gelu or identity"
            )
        widths = [
            ("projector.input_size", self.projector.input_size, self.vision.hidden_size),
            ("projector.output_size", self.projector.output_size, self.language.hidden_size),
        ]
        if self.projector.kind == "identity":
            widths.append(("projector.output_size", self.projector.output_size, self.projector.input_size))
        if self.resampler is not None:
            widths.append(("resampler.hidden_size", self.resampler.hidden_size, self.vision.hidden_size))
            self._check_times(self.resampler)
        for name, got, want in widths:
            if got != want:
                raise UserError(f"{name} is {got}, but the part it joins has width {want}; set it to {want}")
        layers = self.vision.num_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise UserError(f"select_layer {self.select_layer}: the tower has {layers + 1} hidden states; -2 is usual")
        if self.select_feature not in ("patch", "cls_patch"):
            raise UserError(f"select_feature {self.select_feature!r} is unknown; use 'patch' or 'cls_patch'")

    @staticmethod
    def _check_times(resampler: ResamplerConfig) -> None:
        for name in ("max_frames", "max_media"):
            if getattr(resampler, name):
                raise UserError(
                    f"resampler.{name} is {getattr(resampler, name)}, but a picture of LLaVA is one frame and has no "
                    "number among others; use 0"
                )

    @property
    def tower_tokens(self) -> int:
        """Tokens of one image that the tower gives."""
        return self.vision.num_patches + (self.select_feature == "cls_patch")

    @property
    def tokens_per_tile(self) -> int:
        """Positions that one image takes in the language model."""
        return self.tower_tokens if self.resampler is None else self.resampler.num_latents


def _llava(vision: ViTConfig, language: DecoderConfig, projector_type: str) -> LlavaConfig:
    return LlavaConfig(vision, ProjectorConfig(projector_type, vision.hidden_size, language.hidden_size), language)


def llava_v1_7b() -> LlavaConfig:
    """LLaVA-7B v1: CLIP at 224 pixels, one matrix, Vicuna."""
    return _llava(clip_vit_large_224px(), llama_7b(), "linear")


def llava_v1_13b() -> LlavaConfig:
    """LLaVA-13B v1, the model of the first paper."""
    return _llava(clip_vit_large_224px(), llama_13b(), "linear")


def llava_v1_5_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP at 336 pixels, two layers, Vicuna v1.5."""
    return _llava(clip_vit_large_336px(), vicuna_7b_v1_5(), "mlp2x_gelu")


def llava_v1_5_13b() -> LlavaConfig:
    """LLaVA-1.5-13B."""
    return _llava(clip_vit_large_336px(), vicuna_13b_v1_5(), "mlp2x_gelu")


def llava_small(width: int = 192, num_layers: int = 4, tower_width: int = 96, vocab_size: int = 1024) -> LlavaConfig:
    """LLaVA-1.5's architecture with few layers and channels, for a laptop: 32 px images of 4x4 visual tokens.

    Args:
      width, num_layers: of the language model; the tower has as many layers.
      tower_width: channels of the tower.
      vocab_size: rows of the embedding table.
    """
    vision = ViTConfig(
        tower_width, num_layers, tower_width // 24, 4 * tower_width, 32, 8, hidden_act="quick_gelu", layer_norm_eps=1e-5
    )
    num_heads = max(2, width // 32)
    language = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        intermediate_size=width * 11 // 4,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        max_positions=2048,
        initializer_range=width**-0.5,
    )
    return _llava(vision, language, "mlp2x_gelu")


class Llava(nn.Module):
    """The whole model. Parameters: `vision/...`, `projector/...`, `language/...`, and `resampler/...` if it has one. It
    has `Vita`'s interface.
    """

    config: LlavaConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.vision = ClipVision(self.config.vision, dtype=self.dtype)
        if self.config.resampler is not None:
            self.resampler = make_resampler(self.config.resampler, self.dtype)
        self.projector = Projector(self.config.projector, dtype=self.dtype)
        self.language = Decoder(self.config.language, dtype=self.dtype)

    @property
    def decoder(self) -> Decoder:
        """The language model as a module of its own; its parameters are `params["language"]`."""
        return Decoder(self.config.language, dtype=self.dtype)

    def tower_features(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """images: (n S S 3) uint8, or float if normalised -> (n k c), what projector or resampler reads.

        deterministic: nothing here is random.
        """
        del deterministic
        pixels = normalise_tiles(images, self.config.image_mean, self.config.image_std)
        selected = self.vision(pixels.astype(self.dtype), select_layer=self.config.select_layer)["selected"]
        return select_feature(selected, self.config.select_feature)

    def picture_tokens(self, images: jax.Array) -> jax.Array:
        """images: (n S S 3) -> (n k d), what the language model reads of each; k is `tokens_per_tile`."""
        features = self.tower_features(images)
        if self.config.resampler is not None:
            resampled, _ = self.resampler(features[:, None, None])  # a row for each picture, of one frame
            features = resampled[:, 0]
        return self.projector(features)

    def encode_tiles(self, images: jax.Array) -> jax.Array:
        """The feature table: images (b t S S 3) -> (b t*k d), image by image."""
        return features_of_tiles(
            images,
            self.picture_tokens,
            self.config.language.hidden_size,
            self.dtype,
            initializing=self.is_initializing(),
        )

    def embed_inputs(self, batch: VitaInputs, deterministic: bool = True) -> jax.Array:
        """Text embeddings with the features in their places: (b s d).

        deterministic: nothing here is random.

        Raises:
          UserError: the batch has sound, which the model does not hear.
        """
        del deterministic
        if batch.audio is not None:
            raise UserError("the inputs hold audio, but LLaVA has no audio tower; leave `audio` out")
        chex.assert_equal_shape([batch.tokens, batch.positions, batch.segment_ids, batch.feature_index])
        chex.assert_shape(batch.tiles, (batch.tokens.shape[0], None, None, None, self.config.vision.num_channels))
        features = self.encode_tiles(batch.tiles)
        if batch.extra_features is not None:
            features = jnp.concatenate([features, batch.extra_features.astype(features.dtype)], axis=1)
        return splice(self.language.embed(batch.tokens), features, batch.feature_index)

    def __call__(self, batch: VitaInputs, deterministic: bool = True) -> jax.Array:
        """The forward pass of training: hidden states after the final norm (b s d)."""
        hidden, _ = self.language(self.embed_inputs(batch, deterministic), batch.positions, batch.segment_ids)
        return hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (b s d) -> (b s v)."""
        return self.language.logits(hidden)
