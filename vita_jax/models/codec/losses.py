"""Losses of codec training (`ticodec/train.py`): least-squares GAN, feature matching, mel, quantiser, consistency.

One step trains the discriminators on the detached reconstruction, the next the codec against them. Adam with learning
rate 2e-4 and betas (0.5, 0.9) for both, decayed by 0.98 per epoch, is what the original uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.models.codec.codebook_training import CodebookTraining
from vita_jax.models.codec.codec import Reconstruction
from vita_jax.models.codec.discriminators import DiscriminatorConfig, Judgement
from vita_jax.ops.spectrogram import log_mel


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of the terms.

    Attributes:
      mel: (samples per frame, hop, weight) of each mel term.
      num_mels: bands.
      feature_matching, quantizer, consistency: weights.
    """

    mel: tuple[tuple[int, int, float], ...] = ((1024, 240, 45.0), (512, 120, 1.0), (256, 60, 1.0))
    num_mels: int = 80
    feature_matching: float = 2.0
    quantizer: float = 10.0
    consistency: float = 5.0


@dataclass(frozen=True)
class CodecTraining:
    """How a codec is trained.

    Attributes:
      losses: weights of the codec's own terms.
      discriminators: what it trains against; None leaves the adversarial terms out altogether.
      adversarial_start: steps of a stage that are trained without discriminators, which then do not run at all.
      codebooks: how the codebooks follow their inputs; None moves them by the loss, as in the original.
    """

    losses: CodecLossConfig = CodecLossConfig()
    discriminators: DiscriminatorConfig | None = DiscriminatorConfig()
    adversarial_start: int = 0
    codebooks: CodebookTraining | None = None

    def __post_init__(self) -> None:
        if self.adversarial_start < 0:
            raise UserError(f"adversarial_start {self.adversarial_start} must be at least 0")


def codec_training_small(adversarial_start: int = 2000, ease_in: int = 1000) -> CodecTraining:
    """For `codec_small_16k`: narrow discriminators late, and codebooks that follow their inputs.

    Only period discriminators: on a CPU each takes 4 % of the codec's own time, one over spectra half of it.
    """
    return CodecTraining(
        losses=CodecLossConfig(mel=((1024, 200, 30.0), (512, 120, 10.0), (256, 60, 5.0)), quantizer=5.0),
        discriminators=DiscriminatorConfig((2, 3, 5, 7, 11), (8, 16, 32), num_scales=0, stft_sizes=()),
        adversarial_start=adversarial_start,
        # Steps of a hundred frames for 1,024 entries: averages over many of them.
        codebooks=CodebookTraining(decay=0.99, ease_in=ease_in),
    )


def discriminator_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> jax.Array:
    """Recorded is 1, decoded is 0: the summed squares' means, () float32."""
    return sum(
        jnp.mean(jnp.square(1 - r.logits)) + jnp.mean(jnp.square(f.logits)) for r, f in zip(real, fake, strict=True)
    )


def adversarial_loss(fake: Sequence[Judgement]) -> jax.Array:
    """What the codec pays for being found out, () float32."""
    return sum(jnp.mean(jnp.square(1 - f.logits)) for f in fake)


def feature_matching_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> jax.Array:
    """Mean distance of the features of recorded and decoded waves, summed over all layers, () float32."""
    return sum(
        jnp.mean(jnp.abs(jax.lax.stop_gradient(a) - b))
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r.features, f.features, strict=True)
    )


def mel_loss(wave: jax.Array, decoded: jax.Array, sampling_rate: int, config: CodecLossConfig) -> jax.Array:
    """Weighted mean distances of the mel spectra of (b n) and (b n) samples, () float32."""
    return sum(
        weight * mel_distance(wave, decoded, sampling_rate, size, hop, config.num_mels)
        for size, hop, weight in config.mel
    )


def mel_distance(
    wave: jax.Array, decoded: jax.Array, sampling_rate: int, size: int, hop: int, num_mels: int = 80
) -> jax.Array:
    """Mean distance of the log-mel spectra (natural logarithm) of (b n) and (b n) samples, () float32."""
    spectra = [log_mel(x, size, hop, num_mels, sampling_rate) for x in (wave, decoded)]
    return jnp.mean(jnp.abs(spectra[0] - spectra[1]))


def codec_losses(
    wave: jax.Array,
    reconstruction: Reconstruction,
    real: Sequence[Judgement],
    fake: Sequence[Judgement],
    sampling_rate: int,
    config: CodecLossConfig = CodecLossConfig(),
) -> dict[str, jax.Array]:
    """The terms of the codec's own loss, already weighted.

    Args:
      wave: (b n) the crops that were coded.
      reconstruction: what the codec made of them; its wave has n samples.
      real, fake: judgements of both waves; empty leaves the adversarial terms out.

    Returns:
      name -> () float32; "loss" is the sum of the others.
    """
    zero = jnp.zeros((), jnp.float32)
    terms = {
        "mel": mel_loss(wave, reconstruction.wave, sampling_rate, config),
        "quantizer": config.quantizer * reconstruction.quantizer_loss,
        "consistency": config.consistency * reconstruction.consistency_loss,
        "adversarial": zero + adversarial_loss(fake),
        "feature_matching": zero + config.feature_matching * feature_matching_loss(real, fake),
    }
    return {"loss": sum(terms.values()), **terms}
