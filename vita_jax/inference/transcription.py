"""Writing down what is said, by speech encoder and CTC head alone: whole clips, or in chunks as a stream does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vita_jax.data.ctc_vocabulary import CtcVocabulary
from vita_jax.errors import UserError
from vita_jax.models.vita import Vita, VitaConfig
from vita_jax.ops.ctc import ctc_greedy
from vita_jax.ops.filter_bank import RELEASED, log_mel
from vita_jax.training.objectives.recognition import recognition_logits

BATCH = 16
FRAME_STEP = 100  # clips are padded to multiples of this many frames of 10 ms, so that few shapes are compiled


def chunked(config: VitaConfig, chunk_size: int, left_chunks: int) -> VitaConfig:
    """The same model with a speech encoder that sees chunks of 40 ms frames, as a stream does.

    Args:
      chunk_size: frames of a chunk; below 1 means whole clips.
      left_chunks: chunks before it that are seen; negative for all.

    Raises:
      UserError: the model has no speech encoder.
    """
    if config.audio is None:
        raise UserError("the model has no speech encoder; set the config's `audio`")
    encoder = dataclasses.replace(config.audio.encoder, chunk_size=chunk_size, left_chunks=left_chunks)
    return dataclasses.replace(config, audio=dataclasses.replace(config.audio, encoder=encoder))


@functools.partial(jax.jit, static_argnames="model")
def _recognise(params: Any, features: jax.Array, lengths: jax.Array, model: Vita) -> jax.Array:
    return ctc_greedy(*recognition_logits(model, params, features, lengths))[0]


def transcribe(
    model: Vita,
    params: Mapping[str, Any],
    vocabulary: CtcVocabulary,
    waves: Sequence[np.ndarray],
    *,
    batch: int = BATCH,
) -> list[str]:
    """What the recogniser hears in each wave: (n,) float32 at 16 kHz each, `batch` at a time -> texts.

    Raises:
      UserError: the model has no recogniser, or a wave is too short for one frame of it.
    """
    features = [log_mel(wave) for wave in waves]
    order = np.argsort([len(f) for f in features], kind="stable")
    texts = [""] * len(waves)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        size = -(-max(len(features[i]) for i in chosen) // FRAME_STEP) * FRAME_STEP
        padded = np.zeros((batch, size, RELEASED.num_mel_bins), np.float32)
        lengths = np.zeros((batch,), np.int32)
        for slot, i in enumerate(chosen):
            padded[slot, : len(features[i])] = features[i]
            lengths[slot] = len(features[i])
        parts = {name: params[name] for name in ("audio", "ctc_head")}
        for i, row in zip(chosen, np.asarray(_recognise(parts, padded, lengths, model)), strict=False):
            texts[i] = vocabulary.decode(row.tolist())
    return texts
