"""Scenes for the study: who says what to the model, and when. All voices, scans, statements and noises are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.quickstart.questions import LANGUAGES, ask
from data_pipelines.quickstart.scans import ScanSplit, load_scan_splits
from data_pipelines.quickstart.scenes import draw_sheet, sample_scene
from data_pipelines.quickstart.sentences import draw_statement
from data_pipelines.speech.clips import SPEECH, Clip, waveform_of
from data_pipelines.speech.noises import SYNTHETIC_KINDS
from data_pipelines.speech.synthesizer import Synthesizer
from data_pipelines.speech.voices import draw_delivery, held_out_voices
from vita_jax.inference.scene import Moment, Scene, SceneImage, SceneSound

SPLIT, SPLIT_SEED, SEED = "held_out", 0, 777
FOLLOWING = ("count", "kth", "largest", "read", "colour")  # kinds of the question after the description
# Descriptions are said in two seconds, so whoever interrupts asks briefly and fast, and pictures have all four digits.
INTERRUPTING, HASTY_WPM, DIGITS = "count", 220, 4
NOISE_SECONDS = (0.8, 2.0)
ANSWER, INTERRUPTION = "first question", "last question"

# Kind of scene -> when the second question begins, or else a sound that is not meant for the model, after "Describe the
# picture." has been asked; and what the kind is about.
KINDS = {
    "in turn": "a second question, half a second after the whole answer was heard",
    "interrupted": "a second question while the answer is heard",
    "early": "a second question as soon as the first was recognised, before its answer is heard",
    "twice": "a second question while the first answer is heard, a third while the second is",
    "sound": "music, hum or noise while the answer is heard",
    "other people": "somebody says something else while the answer is heard",
}
_WHEN = {
    "in turn": Moment(0.5, "done"),
    "interrupted": Moment(0.0, "first sound"),
    "early": Moment(0.0, "recognised"),
    "twice": Moment(0.0, "first sound"),
    "sound": Moment(0.1, "first sound"),
    "other people": Moment(0.1, "first sound"),
}


@dataclass(frozen=True)
class Drawn:
    """A scene and what is known about it.

    Attributes:
      kind: one of `KINDS`.
      scene: what is played.
      asked: kind of the last question that is meant for the model.
      answer: to it, as it is written.
    """

    kind: str
    scene: Scene
    asked: str
    answer: str


def draw_scenes(folder: Path, per_kind: int) -> Iterator[Drawn]:
    """So many scenes of every kind, in both languages in turn; their pictures are written into the folder."""
    scans = load_scan_splits(SPLIT_SEED)[SPLIT]
    speaker = Synthesizer()
    for number, kind in enumerate(KINDS):
        for index in range(per_kind):
            yield _draw(kind, index, np.random.default_rng((SEED, number, index)), scans, speaker, folder)


def _draw(
    kind: str, index: int, rng: np.random.Generator, scans: ScanSplit, speaker: Synthesizer, folder: Path
) -> Drawn:
    drawn, language = sample_scene(rng, num_digits=DIGITS), LANGUAGES[index % len(LANGUAGES)]
    pixels, _ = draw_sheet(drawn, scans, rng)
    picture = folder / f"{kind.replace(' ', '_')}_{index}.png"
    Image.fromarray(pixels).save(picture)

    def said(text: str, **changes: int) -> np.ndarray:
        parts = ((text, replace(draw_delivery(held_out_voices(language), rng), **changes)),)
        return waveform_of(Clip("", (SEED, index), SPEECH, parts, varied=False), speaker)

    first = ask(drawn, "caption", language, rng)
    sounds, last = [SceneSound(ANSWER, Moment(0.5), said(first.text))], first
    if kind == "sound":
        noise, seconds = str(rng.choice(SYNTHETIC_KINDS)), float(rng.uniform(*NOISE_SECONDS))
        clip = Clip("", (SEED, index), noise, seconds=seconds, varied=False)
        sounds.append(SceneSound(kind, _WHEN[kind], waveform_of(clip, speaker), meant=False))
    elif kind == "other people":
        statement = draw_statement(language, "held_out", rng)
        sounds.append(SceneSound(kind, _WHEN[kind], said(statement), meant=False))
    else:
        asked = FOLLOWING[index // len(LANGUAGES) % len(FOLLOWING)] if kind == "in turn" else INTERRUPTING
        last, haste = ask(drawn, asked, language, rng), {} if kind == "in turn" else {"rate_wpm": HASTY_WPM}
        if kind == "twice":
            between = ask(drawn, "caption", language, rng)
            sounds.append(SceneSound("between", _WHEN[kind], said(between.text, **haste)))
            sounds.append(SceneSound(INTERRUPTION, Moment(0.0, "first sound", nth=2), said(last.text, **haste)))
        else:
            sounds.append(SceneSound(INTERRUPTION, _WHEN[kind], said(last.text, **haste)))
    return Drawn(kind, Scene(tuple(sounds), (SceneImage(Moment(0.0), picture),)), last.kind, last.answer)
