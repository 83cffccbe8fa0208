"""Voices of the speech data, and which of them training never hears.

A voice is an accent with a variant (throat, breath, pitch of the larynx) and ranges of rate and pitch that each clip
draws from. Mandarin has one accent in espeak-ng, so its voices differ in their variants alone. Variants that mumble,
clip or play with effects are left out, and accents that need a corpus of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipelines.speech.synthesizer import SpeechSynthesizer
from vita_jax.errors import UserError

LANGUAGES = ("en", "zh")
# No voice of training has this variant, in either language.
UNSEEN_VARIANT = "f4"

_VARIANTS = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f5", "Alex", "Andy", "Annie", "Denis", "Lee",
    "Mario", "Mike", "Michael", "adam", "aunty", "belinda", "boris", "linda", "max", "robert", "travis",
)  # fmt: skip
_ACCENTS = ("en-us", "en-gb", "en-us", "en-us-nyc")
# (accent, variant), no pair of which is a training voice; the last variant is heard with no other accent either.
_HELD_OUT = {
    "en": (("en-us", "m4"), ("en-us", "f2"), ("en-gb", "Mario"), ("en-gb", "belinda"), ("en-us", UNSEEN_VARIANT)),
    "zh": (("cmn", "m4"), ("cmn", "f2"), ("cmn", "Mario"), ("cmn", "belinda"), ("cmn", UNSEEN_VARIANT)),
}
_ASSISTANT = {"en": ("en-us", "f3"), "zh": ("cmn", "f3")}
_RATES = {"en": (150, 205), "zh": (160, 230)}
# Tones of Mandarin are pitch, so it is spoken livelier and never monotonously.
_PITCH_RANGES = {"en": (35, 65), "zh": (50, 70)}
_PITCHES = (30, 70)


@dataclass(frozen=True)
class Voice:
    """How somebody speaks.

    Attributes:
      language: "en" or "zh".
      accent: voice code of the synthesiser.
      variant: of the synthesiser.
      rates: lowest and highest words per minute.
      pitches, pitch_ranges: lowest and highest, 0..99.
    """

    language: str
    accent: str
    variant: str
    rates: tuple[int, int]
    pitches: tuple[int, int]
    pitch_ranges: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


@dataclass(frozen=True)
class Delivery:
    """One way a voice says something: everything the synthesiser is told beside the text."""

    accent: str
    variant: str
    rate_wpm: int
    pitch: int
    pitch_range: int


def _voice(language: str, accent: str, variant: str) -> Voice:
    return Voice(language, accent, variant, _RATES[language], _PITCHES, _PITCH_RANGES[language])


def _checked(language: str) -> str:
    if language not in LANGUAGES:
        raise UserError(f"there are no voices for language {language!r}; known: {', '.join(LANGUAGES)}")
    return language


def assistant_voice(language: str) -> Voice:
    """The one voice in which the model answers, always at the same rate and pitch. Raises UserError as others."""
    accent, variant = _ASSISTANT[_checked(language)]
    return Voice(language, accent, variant, (175, 175), (50, 50), (50, 50))


@functools.cache
def held_out_voices(language: str) -> tuple[Voice, ...]:
    """Voices of the benchmark only, the one of `UNSEEN_VARIANT` last. Raises UserError for an unknown language."""
    return tuple(_voice(language, accent, variant) for accent, variant in _HELD_OUT[_checked(language)])


@functools.cache
def training_voices(language: str) -> tuple[Voice, ...]:
    """All other voices, the assistant's among them. Raises UserError for an unknown language."""
    held_out = set(_HELD_OUT[_checked(language)])
    if language == "zh":
        pairs = [("cmn", variant) for variant in _VARIANTS]
    else:
        pairs = [(_ACCENTS[index % len(_ACCENTS)], variant) for index, variant in enumerate(_VARIANTS)]
        pairs += [("en-us", variant) for variant in ("m3", "m7", "f1", "f3", "f5", "Annie", "linda")]
    return tuple(_voice(language, *pair) for pair in dict.fromkeys(pairs) if pair not in held_out)


def voices_of(language: str, split: Literal["train", "held_out"]) -> tuple[Voice, ...]:
    """The voices of a split, "train" or "held_out"."""
    return training_voices(language) if split == "train" else held_out_voices(language)


def draw_delivery(voices: Sequence[Voice], rng: np.random.Generator) -> Delivery:
    """A voice, its rate and pitch, each drawn evenly."""
    voice = voices[rng.integers(len(voices))]
    rate, pitch, pitch_range = (
        int(rng.integers(low, high + 1)) for low, high in (voice.rates, voice.pitches, voice.pitch_ranges)
    )
    return Delivery(voice.accent, voice.variant, rate, pitch, pitch_range)


def say(synthesizer: SpeechSynthesizer, text: str, delivery: Delivery) -> tuple[np.ndarray, int]:
    """The clip of a text: waveform (n,) float32 in -1..1 and its rate in Hz."""
    return synthesizer.speak(
        text,
        delivery.accent,
        rate_wpm=delivery.rate_wpm,
        pitch=delivery.pitch,
        pitch_range=delivery.pitch_range,
        variant=delivery.variant,
    )
