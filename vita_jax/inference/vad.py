"""When somebody speaks: from speech probabilities of microphone chunks to start, end, and the utterance between them.

The state machine around Silero VAD in the duplex demos (`wakeup_and_vad.py`). It works on probabilities, so any
detector fits. Times are in samples of a 16 kHz signal unless a name says seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vita_jax.errors import UserError

SAMPLE_RATE = 16000  # Hz
RELEASE_MARGIN = 0.15  # how far below the threshold speech counts as over


@dataclass(frozen=True)
class VadOptions:
    """When speech starts and ends.

    Attributes:
      threshold: speech probability from which on a chunk is speech; it is over below `threshold - 0.15`.
      min_silence_ms: silence that ends an utterance.
      speech_pad_ms: margin given to both ends.
      sample_rate: Hz.
    """

    threshold: float = 0.7
    min_silence_ms: int = 500
    speech_pad_ms: int = 30
    sample_rate: int = SAMPLE_RATE

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"VAD threshold {self.threshold} must be above 0 and at most 1")

    @property
    def min_silence(self) -> float:
        """Samples."""
        return self.sample_rate * self.min_silence_ms / 1000

    @property
    def pad(self) -> float:
        """Samples."""
        return self.sample_rate * self.speech_pad_ms / 1000


@dataclass(frozen=True)
class VadEvent:
    """Speech started or ended.

    kind: "start" or "end". sample: where, counted from the last reset; a start may lie before it. seconds: the same,
    rounded to a tenth.
    """

    kind: str
    sample: int
    seconds: float


@dataclass(frozen=True)
class VadState:
    """speaking: inside an utterance. silent_since: where a silence inside it began, 0 = none. heard: samples so far."""

    speaking: bool = False
    silent_since: int = 0
    heard: int = 0


def vad_step(
    state: VadState, probability: float, chunk_size: int, options: VadOptions = VadOptions()
) -> tuple[VadState, VadEvent | None]:
    """Takes in one chunk.

    Args:
      state: what the last step left; `VadState()` at the beginning.
      probability: of speech in the chunk.
      chunk_size: samples.

    Returns:
      The new state, and what happened in this chunk, if anything did.
    """
    heard = state.heard + chunk_size
    if probability >= options.threshold:
        start = _event("start", heard - options.pad - chunk_size, options)
        return VadState(speaking=True, heard=heard), None if state.speaking else start
    if probability < options.threshold - RELEASE_MARGIN and state.speaking:
        silent_since = state.silent_since or heard
        if heard - silent_since >= options.min_silence:
            return VadState(heard=heard), _event("end", silent_since + options.pad - chunk_size, options)
        return VadState(speaking=True, silent_since=silent_since, heard=heard), None
    return replace(state, heard=heard), None


def _event(kind: str, sample: float, options: VadOptions) -> VadEvent:
    return VadEvent(kind, int(sample), round(sample / options.sample_rate, 1))


@dataclass(frozen=True)
class UtteranceState:
    """A listener between chunks.

    Attributes:
      vad: state of the detector; it starts afresh after every utterance.
      previous: (n,) the chunk before the current one; None before the first.
      utterance: chunks of the running utterance; empty outside of one.
    """

    vad: VadState = VadState()
    previous: np.ndarray | None = None
    utterance: tuple[np.ndarray, ...] = ()


def listen(
    state: UtteranceState, chunk: np.ndarray, probability: float, options: VadOptions = VadOptions()
) -> tuple[UtteranceState, VadEvent | None, np.ndarray | None]:
    """Takes in one chunk and cuts utterances: the chunk before the start, then all to the end, its silence included.

    If the very first chunk is speech there is none before it, and the utterance starts with itself (the original
    fails then). As in the original, the chunks in which speech starts or ends do not count as "the chunk before".

    Args:
      state: what the last call left; `UtteranceState()` at the beginning.
      chunk: (n,) samples.
      probability: of speech in the chunk.

    Returns:
      The new state; what happened, if anything did; and the utterance (m,) if it ended in this chunk.
    """
    vad, event = vad_step(state.vad, probability, len(chunk), options)
    if event is not None and event.kind == "start":
        before = () if state.previous is None else (state.previous,)
        return UtteranceState(vad, state.previous, (*before, chunk)), event, None
    utterance = (*state.utterance, chunk) if state.utterance else ()
    if event is not None:
        return UtteranceState(VadState(), state.previous), event, np.concatenate(utterance)
    return UtteranceState(vad, chunk, utterance), None, None
