"""Transcribed speech for stage 2.1a: manifests -> batches of log-mel features and character ids.

The manifests are those of `speech_pairs`, and so are order, resuming and the treatment of bad records. Short clips are
joined to rows, as if they had been said one after the other; half of a batch would be padding otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vita_jax.data.ctc_vocabulary import CtcVocabulary
from vita_jax.data.loader import Loader, SourceConfig
from vita_jax.data.manifests import SpokenText
from vita_jax.data.records import RecordError
from vita_jax.data.speech_pairs import Arrays, make_element_loader, read_wave
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED, encoder_length, log_mel, num_frames

NO_TARGET = -1  # in `frame_targets`: no character is expected here
ENCODER_STRIDE = 4  # frames of 10 ms per frame of the encoder
OPEN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class RecognitionShape:
    """Rows of `frames` of 10 ms; longer clips are bad records."""

    frames: int

    def __post_init__(self) -> None:
        if encoder_length(self.frames) < 1:
            raise UserError(f"clips of {self.frames} frames are too short for one frame of the encoder")

    @property
    def targets(self) -> int:
        """Units per row: no more than encoder frames could be recognised."""
        return int(encoder_length(self.frames))


def recognition_element(
    pair: SpokenText, shape: RecognitionShape, vocabulary: CtcVocabulary, tokenizer: Tokenizer | None = None
) -> Arrays:
    """`features` (f 80) float32 and `targets` (u) int32 of one clip; with a tokenizer also `token_targets` (v) int32.

    Raises:
      RecordError: no text, an unknown character, too much text, unreadable, too short or too long audio.
    """
    try:
        ids = vocabulary.encode(pair.text)
    except UserError as error:
        raise RecordError(pair.place, "text", str(error), "unknown character") from None
    if not ids:
        raise RecordError(pair.place, "text", "has nothing that is heard", "no text")
    samples = read_wave(pair.audio, RELEASED.sample_rate)
    frames = int(num_frames(len(samples)))
    heard = int(encoder_length(frames))
    if heard < 1:
        raise RecordError(pair.place, "audio", f"has {len(samples)} samples, too few for the encoder", "too short")
    if frames > shape.frames:
        raise RecordError(pair.place, "audio", f"has {frames} frames of 10 ms, more than {shape.frames}", "too long")
    # One frame for each unit, and a blank between equal neighbours.
    needed = len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))
    if needed > heard:
        reason = f"has {len(ids)} units, which need {needed} encoder frames, but its sound has {heard}"
        raise RecordError(pair.place, "text", reason, "infeasible")
    element = {"features": log_mel(samples), "targets": np.asarray(ids, np.int32)}
    if tokenizer is not None:
        # No longer than a row has room for: what does not fit is infeasible in any case.
        element["token_targets"] = np.asarray(tokenizer.encode(pair.text)[: shape.targets], np.int32)
    return element


def join_clips(
    elements: grain.IterDataset, shape: RecognitionShape, seed: int, with_tokens: bool = False
) -> grain.IterDataset:
    """Rows of several clips, by first fit, as `recognition_row` describes them."""
    lengths = {"features": shape.frames, "targets": shape.targets}
    if with_tokens:
        lengths["token_targets"] = shape.targets
    rows = grain.experimental.FirstFitPackIterDataset(
        elements,
        length_struct=lengths,
        padding_struct=dict.fromkeys(lengths, 0),
        num_packing_bins=OPEN_ROWS,
        seed=seed,
    )
    return rows.map(recognition_row)


def recognition_row(packed: Mapping[str, np.ndarray]) -> Arrays:
    """What a row of joined clips is trained on.

    Args:
      packed: `features` (f 80), `targets` (u), perhaps `token_targets` (u), and for each the number of the clip it
        comes from, 0 for padding.

    Returns:
      `features` (f 80) float32, `lengths` () frames, `targets` (u) int32 padded with 0, `target_lengths` (), and
      `frame_targets` (s) int32: each clip's units spread evenly over its encoder frames, -1 elsewhere. With tokens
      also `token_targets` (u) int32 padded with 0 and `token_lengths` ().
    """
    clip_of_frame, clip_of_target = packed["features_segment_ids"], packed["targets_segment_ids"]
    spread = np.full(int(encoder_length(len(clip_of_frame))), NO_TARGET, np.int32)
    for clip in range(1, int(clip_of_frame.max()) + 1):
        frames = np.flatnonzero(clip_of_frame == clip)
        ids = packed["targets"][clip_of_target == clip]
        first = -(-int(frames[0]) // ENCODER_STRIDE)
        count = int(encoder_length(len(frames)))
        places = first + np.arange(min(count, len(spread) - first))
        spread[places] = ids[((np.arange(len(places)) + 0.5) * len(ids) / len(places)).astype(int)]
    tokens = {}
    if "token_targets" in packed:
        count = np.count_nonzero(packed["token_targets_segment_ids"])
        tokens = {"token_targets": packed["token_targets"], "token_lengths": np.int32(count)}
    return {
        **tokens,
        "features": packed["features"],
        "lengths": np.int32(np.count_nonzero(clip_of_frame)),
        "targets": packed["targets"],
        "target_lengths": np.int32(np.count_nonzero(clip_of_target)),
        "frame_targets": spread,
    }


def make_recognition_loader(
    sources: Sequence[SourceConfig],
    shape: RecognitionShape,
    vocabulary: CtcVocabulary,
    tokenizer: Tokenizer | None = None,
    *,
    seed: int,
    **options: Any,
) -> Loader:
    """Batches of joined clips: the arrays of `recognition_row` with a leading axis b.

    Args:
      sources: paths of manifests; `ratio` is honoured, `weight` is not offered.
      shape: of the rows.
      vocabulary: of the CTC head.
      tokenizer: of the language model, if its tokens are wanted, too.
      seed, options: see `speech_pairs.make_element_loader`.

    Raises:
      UserError: a value out of range or a manifest that does not fit; from the iterator: too many bad records.
    """

    def build(pair: SpokenText, rng: np.random.Generator) -> Arrays:
        return recognition_element(pair, shape, vocabulary, tokenizer)

    def pack(elements: grain.IterDataset) -> grain.IterDataset:
        return join_clips(elements, shape, seed, tokenizer is not None)

    return make_element_loader(sources, build, seed=seed, pack=pack, **options)
