"""Copies of waves through the codec, how far they are from the originals, and how long everything that sounds takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.codec_stream import decode_codes
from vita_jax.inference.speech_tokens import SpeechSampling, speech_steps, start_speech
from vita_jax.models.audio.encoder import AudioEncoder
from vita_jax.models.codec.codec import Codec
from vita_jax.models.codec.losses import CodecLossConfig, mel_distance
from vita_jax.models.speech.speech_decoder import SpeechDecoder
from vita_jax.models.vita import VitaConfig

# Waves that go through the codec together, and the multiple of frames they are padded to.
WAVES_AT_ONCE, FRAME_STEP = 8, 40
# How much sound the real-time factors are taken from, and frames of log-mel features per second of it.
TIMED_SECONDS, FEATURES_PER_SECOND = 4.0, 100
TIMED_TEXT_ROWS = 16


@partial(jax.jit, static_argnames="codec")
def _encode(codec: Codec, params: Any, waves: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    return codec.apply({"params": params}, waves, lengths, method=Codec.encode)


def copy_waves(config: VitaConfig, params: Mapping[str, Any], waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each wave through the codec, in its own voice: (n,) samples at the codec's rate -> (n,), a begun frame counts.

    Raises:
      UserError: the model has no codec.
    """
    if config.codec is None:
        raise UserError("copies need a codec; set the model config's `codec`")
    codec, hop = Codec(config.codec), config.codec.hop
    frames = [-(-len(wave) // hop) for wave in waves]
    order = sorted(range(len(waves)), key=lambda i: frames[i])
    copies: list[np.ndarray] = [np.zeros((0,), np.float32)] * len(waves)
    for start in range(0, len(order), WAVES_AT_ONCE):
        chosen = order[start : start + WAVES_AT_ONCE]
        size = -(-frames[chosen[-1]] // FRAME_STEP) * FRAME_STEP
        batch = np.zeros((WAVES_AT_ONCE, size * hop), np.float32)
        lengths = np.ones((WAVES_AT_ONCE,), np.int32)
        for row, i in enumerate(chosen):
            batch[row, : len(waves[i])] = waves[i]
            lengths[row] = frames[i]
        codes, voices = _encode(codec, params["codec"], batch, lengths)
        decoded = np.asarray(decode_codes(codec, params["codec"], codes, voices, lengths))
        for row, i in enumerate(chosen):
            copies[i] = decoded[row, : len(waves[i])]
    return copies


def mel_distances(
    waves: Sequence[np.ndarray], copies: Sequence[np.ndarray], sampling_rate: int, losses: CodecLossConfig
) -> list[float]:
    """Distance of each pair's log-mel spectra, in the first resolution that the codec is trained with.

    Waves of (n,) and (n,) samples are padded to few lengths; silence behind both adds nothing to the distance, so that
    the mean over what is real follows from that over everything.
    """
    size, hop, _ = losses.mel[0]
    step = max(sampling_rate, size)
    distances = []
    for wave, copy in zip(waves, copies, strict=True):
        padded = -(-len(wave) // step) * step
        pair = [jnp.asarray(np.pad(x, (0, padded - len(x))))[None] for x in (wave, copy)]
        mean = _mel_distance(*pair, sampling_rate=sampling_rate, size=size, hop=hop, num_mels=losses.num_mels)
        distances.append(float(mean) * padded / max(len(wave), 1))
    return distances


_mel_distance = jax.jit(mel_distance, static_argnames=("sampling_rate", "size", "hop", "num_mels"))


# ---- time -----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="encoder")
def _encode_speech(encoder: AudioEncoder, params: Any, features: jax.Array, lengths: jax.Array) -> jax.Array:
    return encoder.apply({"params": params}, features, lengths)[0]


@partial(jax.jit, static_argnames=("decoder", "count"))
def _draw(decoder: SpeechDecoder, params: Any, rows: jax.Array, count: int) -> jax.Array:
    """`count` codec tokens for rows of text (1 s d), whether the sentence ends before or not: (1 count) int32."""
    lengths, sampling = jnp.asarray([rows.shape[1]], jnp.int32), SpeechSampling(greedy=True)
    state = start_speech(decoder, params, rows, lengths, key=jax.random.key(0), max_tokens=count, sampling=sampling)
    return speech_steps(decoder, params, state, sampling, count)[1]


def real_time_factors(config: VitaConfig, params: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of computing per second of sound, of the parts that the model has, a batch of one, when compiled.

    "encoder": the speech encoder over a whole clip; "ar_decoder": text to codec tokens, the NAR decoder included;
    "codec": tokens to sound.
    """
    factors = {}
    if config.audio is not None:
        encoder, frames = AudioEncoder(config.audio.encoder), int(TIMED_SECONDS * FEATURES_PER_SECOND)
        features = np.zeros((1, frames, config.audio.encoder.input_dim), np.float32)
        factors["encoder"] = _second_call(
            lambda: _encode_speech(encoder, params["audio"]["encoder"], features, np.asarray([frames], np.int32))
        )
    if config.codec is None:
        return factors
    frames = int(TIMED_SECONDS * config.codec.frame_rate)
    if config.speech is not None:
        decoder, rows = SpeechDecoder(config.speech), np.zeros((1, TIMED_TEXT_ROWS, config.speech.hidden_size))
        factors["ar_decoder"] = _second_call(lambda: _draw(decoder, params["speech"], rows, count=frames))
    codec = Codec(config.codec)
    codes = np.zeros((1, frames, config.codec.num_quantizers), np.int32)
    voice = np.zeros((1, config.codec.num_global_codes), np.int32)
    factors["codec"] = _second_call(lambda: decode_codes(codec, params["codec"], codes, voice))
    return factors


def _second_call(call: Callable[[], Any]) -> float:
    """Seconds that it takes once it is compiled, per second of TIMED_SECONDS."""
    jax.block_until_ready(call())
    started = time.monotonic()
    jax.block_until_ready(call())
    return (time.monotonic() - started) / TIMED_SECONDS
