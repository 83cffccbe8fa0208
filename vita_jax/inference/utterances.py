"""Cuts a microphone's sound into utterances, so that each can be encoded while it is spoken.

    chunk, speech probability -> [Begun] [Sound ...] [Ended]

The decision when somebody speaks is `vad.vad_step`'s, that of the duplex demos; what they make of it has defects, which
are mended here:

* speech in the very first chunk is an utterance like any other;
* what is kept before the start is a time, not whatever chunk came before, and never a part of the utterance before;
* of the silence that ends an utterance only the beginning belongs to it; a pause in the middle belongs to it whole;
* an utterance ends also when it becomes too long, or when the sound is over;
* short utterances ("Stop!") count: what is too short is measured in speech, not with the silence around it.

Times are in samples at 16 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.vad import SAMPLE_RATE, VadOptions, VadState, vad_step

_NOTHING = np.zeros((0,), np.float32)


@dataclass(frozen=True)
class UtteranceOptions:
    """What an utterance is.

    Attributes:
      vad: when speech starts and ends.
      before_ms: sound before the start that belongs to it: speech is noticed a little late.
      after_ms: of the silence at its end, so much belongs to it; less than the silence that ends it.
      min_speech_ms: less speech than this is a click or a cough.
      max_seconds: a longer utterance is cut there.
    """

    vad: VadOptions = VadOptions()
    before_ms: int = 300
    after_ms: int = 200
    min_speech_ms: int = 160
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("before_ms", "after_ms", "min_speech_ms"):
            if getattr(self, name) < 0:
                raise UserError(f"utterance {name} {getattr(self, name)} must not be negative")
        if self.vad.sample_rate != SAMPLE_RATE:
            raise UserError(f"utterances are cut at {SAMPLE_RATE} Hz, not at {self.vad.sample_rate}")
        if self.after_ms >= self.vad.min_silence_ms:
            raise UserError(
                f"utterance after_ms {self.after_ms} must be below the silence that ends it, {self.vad.min_silence_ms}"
            )
        if not self.max_seconds >= 1:
            raise UserError(f"utterance max_seconds {self.max_seconds} must be at least 1")


def samples(milliseconds: float) -> int:
    """Milliseconds in samples."""
    return round(milliseconds * SAMPLE_RATE / 1000)


@dataclass(frozen=True)
class Begun:
    """An utterance begins at a sample, counted from the first one heard."""

    start: int


@dataclass(frozen=True)
class Sound:
    """More of the running utterance: (n,) float32, right behind what came before."""

    samples: np.ndarray


@dataclass(frozen=True)
class Ended:
    """The running utterance was [start, end); speech: samples of it that were speech. Nothing is missing from it."""

    start: int
    end: int
    speech: int


@dataclass(frozen=True)
class CutState:
    """A listener between chunks.

    Attributes:
      vad: state of the detector.
      heard: samples so far.
      before: (n,) the latest sound, as far as it could belong to the next utterance. Outside of one only.
      start: of the running utterance; None outside of one.
      given: up to here its sound has been given.
      held: (n,) what came after, which belongs to it if speech goes on.
      speech: samples of it that were speech.
    """

    vad: VadState = VadState()
    heard: int = 0
    before: np.ndarray = field(default_factory=lambda: _NOTHING)
    start: int | None = None
    given: int = 0
    held: np.ndarray = field(default_factory=lambda: _NOTHING)
    speech: int = 0


Cuts = list[Begun | Sound | Ended]


def cut(
    state: CutState, chunk: np.ndarray, probability: float, options: UtteranceOptions = UtteranceOptions()
) -> tuple[CutState, Cuts]:
    """Takes in one chunk.

    Args:
      state: what the last call left; `CutState()` at the beginning.
      chunk: (n,) float32.
      probability: of speech in it.

    Returns:
      The new state, and what is known now.
    """
    vad, event = vad_step(state.vad, probability, len(chunk), options.vad)
    state = replace(state, vad=vad, heard=state.heard + len(chunk))
    if state.start is None:
        if event is None:
            before = np.concatenate([state.before, chunk])[-max(samples(options.before_ms), 1) :]
            return replace(state, before=before if options.before_ms else _NOTHING), []
        sound = np.concatenate([state.before, chunk])
        begun = Begun(state.heard - len(sound))
        state = replace(state, before=_NOTHING, start=begun.start, given=state.heard, held=_NOTHING, speech=len(chunk))
        return state, [begun, Sound(sound)]
    state = replace(state, held=np.concatenate([state.held, chunk]))
    if event is not None:
        return _end(state, options)
    if not vad.silent_since:
        state = replace(state, speech=state.speech + len(chunk))
    state, cuts = _give(state, len(state.held) if not vad.silent_since else _room(state, options))
    if state.heard - state.start < options.max_seconds * SAMPLE_RATE:
        return state, cuts
    state, more = _end(replace(state, vad=VadState(heard=vad.heard)), options)
    return state, cuts + more


def end(state: CutState, options: UtteranceOptions = UtteranceOptions()) -> tuple[CutState, Cuts]:
    """The sound is over, or the speaker says so: ends the running utterance, if there is one, where it is."""
    if state.start is None:
        return state, []
    return _end(replace(state, vad=VadState(heard=state.vad.heard)), options)


def _room(state: CutState, options: UtteranceOptions) -> int:
    """Samples of what is held that belong to the utterance even if it ends here."""
    silence = state.vad.silent_since or state.heard
    return max(min(silence + samples(options.after_ms), state.heard) - state.given, 0)


def _give(state: CutState, count: int) -> tuple[CutState, Cuts]:
    if not count:
        return state, []
    sound, held = state.held[:count], state.held[count:]
    return replace(state, given=state.given + count, held=held), [Sound(sound)]


def _end(state: CutState, options: UtteranceOptions) -> tuple[CutState, Cuts]:
    # What is held beyond the end is the silence before the next utterance.
    before = state.held[max(len(state.held) - samples(options.before_ms), 0) :]
    ended = Ended(state.start, state.given, state.speech)
    return replace(state, before=before, start=None, held=_NOTHING, speech=0), [ended]
