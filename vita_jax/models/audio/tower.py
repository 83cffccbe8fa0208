"""The audio tower: speech encoder, adapter and, optionally, learned prompt vectors in front of every clip.

Source: `vita/model/multimodal_encoder/whale/init_model.py`. Axes: b clips, f frames of 10 ms, m mel bins, s encoder
frames of 40 ms, p tokens of 80 ms, d width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.errors import UserError
from vita_jax.models.audio import encoder as encoders
from vita_jax.models.audio.encoder import AudioEncoder, AudioEncoderConfig, whale_350m
from vita_jax.models.audio.streaming import EncoderCache
from vita_jax.models.connectors import audio_adapters
from vita_jax.models.connectors.audio_adapters import AdapterCache, AudioAdapter, AudioAdapterConfig
from vita_jax.nn.layers import normal_init
from vita_jax.ops.filter_bank import encoder_length
from vita_jax.ops.masks import padding_mask


@dataclass(frozen=True)
class AudioTowerConfig:
    """The configs of the parts; their widths must fit. `num_prompt_tokens` vectors go in front of every clip."""

    encoder: AudioEncoderConfig
    adapter: AudioAdapterConfig
    num_prompt_tokens: int = 0

    def __post_init__(self) -> None:
        got, want = self.adapter.input_size, self.encoder.hidden_size
        if got != want:
            raise UserError(f"adapter.input_size is {got}, but the encoder has width {want}; set it to {want}")
        if self.num_prompt_tokens < 0:
            raise UserError(f"num_prompt_tokens is {self.num_prompt_tokens}; use 0 for none")

    def num_tokens(self, frames: int) -> int:
        """Tokens of a clip of that many frames, prompts included; int -> int, array -> array."""
        return self.num_prompt_tokens + self.adapter.num_tokens(encoder_length(frames))


def audio_vita_1_5() -> AudioTowerConfig:
    """The released tower of VITA-1.5."""
    encoder = whale_350m()
    return AudioTowerConfig(encoder, AudioAdapterConfig(input_size=encoder.hidden_size, output_size=3584))


def audio_vita_1_0() -> AudioTowerConfig:
    """The released tower of VITA-1.0: the same but for the width of the language model."""
    encoder = whale_350m()
    return AudioTowerConfig(encoder, AudioAdapterConfig(input_size=encoder.hidden_size, output_size=4096))


def audio_small(output_size: int, width: int = 96, num_layers: int = 4) -> AudioTowerConfig:
    """The released architecture with few layers and channels, for a laptop.

    Args:
      output_size: width of the language model.
      width: channels of the encoder, a multiple of 24.
      num_layers: of the encoder.
    """
    encoder = AudioEncoderConfig(
        hidden_size=width,
        num_layers=num_layers,
        num_heads=width // 24,
        intermediate_size=4 * width,
        positions="relative",
    )
    return AudioTowerConfig(encoder, AudioAdapterConfig(input_size=width, output_size=output_size))


@struct.dataclass
class AudioFeatures:
    """What the tower makes of a batch of clips.

    Attributes:
      embeds: (b prompts+p d), the prompt vectors first; behind a clip's end arbitrary but finite.
      valid: (b p) bool, without the prompts (as in the original).
      hidden: (b s width of the encoder), the encoder's output.
      hidden_valid: (b s) bool.
    """

    embeds: jax.Array
    valid: jax.Array
    hidden: jax.Array
    hidden_valid: jax.Array


@struct.dataclass
class AudioStream:
    """State of b streams: the encoder's and the adapter's caches."""

    encoder: EncoderCache
    adapter: AdapterCache


def start_stream(config: AudioTowerConfig, batch: int, dtype: jnp.dtype = jnp.float32) -> AudioStream:
    """The state before the first chunk.

    Raises:
      UserError: the encoder is not chunked, or the adapter cannot be streamed.
    """
    return AudioStream(
        encoders.make_cache(config.encoder, batch, dtype), audio_adapters.make_cache(config.adapter, batch, dtype)
    )


class AudioTower(nn.Module):
    """Parameters: `encoder/...`, `adapter/...`, and `prompt` (prompts d) if there are any."""

    config: AudioTowerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.encoder = AudioEncoder(config.encoder, self.dtype)
        self.adapter = AudioAdapter(config.adapter, self.dtype)
        if config.num_prompt_tokens:
            # N(0, 1) as in torch's embeddings
            init = nn.with_logical_partitioning(normal_init(1.0), (None, "embed"))
            shape = (config.num_prompt_tokens, config.adapter.output_size)
            self.prompt = self.param("prompt", init, shape, jnp.float32)

    def __call__(self, features: jax.Array, lengths: jax.Array, deterministic: bool = True) -> AudioFeatures:
        """Encodes whole clips.

        Args:
          features: (b f m) log-mel features, padded on the right.
          lengths: (b,) int frames of each; 0 for a slot without a clip.
          deterministic: False applies dropout and needs an rng named "dropout".

        Raises:
          UserError: too few or too many frames, see `AudioEncoder`.
        """
        hidden, hidden_valid = self.encoder(features, lengths, deterministic)
        # Batch norms keep their running statistics here: the released adapter has none, and a step returns no state.
        embeds, valid = self.adapter(hidden, hidden_valid)
        if self.config.num_prompt_tokens:
            prompt = jnp.broadcast_to(self.prompt.astype(embeds.dtype), (len(embeds), *self.prompt.shape))
            embeds = jnp.concatenate([prompt, embeds], axis=1)
        return AudioFeatures(embeds, valid, hidden, hidden_valid)

    def stream_step(
        self, window: jax.Array, state: AudioStream, real: jax.Array | None = None
    ) -> tuple[jax.Array, AudioStream]:
        """Tokens of one more chunk.

        The first `adapter.stream_delay` tokens of a stream stand for nothing, and as many more come with `stream_end`.
        The prompt vectors, if any, are the caller's to put before the first chunk.

        Args:
          window, real: as in `AudioEncoder.stream_step`.
          state: from `start_stream` or the previous call.

        Returns:
          (b c/2 d) and the next state; behind the real frames the tokens are those of the whole clip's end.
        """
        hidden, encoder_cache = self.encoder.stream_step(window, state.encoder, real)
        if real is not None:
            hidden = jnp.where(padding_mask(real, hidden.shape[1])[..., None], hidden, 0)
        tokens, adapter_cache = self.adapter.stream_step(hidden, state.adapter)
        return tokens, AudioStream(encoder_cache, adapter_cache)

    def stream_end(self, state: AudioStream) -> jax.Array:
        """The tokens that an adapter which looks ahead has held back: (b `adapter.stream_delay` d)."""
        config = self.config.adapter
        silence = jnp.zeros((state.encoder.step.shape[0], 2 * config.stream_delay, config.input_size), self.dtype)
        return self.adapter.stream_step(silence, state.adapter)[0]
