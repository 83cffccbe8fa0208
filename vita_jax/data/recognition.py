"""Transcribed speech for stage 2.1a: manifests -> batches of log-mel features and character ids.

The manifests are those of `speech_pairs`, and so are order, resuming and the treatment of bad records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vita_jax.data.ctc_vocabulary import CtcVocabulary
from vita_jax.data.loader import Loader, SourceConfig
from vita_jax.data.records import RecordError
from vita_jax.data.speech_pairs import Arrays, SpokenText, make_element_loader, read_wave
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED, encoder_length, log_mel, num_frames


@dataclasses.dataclass(frozen=True)
class RecognitionShape:
    """What a batch is padded to: `frames` of 10 ms per clip; longer clips are bad records."""

    frames: int

    def __post_init__(self) -> None:
        if encoder_length(self.frames) < 1:
            raise UserError(f"clips of {self.frames} frames are too short for one frame of the encoder")

    @property
    def targets(self) -> int:
        """Characters per transcript: no more than encoder frames could be recognised."""
        return int(encoder_length(self.frames))


def recognition_element(pair: SpokenText, shape: RecognitionShape, vocabulary: CtcVocabulary) -> Arrays:
    """`features` (f 80) float32, `lengths` () frames, `targets` (u) int32 padded with 0, `target_lengths` ().

    Raises:
      RecordError: no text, an unknown character, too much text, unreadable, too short or too long audio.
    """
    try:
        ids = vocabulary.encode(pair.text)
    except UserError as error:
        raise RecordError(pair.place, "text", str(error), "unknown character") from None
    if not ids:
        raise RecordError(pair.place, "text", "has nothing that is heard", "no text")
    if len(ids) > shape.targets:
        raise RecordError(pair.place, "text", f"has {len(ids)} characters, more than {shape.targets}", "too long")
    samples = read_wave(pair.audio, RELEASED.sample_rate)
    frames = int(num_frames(len(samples)))
    if not encoder_length(frames) >= 1:
        raise RecordError(pair.place, "audio", f"has {len(samples)} samples, too few for the encoder", "too short")
    if frames > shape.frames:
        raise RecordError(pair.place, "audio", f"has {frames} frames of 10 ms, more than {shape.frames}", "too long")
    features = log_mel(samples)
    return {
        "features": np.pad(features, ((0, shape.frames - frames), (0, 0))),
        "lengths": np.int32(frames),
        "targets": np.pad(np.asarray(ids, np.int32), (0, shape.targets - len(ids))),
        "target_lengths": np.int32(len(ids)),
    }


def make_recognition_loader(
    sources: Sequence[SourceConfig], shape: RecognitionShape, vocabulary: CtcVocabulary, *, seed: int, **options: Any
) -> Loader:
    """Batches `features` (b f 80), `lengths` (b), `targets` (b u), `target_lengths` (b).

    Args:
      sources: paths of manifests; `ratio` is honoured, `weight` is not offered.
      shape: what everything is padded to.
      vocabulary: of the CTC head.
      seed, options: see `speech_pairs.make_element_loader`.

    Raises:
      UserError: a value out of range or a manifest that does not fit; from the iterator: too many bad records.
    """

    def build(pair: SpokenText, rng: np.random.Generator) -> Arrays:
        return recognition_element(pair, shape, vocabulary)

    return make_element_loader(sources, build, seed=seed, **options)
