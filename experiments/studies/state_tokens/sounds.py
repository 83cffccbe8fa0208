"""What the arms of the study are asked: sounds that are not for the model, and queries that are, in many conditions.

Everything heard is held out: voices, statements, noises, pictures. Sound number i of a condition says the same, in the
same voice and about the same picture, as number i of any other condition with that kind of sound, so that conditions
differ in what they are named after and in nothing else. Loudness is that of the quickstart's benchmark unless a level
is named; a level in dB is relative to it, a ratio (SNR) is that of the powers of the whole clips.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.quickstart.questions import KINDS, LANGUAGES, ask
from data_pipelines.quickstart.scans import ScanSplit
from data_pipelines.quickstart.scenes import sample_scene
from data_pipelines.quickstart.sentences import draw_statement
from data_pipelines.quickstart.speech_sets import NEGATIVE_LONGEST, NEGATIVE_SECONDS, Folder, write_lines
from data_pipelines.speech.clips import SPEECH, Clip, waveform_of, write_wav
from data_pipelines.speech.noises import BABBLE_VOICES, UNSEEN_KIND, mix
from data_pipelines.speech.synthesizer import Synthesizer, list_voices
from data_pipelines.speech.voices import Voice, draw_delivery, held_out_voices, training_voices
from vita_jax.evaluation.items import ITEMS
from vita_jax.storage import write_whole

SPLIT = "held_out"
SEED = 617
MADE = "made.json"
QUERY, STATEMENT = "query", "statement"  # kinds of sound beside those of `Clip`
QUIET_DB = -15.0  # 6 dB below the quietest sound of training
NOISY_DB = (20.0, 10.0, 0.0)
OVER_DB = (20.0, 10.0, 5.0, 0.0)  # of a query over another voice

# Families of conditions: what the table sums up.
STATEMENTS, MUSIC, SPEAKERS, NOISE = "statements", "babble and music", "two speakers", "hum, noise, clicks"
ALONE, IN_NOISE, OVER_VOICE = "queries alone", "queries in noise", "queries over a voice"
NEGATIVES, QUERIES = (STATEMENTS, MUSIC, SPEAKERS, NOISE), (ALONE, IN_NOISE, OVER_VOICE)


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
      family: one of `NEGATIVES` (to be refused) or `QUERIES` (not to be).
      kind: what is heard: "query", "statement", or a kind of `Clip`.
      accents: the voices have accents of English that training has not; all of them then speak English.
      background: kind of sound behind it, at `snr_db`.
      level_db: loudness.
    """

    family: str
    kind: str
    accents: bool = False
    background: str | None = None
    snr_db: float = 0.0
    level_db: float = 0.0

    @property
    def name(self) -> str:
        """As in tables."""
        parts = [self.kind.replace("_", " ")]
        if self.accents:
            parts.append("other accents")
        if self.background is not None:
            parts.append(f"{self.background} at {self.snr_db:g} dB")
        if self.level_db:
            parts.append(f"{self.level_db:+g} dB")
        return ", ".join(parts)


def _at_levels(family: str, *kinds: str) -> list[Condition]:
    return [Condition(family, kind, level_db=level) for kind in kinds for level in (0.0, QUIET_DB)]


CONDITIONS = (
    *_at_levels(STATEMENTS, STATEMENT),
    Condition(STATEMENTS, STATEMENT, accents=True),
    *(Condition(STATEMENTS, STATEMENT, background="pink", snr_db=ratio) for ratio in (10.0, 0.0)),
    *_at_levels(MUSIC, "babble", "chords", "arpeggio"),
    *_at_levels(SPEAKERS, "second_speaker"),
    Condition(SPEAKERS, "second_speaker", accents=True),
    *_at_levels(NOISE, "hum", "white", "pink", "brown", UNSEEN_KIND),
    *_at_levels(ALONE, QUERY),
    Condition(ALONE, QUERY, accents=True),
    *(
        Condition(IN_NOISE, QUERY, background=kind, snr_db=ratio)
        for kind in ("hum", "pink", "chords", "babble")
        for ratio in NOISY_DB
    ),
    *(Condition(OVER_VOICE, QUERY, background=STATEMENT, snr_db=ratio) for ratio in OVER_DB),
)


@functools.cache
def other_accents() -> tuple[Voice, ...]:
    """Voices with the accents of English that no voice of training has; their throats are held out, too."""
    known = {voice.accent for voice in training_voices("en")}
    accents = [accent for accent in list_voices() if accent.startswith("en") and accent not in known]
    throats = held_out_voices("en")
    return tuple(dataclasses.replace(throats[i % len(throats)], accent=name) for i, name in enumerate(accents))


def build_sounds(folder: Path, per_condition: int, scans: ScanSplit, progress: Callable[[str], None] = print) -> None:
    """Writes items.jsonl and media, in place of others; does nothing if they are there.

    Args:
      folder: of the benchmark that they make.
      per_condition: sounds of each condition, in both languages in turn.
      scans: for the pictures.
      progress: gets a line now and then.
    """
    asked = {"conditions": [dataclasses.asdict(entry) for entry in CONDITIONS], "each": per_condition, "seed": SEED}
    made = folder / MADE
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == asked:
        return
    shutil.rmtree(folder, ignore_errors=True)
    place, speaker = Folder(folder, (SEED,)), Synthesizer()
    scenes = [sample_scene(place.rng) for _ in range(per_condition)]
    pictures = [place.picture(scene, scans) for scene in scenes]

    @functools.cache
    def heard(kind: str, accents: bool, number: int, behind: bool) -> np.ndarray:
        language = "en" if accents else LANGUAGES[number % len(LANGUAGES)]
        seed = (SEED, number, int(behind), *kind.encode())
        rng = np.random.default_rng(seed)
        text = None
        if kind == QUERY:
            text = ask(scenes[number], KINDS[number // len(LANGUAGES) % len(KINDS)], language, rng).text
        return waveform_of(_clip(kind, language, accents, seed, rng, text, behind), speaker)

    items: list[dict[str, Any]] = []
    for condition in CONDITIONS:
        for number in range(per_condition):
            wave = heard(condition.kind, condition.accents, number, False)
            if condition.background is not None:
                wave = mix(wave, heard(condition.background, False, number, True), condition.snr_db)
            audio = f"media/{len(items):06d}.wav"
            write_wav(folder / audio, wave * 10 ** (condition.level_db / 20))
            # As in the benchmark, each second pair of sounds that are not for the model comes with a picture.
            shown = condition.family in QUERIES or number // len(LANGUAGES) % 2
            language = "en" if condition.accents else LANGUAGES[number % len(LANGUAGES)]
            item = {"id": f"{condition.name}-{number}", "group": condition.family, "kind": condition.name}
            item |= {"language": language, "question": "", "answer": "", "audio": audio}
            items.append(item | ({"image": pictures[number]} if shown else {}))
    write_lines(folder / ITEMS, items)
    write_whole(made, json.dumps(asked) + "\n")
    progress(f"sounds: {len(items)} in {len(CONDITIONS)} conditions")


def _clip(
    kind: str,
    language: str,
    accents: bool,
    seed: tuple[int, ...],
    rng: np.random.Generator,
    text: str | None,
    behind: bool,
) -> Clip:
    """What is to be heard; `text`: of a query; `behind`: it stands behind another sound, and does not end before it."""
    voices = other_accents() if accents else held_out_voices(language)
    number = {QUERY: 1, STATEMENT: 1, "second_speaker": 2, "babble": int(rng.integers(*BABBLE_VOICES))}.get(kind, 0)
    parts = tuple((text or draw_statement(language, SPLIT, rng), draw_delivery(voices, rng)) for _ in range(number))
    seconds = NEGATIVE_LONGEST if behind else float(rng.uniform(*NEGATIVE_SECONDS))
    longest = 0.0 if kind == QUERY else NEGATIVE_LONGEST
    kind = SPEECH if kind in (QUERY, STATEMENT) else kind
    return Clip("", seed, kind, parts, seconds=seconds, varied=False, longest=longest)
