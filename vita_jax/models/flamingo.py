"""Flamingo: a frozen language model that looks at pictures between its layers (arXiv 2204.14198; the open reproduction
`open_flamingo/src/flamingo.py`).

    media  = resampler(tower(pictures))                      a fixed number of tokens per picture
    hidden = decoder(embedding[tokens]), with gated cross-attention to `media` before every n-th layer

Text is not widened by pictures: a tag in the text is one token, and `media_times` says which picture every position
sees. A fresh model gives exactly what its language model gives. Axes: b rows, s positions, t pictures, f frames, m
tokens of a picture, c the tower's width, d the language model's, g gated blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.connectors.plain_resamplers import make_resampler
from vita_jax.models.language.cache import KVCache, last_valid
from vita_jax.models.language.decoder import Decoder, DecoderConfig
from vita_jax.models.language.gated_cross_attention import GatedCrossAttentionConfig, gated_stack
from vita_jax.models.language.gated_decoder import (
    GatedCache,
    make_gated_cache,
    media_keys_values,
    num_blocks,
    run_layers,
)
from vita_jax.models.language.llama import llama_7b, sheared_llama_1_3b, sheared_llama_2_7b
from vita_jax.models.vision.clip import CLIP_MEAN, CLIP_STD, ClipVision, clip_vit_large_224px
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vita import normalise_tiles


@dataclass(frozen=True)
class FlamingoConfig:
    """The configs of the parts, and how often the language model looks.

    Attributes:
      vision, resampler, language, cross_attention: the parts; their widths must fit each other.
      cross_attention_every: layers of the language model to one gated block.
      image_mean, image_std: per channel, of pixel values in 0..1; applied to uint8 pictures.
    """

    vision: ViTConfig
    resampler: ResamplerConfig
    language: DecoderConfig
    cross_attention: GatedCrossAttentionConfig
    cross_attention_every: int = 4
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    # What only VITA has; whoever asks for it finds none.
    audio: ClassVar[None] = None
    state_head: ClassVar[None] = None
    codec: ClassVar[None] = None
    speech: ClassVar[None] = None
    ctc_vocab_size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name, got, want in (
            ("resampler.hidden_size", self.resampler.hidden_size, self.vision.hidden_size),
            ("cross_attention.media_size", self.cross_attention.media_size, self.resampler.hidden_size),
            ("cross_attention.hidden_size", self.cross_attention.hidden_size, self.language.hidden_size),
        ):
            if got != want:
                raise UserError(f"{name} is {got}, but the part it joins has width {want}; set it to {want}")
        if not 1 <= self.cross_attention_every <= self.language.num_layers:
            raise UserError(
                f"cross_attention_every {self.cross_attention_every} must be between 1 and the number of layers, "
                f"{self.language.num_layers}"
            )
        if self.language.num_experts:
            raise UnsupportedOption(
                f"language.num_experts {self.language.num_experts}: Flamingo's language model must be dense; use 0"
            )

    @property
    def num_blocks(self) -> int:
        """g."""
        return num_blocks(self.language.num_layers, self.cross_attention_every)


# LLaMA's vocabulary and the three tokens that open_flamingo appends to it: end of chunk, picture, padding.
LLAMA_VOCABULARY = 32000 + 3


def flamingo(language: DecoderConfig, cross_attention_every: int) -> FlamingoConfig:
    """open_flamingo around a language model: CLIP ViT-L/14 at 224 pixels, its resampler, heads of 8 x 64."""
    vision = clip_vit_large_224px()
    return FlamingoConfig(
        vision,
        ResamplerConfig(vision.hidden_size),
        language,
        GatedCrossAttentionConfig(language.hidden_size, vision.hidden_size),
        cross_attention_every,
    )


def flamingo_llama_7b(cross_attention_every: int = 4) -> FlamingoConfig:
    """open_flamingo around LLaMA-7B; with a block before every fourth layer its first 9B model."""
    return flamingo(llama_7b(LLAMA_VOCABULARY), cross_attention_every)


def flamingo_3b() -> FlamingoConfig:
    """As open_flamingo's 3B, a block before every layer, with a LLaMA as wide and deep in place of its MPT-1B."""
    return flamingo(sheared_llama_1_3b(LLAMA_VOCABULARY), 1)


def flamingo_4b() -> FlamingoConfig:
    """As open_flamingo's 4B, a block before every second layer, with a LLaMA in place of its RedPajama-INCITE-3B."""
    return flamingo(sheared_llama_2_7b(LLAMA_VOCABULARY), 2)


@struct.dataclass
class FlamingoInputs:
    """A batch of rows, all shapes static.

    Attributes:
      tokens: (b s) int32, with the vocabulary's own id for a picture's tag.
      positions: (b s) int32 rotary positions.
      segment_ids: (b s) int32; attention stays within a segment; 0 = padding.
      media_times: (b s) int32, which of the row's pictures a position sees, from 1; 0 = none. See
        `vita_jax.ops.media.media_times`.
      images: (b t f S S 3) uint8, or float if already normalised; t may be 0 (text only), f is 1 for pictures.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    media_times: jax.Array
    images: jax.Array


class Flamingo(nn.Module):
    """The whole model. Parameters: `vision/...`, `resampler/...`, `cross_attention/...` (g ...), and `language/...` as
    the language model has them alone.
    """

    config: FlamingoConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.vision = ClipVision(c.vision, dtype=self.dtype)
        self.resampler = make_resampler(c.resampler, self.dtype)
        self.language = Decoder(c.language, dtype=self.dtype)
        self.cross_attention = gated_stack(c.cross_attention, c.num_blocks, self.dtype)

    def tower_features(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Patch tokens of the tower's last layer, before its last norm: images (n S S 3) uint8, or float if normalised
        -> (n v c). deterministic: nothing here is random.
        """
        del deterministic
        pixels = normalise_tiles(images, self.config.image_mean, self.config.image_std)
        return self.vision(pixels.astype(self.dtype))["last_hidden_state"][:, 1:]

    def picture_embedding(self, images: jax.Array) -> jax.Array:
        """One vector per picture, of length 1, whose products say how alike pictures are: images (n S S 3) -> (n e).

        CLIP's projected embedding where the tower has its projection; else the mean of the patch tokens.
        """
        pixels = normalise_tiles(images, self.config.image_mean, self.config.image_std)
        out = self.vision(pixels.astype(self.dtype))
        embedding = out.get("image_embeds", out["last_hidden_state"][:, 1:].mean(axis=1)).astype(jnp.float32)
        return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)

    def encode_media(self, images: jax.Array) -> jax.Array:
        """The pictures' tokens: images (b t f S S 3) -> (b t m c)."""
        b, t, f = images.shape[:3]
        if t == 0 and not self.is_initializing():
            return jnp.zeros((b, 0, self.config.resampler.num_latents, self.config.vision.hidden_size), self.dtype)
        if t == 0:
            images = jnp.zeros((b, 1, *images.shape[2:]), images.dtype)
        features = self.tower_features(rearrange(images, "b t f ... -> (b t f) ..."))
        media, _ = self.resampler(rearrange(features, "(b t f) v c -> b t f v c", b=b, f=f))
        return media if t else media[:, :0]

    def media_keys_values(self, media: jax.Array) -> jax.Array:
        """What all gated blocks read of the pictures: media (b t m c) -> (g b t m 2 n h)."""
        blocks = self.variables["params"]["cross_attention"]
        return media_keys_values(self.config.cross_attention, blocks, media.astype(self.dtype))

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        media: jax.Array,
        media_times: jax.Array,
        cache: KVCache | None = None,
        capture: bool = False,
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
        """The language model with its gated blocks; arguments and results as in `gated_decoder.run_layers`.

        tokens: (b s) int32. media: (g b t m 2 n h). Hidden states (b s d) are those after the final norm.
        """
        c, params = self.config, self.variables["params"]
        x, cache, captured = run_layers(
            c.language,
            c.cross_attention,
            c.cross_attention_every,
            params["language"]["layers"],
            params["cross_attention"],
            self.language.embed(tokens),
            media,
            media_times,
            positions,
            segment_ids,
            cache,
            capture,
        )
        return self.language.norm(x), cache, captured

    def __call__(self, batch: FlamingoInputs, deterministic: bool = True) -> jax.Array:
        """The forward pass of training: hidden states after the final norm (b s d). Nothing here is random."""
        del deterministic
        chex.assert_equal_shape([batch.tokens, batch.positions, batch.segment_ids, batch.media_times])
        chex.assert_shape(batch.images, (batch.tokens.shape[0], *(None,) * 4, self.config.vision.num_channels))
        media = self.encode_media(batch.images)
        if self.is_initializing():
            return self._make_parameters(batch)
        keys_values = self.media_keys_values(media)
        hidden, _, _ = self.hidden_states(
            batch.tokens, batch.positions, batch.segment_ids, keys_values, batch.media_times
        )
        return hidden

    def _make_parameters(self, batch: FlamingoInputs) -> jax.Array:
        """The layers are run as plain functions of their parameters, which have to be there; `init` makes them here."""
        embeds, cross = self.language.embed(batch.tokens), self.config.cross_attention
        shape = (self.config.num_blocks, embeds.shape[0], 1, 1, 2, cross.num_heads, cross.head_dim)
        self.cross_attention(embeds, jnp.zeros(shape, self.dtype), batch.media_times)
        hidden, _ = self.language(embeds, batch.positions, batch.segment_ids)
        return hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (b s d) -> (b s v)."""
        return self.language.logits(hidden)

    def prefill(self, batch: FlamingoInputs, num_slots: int) -> tuple[jax.Array, GatedCache]:
        """Reads prompts.

        Args:
          batch: prompts, one segment per row, padded on either side.
          num_slots: positions that the cache can hold, prompts included.

        Returns:
          logits that follow each row's last real position (b v), and the cache.
        """
        keys_values = self.media_keys_values(self.encode_media(batch.images))
        b = batch.tokens.shape[0]
        cache = make_gated_cache(self.config.language, b, num_slots, keys_values, self.dtype)
        return self._continue(batch.tokens, batch.positions, batch.segment_ids, batch.media_times, cache)

    def decode_step(self, tokens: jax.Array, cache: GatedCache) -> tuple[jax.Array, GatedCache]:
        """Feeds one token (b,) per row, at the position after its last one, which sees the same picture.

        Returns:
          logits of the token after (b v), and the new cache.
        """
        text = cache.text
        return self._continue(
            tokens[:, None], text.next_position[:, None], text.segment[:, None], cache.times[:, None], cache
        )

    def _continue(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, times: jax.Array, cache: GatedCache
    ) -> tuple[jax.Array, GatedCache]:
        hidden, text, _ = self.hidden_states(tokens, positions, segment_ids, cache.media, times, cache.text)
        last = last_valid(segment_ids)
        at = jnp.maximum(last, 0)[:, None]
        seen = jnp.where(last >= 0, jnp.take_along_axis(times, at, axis=1)[:, 0], cache.times)
        logits = self.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))[:, 0]
        return logits, GatedCache(text, cache.media, seen)


def text_inputs(tokens: jax.Array, segment_ids: jax.Array | None = None, *, image_size: int = 224) -> FlamingoInputs:
    """Inputs without pictures: positions count from 0.

    Args:
      tokens: (b s) int32.
      segment_ids: (b s) int32; default one segment and no padding.
      image_size: S of the tower, for the shape of the empty array of pictures.
    """
    b, s = tokens.shape
    return FlamingoInputs(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s)),
        segment_ids=jnp.ones((b, s), jnp.int32) if segment_ids is None else segment_ids,
        media_times=jnp.zeros((b, s), jnp.int32),
        images=jnp.zeros((b, 0, 1, image_size, image_size, 3), jnp.uint8),
    )
