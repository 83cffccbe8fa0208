"""The recogniser of stage 2.1a as a measure of other sound: which one it is, and what it hears at any rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.ctc_vocabulary import CtcVocabulary, load_ctc_vocabulary
from vita_jax.errors import UserError
from vita_jax.inference.transcription import chunked, transcribe
from vita_jax.models.vita import Vita
from vita_jax.ops.filter_bank import RELEASED, resample
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_params, read_meta
from vita_jax.training.experiment import CTC_VOCABULARY, ExperimentConfig, build_model, data_folder

SHORTEST = 0.2  # seconds; shorter waves are followed by silence, the encoder needs a few frames


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
