"""How well the recogniser of stage 2.1a transcribes: character error rates, whole clips and streamed in chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vita_jax.data.ctc_vocabulary import CtcVocabulary, load_ctc_vocabulary, normalise_transcript
from vita_jax.errors import UserError
from vita_jax.evaluation.scoring import edit_distance
from vita_jax.models.vita import Vita, VitaConfig
from vita_jax.ops.ctc import ctc_greedy
from vita_jax.ops.filter_bank import RELEASED, log_mel, resample
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_params, read_meta
from vita_jax.training.experiment import CTC_VOCABULARY, ExperimentConfig, build_model, data_folder
from vita_jax.training.objectives.recognition import recognition_logits

BATCH = 16
SHORTEST = 0.2  # seconds; shorter waves are followed by silence, the encoder needs a few frames
FRAME_STEP = 100  # clips are padded to multiples of this many frames of 10 ms, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Wrong characters (substituted, inserted, left out) of `characters` in `clips`, `exact` of which have none."""

    wrong: int = 0
    characters: int = 0
    clips: int = 0
    exact: int = 0

    @property
    def rate(self) -> float:
        """The character error rate; may exceed 1."""
        return self.wrong / max(self.characters, 1)

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def count_errors(heard: str, said: str) -> ErrorCounts:
    """Counts of one clip; both texts are normalised first."""
    heard, said = normalise_transcript(heard), normalise_transcript(said)
    wrong = edit_distance(heard, said)
    return ErrorCounts(wrong, len(said), 1, int(wrong == 0))


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
    model: Vita, params: Mapping[str, Any], vocabulary: CtcVocabulary, waves: Sequence[np.ndarray]
) -> list[str]:
    """What the recogniser hears in each wave: (n,) float32 at 16 kHz each -> texts.

    Raises:
      UserError: the model has no recogniser, or a wave is too short for one frame of it.
    """
    features = [log_mel(wave) for wave in waves]
    order = np.argsort([len(f) for f in features], kind="stable")
    texts = [""] * len(waves)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        size = -(-max(len(features[i]) for i in chosen) // FRAME_STEP) * FRAME_STEP
        padded = np.zeros((BATCH, size, RELEASED.num_mel_bins), np.float32)
        lengths = np.zeros((BATCH,), np.int32)
        for slot, i in enumerate(chosen):
            padded[slot, : len(features[i])] = features[i]
            lengths[slot] = len(features[i])
        parts = {name: params[name] for name in ("audio", "ctc_head")}
        for i, row in zip(chosen, np.asarray(_recognise(parts, padded, lengths, model)), strict=False):
            texts[i] = vocabulary.decode(row.tolist())
    return texts


@dataclasses.dataclass(frozen=True)
class Recogniser:
    """A recogniser ready to hear.

    Attributes:
      model: its encoder as the config has it, see `chunked`.
      params: {"audio": {"encoder"}, "ctc_head"}.
      vocabulary: its characters.
    """

    model: Vita
    params: Mapping[str, Any]
    vocabulary: CtcVocabulary

    def hear(self, waves: Sequence[np.ndarray], sampling_rate: int = RELEASED.sample_rate) -> list[str]:
        """What it hears in each wave, (n,) float32 at `sampling_rate`; in next to nothing it hears nothing."""
        rate = RELEASED.sample_rate
        shortest = int(SHORTEST * rate)
        heard = [resample(np.asarray(wave, np.float32), sampling_rate, rate) for wave in waves]
        padded = [np.pad(wave, (0, max(0, shortest - len(wave)))) for wave in heard]
        return transcribe(self.model, self.params, self.vocabulary, padded)

    def in_chunks(self, chunk_size: int, left_chunks: int) -> Recogniser:
        """The same, hearing in chunks; see `chunked`."""
        model = self.model.clone(config=chunked(self.model.config, chunk_size, left_chunks))
        return dataclasses.replace(self, model=model)


def why_no_recogniser(config: ExperimentConfig) -> str | None:
    """Why there is nothing that transcribes; None if there is."""
    if config.model.audio is None:
        return "the model does not hear"
    if not config.model.ctc_vocab_size:
        return "the model has no CTC head"
    if not (data_folder(config) / CTC_VOCABULARY).is_file():
        return f"the data has no {CTC_VOCABULARY}"
    return None


def load_recogniser(config: ExperimentConfig, params: Mapping[str, Any]) -> Recogniser:
    """The recogniser of a run: that of its finished CTC stage, whatever later stages trained.

    Args:
      params: of the model; its own recogniser is taken where the run has no such stage, or has not finished it.

    Raises:
      UserError: there is none, see `why_no_recogniser`.
    """
    if reason := why_no_recogniser(config):
        raise UserError(f"nothing can be recognised: {reason}")
    for stage in reversed(config.stages):
        folder = checkpoint_folder(config.run_dir, stage.name)
        if stage.objective == "ctc" and _is_finished(folder):
            params = load_params(folder).params
            break
    own = {"audio": {"encoder": params["audio"]["encoder"]}, "ctc_head": params["ctc_head"]}
    return Recogniser(build_model(config), own, load_ctc_vocabulary(data_folder(config) / CTC_VOCABULARY))


def _is_finished(folder: Path) -> bool:
    steps = complete_steps(folder)
    return bool(steps) and bool(read_meta(folder / str(steps[-1]))["finished"])
