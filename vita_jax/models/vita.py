"""VITA: vision, audio and language model joined by one gather (VITA-1.5, arXiv 2501.01957; VITA-1.0, arXiv 2408.05211;
`vita_arch.py`).

The data side (`vita_jax.data.splice`) has already expanded every placeholder to its exact number of positions and given
each of them an index into the row's table of features. So the composition is

    features = projector(tower(tiles)), audio_tower(clips), and any other source, one after the other
    x        = where(feature_index >= 0, features[feature_index], embedding[tokens])
    hidden   = decoder(x)

with static shapes, any number of pictures and clips per row, and rows packed with several conversations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from vita_jax.errors import UserError
from vita_jax.models.audio.ctc_head import CtcHead, CtcTraining
from vita_jax.models.audio.encoder import MIN_FRAMES
from vita_jax.models.audio.tower import (
    AudioFeatures,
    AudioTower,
    AudioTowerConfig,
    audio_small,
    audio_vita_1_0,
    audio_vita_1_5,
)
from vita_jax.models.codec.codec import Codec
from vita_jax.models.codec.config import CodecConfig, codec_small_16k, vita_1_5_codec
from vita_jax.models.codec.losses import CodecTraining, codec_training_small
from vita_jax.models.connectors.projectors import Projector, ProjectorConfig
from vita_jax.models.language.decoder import Decoder, DecoderConfig, mixtral_8x7b, qwen2_7b
from vita_jax.models.speech.config import SpeechDecoderConfig, speech_small, vita_1_5_speech
from vita_jax.models.speech.speech_decoder import SpeechBatch, SpeechDecoder
from vita_jax.models.state_head import StateHead, StateHeadConfig
from vita_jax.models.vision.frame_pooling import pool_tokens
from vita_jax.models.vision.internvit import InternViT, InternViTConfig, internvit_300m_448px, vita_tower_features

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VitaConfig:
    """The configs of the parts, and what joins them.

    Attributes:
      vision, projector, language: the parts; their widths must fit each other.
      image_mean, image_std: per channel, of pixel values in 0..1; applied to uint8 tiles.
      pooled_grids: sides of pooled copies of every tile's features that the table also holds (slow-fast video pooling
        is (12, 7)); empty for the released models. `vita_jax.data.splice.FeatureLayout` describes the table.
      audio: the speech encoder and its adapter; None for a model that does not hear.
      state_head: tells what kind of input the hidden states have seen; None for the released models.
      ctc_vocab_size: rows of the recogniser's head on the speech encoder (stage 2.1a); 0 for none.
      codec, speech: speech tokens to sound, and text to speech tokens; None for a model that does not speak. They are
        not part of the forward pass: the speech decoders read input embeddings of the language model.
      ctc_training, codec_training: how the recogniser and the codec are trained.
    """

    vision: InternViTConfig
    projector: ProjectorConfig
    language: DecoderConfig
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    pooled_grids: tuple[int, ...] = ()
    audio: AudioTowerConfig | None = None
    state_head: StateHeadConfig | None = None
    ctc_vocab_size: int = 0
    codec: CodecConfig | None = None
    speech: SpeechDecoderConfig | None = None
    ctc_training: CtcTraining = CtcTraining()
    codec_training: CodecTraining = CodecTraining()

    resampler: ClassVar[None] = None  # LLaVA may have one, and Flamingo has; who asks for VITA's finds none

    def __post_init__(self) -> None:
        widths = [
            ("projector.input_size", self.projector.input_size, self.vision.output_size),
            ("projector.output_size", self.projector.output_size, self.language.hidden_size),
        ]
        if self.audio is not None:
            widths.append(("audio.adapter.output_size", self.audio.adapter.output_size, self.language.hidden_size))
        if self.state_head is not None:
            widths.append(("state_head.hidden_size", self.state_head.hidden_size, self.language.hidden_size))
        for name, got, want in widths:
            if got != want:
                raise UserError(f"{name} is {got}, but the part it joins has width {want}; set it to {want}")
        if self.ctc_vocab_size and self.audio is None:
            raise UserError(f"ctc_vocab_size is {self.ctc_vocab_size}, but there is no speech encoder; set `audio` too")
        self._check_speech()

    def _check_speech(self) -> None:
        if self.speech is None:
            return
        if self.language.hidden_size % self.speech.hidden_size:
            raise UserError(
                f"speech.hidden_size is {self.speech.hidden_size}; it must divide language.hidden_size "
                f"{self.language.hidden_size}, whose vectors are cut into rows of it"
            )
        if self.codec is None:
            raise UserError("speech needs a codec that makes sound of its tokens; set the config's `codec`")
        for name, got, want in (
            ("speech.num_codes", self.speech.num_codes, self.codec.num_codes),
            ("codec.num_quantizers", self.codec.num_quantizers, 1),
        ):
            if got != want:
                raise UserError(f"{name} is {got}, but the speech decoders speak with one codebook: set it to {want}")

    @property
    def tokens_per_tile(self) -> int:
        """Positions that one tile takes in the language model; some projectors merge tokens."""
        tower = jax.ShapeDtypeStruct((1, self.vision.tokens_per_tile, self.vision.output_size), jnp.float32)
        out, _ = jax.eval_shape(Projector(self.projector).init_with_output, jax.random.key(0), tower)
        return out.shape[1]


def vita_1_5() -> VitaConfig:
    """VITA-1.5 at full size: what it sees, hears and reads; its voice is a model of its own."""
    vision, language = internvit_300m_448px(), qwen2_7b()
    projector = ProjectorConfig("mlp2x_gelu", input_size=vision.output_size, output_size=language.hidden_size)
    return VitaConfig(vision, projector, language, audio=audio_vita_1_5())


VITA_1_0_VOCABULARY = 51760


def vita_1_0() -> VitaConfig:
    """VITA-1.0 at full size: the parts of VITA-1.5 around Mixtral-8x7B with the vocabulary enlarged for Chinese."""
    vision, language = internvit_300m_448px(), mixtral_8x7b(VITA_1_0_VOCABULARY)
    projector = ProjectorConfig("mlp2x_gelu", input_size=vision.output_size, output_size=language.hidden_size)
    return VitaConfig(vision, projector, language, audio=audio_vita_1_0())


def vita_small(width: int = 192, num_layers: int = 4, tower_width: int = 96, vocab_size: int = 1024) -> VitaConfig:
    """VITA-1.5's architecture with few layers and channels, for a laptop: 32 px tiles of 2x2 visual tokens.

    Args:
      width, num_layers: of the language model; both towers have as many layers.
      tower_width: channels of the vision tower.
      vocab_size: rows of the embedding table.
    """
    vision = InternViTConfig(
        hidden_size=tower_width,
        num_layers=num_layers,
        num_heads=tower_width // 24,
        intermediate_size=4 * tower_width,
        image_size=32,
        patch_size=8,
        embedding_init_stddev=0.02,
    )
    num_heads = max(2, width // 32)
    language = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=2,
        head_dim=width // num_heads,
        intermediate_size=width * 11 // 4,
        rope_theta=1e4,  # short contexts: the longest wavelengths of 1e6 would carry nothing
        max_positions=2048,
        initializer_range=width**-0.5,
    )
    return VitaConfig(vision, ProjectorConfig("mlp2x_gelu", vision.output_size, width), language)


def vita_1_5_with_voice() -> VitaConfig:
    """VITA-1.5 at full size as its curriculum trains it up to 3.2: with an input head, codec and speech decoders, and a
    new speech encoder, by distances and for chunks of any size (the released one is neither).
    """
    model = vita_1_5()
    encoder = replace(model.audio.encoder, positions="relative", dynamic_chunks=True)
    return replace(
        model,
        audio=replace(model.audio, encoder=encoder),
        state_head=StateHeadConfig(model.language.hidden_size),
        codec=vita_1_5_codec(),
        speech=vita_1_5_speech(),
    )


def vita_small_with_voice(
    width: int = 192, num_layers: int = 4, tower_width: int = 96, vocab_size: int = 1024
) -> VitaConfig:
    """`vita_small` that hears and speaks; arguments as there. The recogniser's head, `ctc_vocab_size`, is left out."""
    audio, codec = audio_small(width, tower_width, num_layers), codec_small_16k()
    encoder = replace(audio.encoder, dynamic_chunks=True, dropout=0.0, positional_dropout=0.0)
    return replace(
        vita_small(width, num_layers, tower_width, vocab_size),
        audio=replace(audio, encoder=encoder),
        state_head=StateHeadConfig(width),
        codec=codec,
        speech=speech_small(codec.num_codes, width // 2, num_layers),
        codec_training=codec_training_small(adversarial_start=4000),
    )


@struct.dataclass
class VitaInputs:
    """A batch of rows, all shapes static.

    Attributes:
      tokens: (b s) int32; anything valid where a feature goes.
      positions: (b s) int32 rotary positions.
      segment_ids: (b s) int32; attention stays within a segment; 0 = padding.
      feature_index: (b s) int32; -1 = text, else a row of this row's feature table.
      tiles: (b t S S 3) uint8, or float if already normalised; t may be 0 (text only).
      extra_features: (b m d) features from another source, which come last in the table; or None.
      audio: (b a f m) log-mel features of a clips per row, not normalised, padded on the right; or None. Their tokens,
        `config.audio.num_tokens(f)` for every clip however short it is, follow those of the tiles in the table.
      audio_lengths: (b a) int32 frames of each clip, 0 = none; or None.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    feature_index: jax.Array
    tiles: jax.Array
    extra_features: jax.Array | None = None
    audio: jax.Array | None = None
    audio_lengths: jax.Array | None = None


def splice(text_embeds: jax.Array, features: jax.Array, feature_index: jax.Array) -> jax.Array:
    """Puts features in their places: the one point where modalities meet.

    Args:
      text_embeds: (b s d).
      features: (b n d), each row's own table: sources are joined by concatenation along `n`.
      feature_index: (b s) int32 in [-1, n); -1 keeps the text embedding.

    Returns:
      (b s d) in the dtype of `text_embeds`.
    """
    if features.shape[1] == 0:
        return text_embeds
    gathered = jnp.take_along_axis(features, jnp.maximum(feature_index, 0)[..., None], axis=1)
    return jnp.where((feature_index >= 0)[..., None], gathered.astype(text_embeds.dtype), text_embeds)


def normalise_tiles(tiles: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 (... 3) -> float32 `(value / 255 - mean) / std`; float input is taken as normalised already."""
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles
    values = tiles.astype(jnp.float32) * (1.0 / 255.0)
    return (values - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def append_pooled(features: jax.Array, grids: tuple[int, ...]) -> jax.Array:
    """Appends, to the features of every tile, their copies pooled to each grid.

    Args:
      features: (n k d), k a square number: the tokens of a tile, row by row.
      grids: sides g of the pooled grids.

    Returns:
      (n k+sum(g*g) d).
    """
    pooled = [pool_tokens(features, grid) for grid in grids]
    return jnp.concatenate([features, *pooled], axis=1) if pooled else features


def features_of_tiles(
    tiles: jax.Array,
    encode: Callable[[jax.Array], jax.Array],
    width: int,
    dtype: jnp.dtype,
    *,
    initializing: bool,
) -> jax.Array:
    """The tiles' part of the feature table, tile by tile.

    Args:
      tiles: (b t S S 3); t may be 0, and then nothing is encoded unless parameters are to be made.
      encode: (n S S 3) -> (n k d).
      width, dtype: d, and of the result.
      initializing: whether parameters are being made.

    Returns:
      (b t*k d).
    """
    b, t = tiles.shape[:2]
    if t == 0 and not initializing:
        return jnp.zeros((b, 0, width), dtype)
    if t == 0:
        tiles = jnp.zeros((b, 1, *tiles.shape[2:]), tiles.dtype)
    features = rearrange(encode(rearrange(tiles, "b t ... -> (b t) ...")), "(b t) k d -> b (t k) d", b=b)
    return features if t else features[:, :0]


class Vita(nn.Module):
    """The whole model. Parameters: `vision/...`, `projector/...`, `language/...`; `audio/...` if it hears,
    `ctc_head/...` if it was taught by transcripts, `state_head/...` if it has one, and `codec/...`, `speech/...` if it
    speaks.
    """

    config: VitaConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.vision = InternViT(self.config.vision, dtype=self.dtype)
        self.projector = Projector(self.config.projector, dtype=self.dtype)
        self.language = Decoder(self.config.language, dtype=self.dtype)
        if self.config.audio is not None:
            self.audio = AudioTower(self.config.audio, dtype=self.dtype)
        if self.config.state_head is not None:
            self.state_head = StateHead(self.config.state_head, dtype=self.dtype)
        if self.config.ctc_vocab_size:
            self.ctc_head = CtcHead(self.config.ctc_vocab_size, dtype=self.dtype)
        if self.config.codec is not None:
            self.codec = Codec(self.config.codec)
        if self.config.speech is not None:
            self.speech = SpeechDecoder(self.config.speech, dtype=self.dtype)

    @property
    def decoder(self) -> Decoder:
        """The language model as a module of its own; its parameters are `params["language"]`."""
        return Decoder(self.config.language, dtype=self.dtype)

    def tower_features(self, tiles: jax.Array, deterministic: bool = True) -> jax.Array:
        """tiles: (n S S 3) -> (n k 4c), what the projector reads; k tokens per tile, c the tower's width."""
        pixels = normalise_tiles(tiles, self.config.image_mean, self.config.image_std)
        return vita_tower_features(self.vision(pixels.astype(self.dtype), deterministic=deterministic))

    def encode_tiles(self, tiles: jax.Array, deterministic: bool = True) -> jax.Array:
        """The tiles' part of the feature table.

        Args:
          tiles: (b t S S 3) uint8, or float if normalised.
          deterministic: False lets the tower drop paths (needs the rng `dropout`).

        Returns:
          (b t*k d), or (b t*(k + pooled) d) with `pooled_grids`; tile by tile.
        """

        def encode(tiles: jax.Array) -> jax.Array:
            projected = self.projector(self.tower_features(tiles, deterministic))
            return append_pooled(projected, self.config.pooled_grids)

        width = self.config.language.hidden_size
        return features_of_tiles(tiles, encode, width, self.dtype, initializing=self.is_initializing())

    def audio_features(self, features: jax.Array, lengths: jax.Array, deterministic: bool = True) -> AudioFeatures:
        """What the audio tower makes of clips: features (n f m), lengths (n,) -> see `AudioFeatures`.

        Raises:
          UserError: the model has no audio tower.
        """
        if self.config.audio is None:
            raise UserError("the inputs hold audio, but the model has no audio tower; set the config's `audio`")
        return self.audio(features, lengths, deterministic)

    def encode_audio(self, features: jax.Array, lengths: jax.Array, deterministic: bool = True) -> jax.Array:
        """The clips' part of the feature table.

        Args:
          features: (b a f m) log-mel features.
          lengths: (b a) int32 frames of each clip, 0 = none.
          deterministic: False applies dropout (needs the rng `dropout`).

        Returns:
          (b a*n d), clip by clip, n = `config.audio.num_tokens(f)`; of a clip's n features the first
          `num_tokens(length)` are its own, the others arbitrary but finite.
        """
        clips = rearrange(features, "b a f m -> (b a) f m")
        embeds = self.audio_features(clips, lengths.reshape(-1), deterministic).embeds
        return rearrange(embeds, "(b a) n d -> b (a n) d", b=features.shape[0])

    def embed_inputs(self, batch: VitaInputs, deterministic: bool = True) -> jax.Array:
        """Text embeddings with the features in their places: (b s d)."""
        chex.assert_equal_shape([batch.tokens, batch.positions, batch.segment_ids, batch.feature_index])
        chex.assert_shape(batch.tiles, (batch.tokens.shape[0], None, None, None, self.config.vision.num_channels))
        features = self.encode_tiles(batch.tiles, deterministic)
        sources = [features]
        if batch.audio is not None and batch.audio.shape[1]:
            chex.assert_shape(batch.audio_lengths, (batch.tokens.shape[0], batch.audio.shape[1]))
            sources.append(self.encode_audio(batch.audio, batch.audio_lengths, deterministic))
        elif self.is_initializing() and self.config.audio is not None:
            # `init` only makes the parameters of what runs.
            shortest = jnp.zeros((1, MIN_FRAMES, self.config.audio.encoder.input_dim), jnp.float32)
            hidden = self.audio_features(shortest, jnp.full((1,), MIN_FRAMES)).hidden
            if self.config.ctc_vocab_size:
                self.ctc_head(hidden)
        if self.is_initializing():
            self._make_speech_parameters()
        if batch.extra_features is not None:
            sources.append(batch.extra_features.astype(features.dtype))
        features = jnp.concatenate(sources, axis=1)
        return splice(self.language.embed(batch.tokens), features, batch.feature_index)

    def _make_speech_parameters(self) -> None:
        """The voice runs by itself (`speech_objectives`, `speak`); `init` only makes the parameters of what runs."""
        if self.config.codec is not None:
            wave = jnp.zeros((1, 2 * self.config.codec.hop))
            self.codec(wave, wave, train=False)
        if self.config.speech is not None:
            one = jnp.ones((1,), jnp.int32)
            rows = jnp.zeros((1, 1, self.config.speech.hidden_size))
            self.speech(SpeechBatch(rows, one, jnp.zeros((1, 1), jnp.int32), one))

    def __call__(self, batch: VitaInputs, deterministic: bool = True) -> jax.Array:
        """The forward pass of training: hidden states after the final norm (b s d)."""
        embeds = self.embed_inputs(batch, deterministic)
        hidden, _ = self.language(embeds, batch.positions, batch.segment_ids)
        if self.is_initializing() and self.config.state_head is not None:
            self.state_head(hidden)
        return hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (b s d) -> (b s v)."""
        return self.language.logits(hidden)

    def state_logits(self, hidden: jax.Array) -> jax.Array:
        """What the state head says at every position: hidden (b s d) -> (b s c).

        Raises:
          UserError: the model has no state head.
        """
        if self.config.state_head is None:
            raise UserError("the model has no state head; set the config's `state_head`")
        return self.state_head(hidden)


def text_inputs(tokens: jax.Array, segment_ids: jax.Array | None = None, *, image_size: int = 448) -> VitaInputs:
    """Inputs without media: positions count from 0, no tiles.

    Args:
      tokens: (b s) int32.
      segment_ids: (b s) int32; default one segment and no padding.
      image_size: S of the tower, for the shape of the empty tile array.
    """
    b, s = tokens.shape
    return VitaInputs(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s)),
        segment_ids=jnp.ones((b, s), jnp.int32) if segment_ids is None else segment_ids,
        feature_index=jnp.full((b, s), -1, jnp.int32),
        tiles=jnp.zeros((b, 0, image_size, image_size, 3), jnp.uint8),
    )
