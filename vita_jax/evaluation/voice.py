"""Whether what the model says can be understood: sound read back by the recogniser, exactly or not.

Four voices say held-out texts: the recordings themselves (what the recogniser can read at all), the codec's copies of
them, the speech decoders from the text alone; and the model's own answers to spoken questions, from end to end. No
recogniser has a part in the training of the voice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.audio import read_audio
from vita_jax.data.ctc_vocabulary import normalise_transcript
from vita_jax.data.manifests import MANIFEST, read_manifest
from vita_jax.data.speech_pairs import read_wave
from vita_jax.data.spoken_words import answer_aloud, language_of
from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks import Group
from vita_jax.evaluation.figures import Outcome, group_figures, outcome_lines
from vita_jax.evaluation.items import Item, stratified
from vita_jax.evaluation.recognition import Recogniser
from vita_jax.evaluation.scoring import character_errors, is_refusal, normalise
from vita_jax.evaluation.subject import Subject
from vita_jax.evaluation.waves import copy_waves, mel_distances
from vita_jax.inference.speak import RECORDINGS, Speaker, voices, write_wav
from vita_jax.storage import Scratch, place
from vita_jax.training.experiment import VOICES, data_folder

# Held-out texts in the assistant's voice, in the benchmark's folder.
TEXTS = "speech_out"
# Answers that are spoken, per kind of question.
ANSWERS_PER_KIND = 16
# Sounds that a result keeps for people to listen to.
KEPT_ANSWERS = 6
EVALUATION, AUDIO = "evaluation", "audio"  # folders of the run
NEEDS_DECODERS = ("voice_decoders", "voice_answers")
NEEDS_CODEC = ("voice_copy", *NEEDS_DECODERS)


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """A text with its recording: `text` as it is said, `kind` "answer" or "sentence"."""

    id: str
    kind: str
    language: str
    text: str
    audio: Path


def read_texts(folder: Path) -> list[HeldOutText]:
    """The held-out texts in a folder with a manifest. Raises UserError if it cannot be read."""
    pairs = read_manifest(folder)
    entries = [json.loads(line) for line in (folder / MANIFEST).read_text("utf-8-sig").splitlines() if line.strip()]
    return [
        HeldOutText(
            str(entry.get("id", number)),
            str(entry.get("kind", "sentence")),
            str(entry.get("language", language_of(pair.text))),
            pair.text,
            pair.audio,
        )
        for number, (pair, entry) in enumerate(zip(pairs, entries, strict=True))
    ]


def why_no_voice(subject: Subject, name: str) -> str | None:
    """Why the voice of that name cannot be measured; None if it can. The recogniser is another question."""
    model = subject.config.model
    if name in NEEDS_CODEC and model.codec is None:
        return "the model has no codec"
    if name in NEEDS_DECODERS and model.speech is None:
        return "the model has no speech decoders"
    places = (place(subject.config.run_dir) / VOICES, data_folder(subject.config) / RECORDINGS)
    if name in NEEDS_DECODERS and not any(path.is_file() for path in places):
        return f"there is neither {places[0]} nor {places[1]} to take a voice from"
    if name != "voice_answers" and not (subject.root / TEXTS / MANIFEST).is_file():
        return f"the benchmark has no recordings of the assistant ({TEXTS})"
    return None


Lines = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Said:
    """One thing that was said, and what was heard; without a wave where it could not be said."""

    outcome: Outcome
    text: str
    heard: str
    wave: np.ndarray | None
    item: Item | None = None


# ---- the four voices ------------------------------------------------------------------------------------------------


def voice_figures(
    subject: Subject,
    groups: Sequence[Group],
    recogniser: Recogniser,
    answered: Sequence[tuple[Item, str]],
) -> tuple[dict[str, dict[str, Any]], Lines, list[dict[str, Any]]]:
    """How much of each voice is read back without an error.

    Args:
      groups: of the measure "voice".
      recogniser: hears whole clips.
      answered: spoken questions with the model's answers, for "voice_answers".

    Returns:
      Figures by group, with "character_error_rate" and for copies "mel_distance"; a voice that had nothing to say has
      none. Their lines. And the sounds that were kept: {"title", "text", "heard", "file" (below
      `<run_dir>/evaluation`), "item" (id of the question, or None), "question" (its file, or None)}.
    """
    names = [group.name for group in groups]
    by_name = {group.name: group for group in groups}
    rate = _sampling_rate(subject)
    speakers = _speakers(subject) if any(name in NEEDS_DECODERS for name in names) else {}
    figures: dict[str, dict[str, Any]] = {}
    said: dict[str, list[_Said]] = {}
    if any(name != "voice_answers" for name in names):
        texts = _limited(read_texts(subject.root / TEXTS), subject.limit)
        recordings = [read_wave(text.audio, rate) for text in texts]
        for name in names:
            more: dict[str, float] = {}
            if name == "voice_answers":
                continue
            if name == "voice_synthesizer":
                waves = recordings
            elif name == "voice_copy":
                waves = copy_waves(subject.config.model, subject.params, recordings)
                training = subject.config.model.codec_training.losses
                more["mel_distance"] = float(np.mean(mel_distances(recordings, waves, rate, training)))
            else:
                waves = speak_texts(speakers, subject, [(text.text, text.language) for text in texts])
            said[name] = _read_back(texts, waves, recogniser, rate)
            figures[name] = _figures(by_name[name], said[name], **more)
    if "voice_answers" in names:
        said["voice_answers"] = _answers(subject, speakers, recogniser, answered, rate)
        if said["voice_answers"]:
            figures["voice_answers"] = _figures(by_name["voice_answers"], said["voice_answers"])
    lines = [line for name in said for line in outcome_lines(by_name[name], [one.outcome for one in said[name]])]
    return figures, lines, _keep_sounds(subject, said, rate) if subject.keep_sounds else []


def _sampling_rate(subject: Subject) -> int:
    """Of the recordings: the codec's."""
    codec = subject.config.model.codec
    return subject.config.audio.sample_rate if codec is None else codec.sampling_rate


def _limited(texts: Sequence[HeldOutText], limit: int | None) -> list[HeldOutText]:
    """At most `limit` texts of every kind, evenly over languages."""
    if limit is None:
        return list(texts)
    items = [Item(str(i), "", text.kind, text.language, text.text, text.text) for i, text in enumerate(texts)]
    return [texts[int(item.id)] for item in stratified(items, limit)]


def _speakers(subject: Subject) -> dict[str, Speaker]:
    found = voices(subject.config, subject.params)
    return {name: Speaker(subject.config.model, subject.params, voice) for name, voice in found.items()}


def speak_texts(
    speakers: Mapping[str, Speaker], subject: Subject, texts: Sequence[tuple[str, str]]
) -> list[np.ndarray]:
    """(text, language) -> (n,) samples, each in the voice of its language; another voice where there is none for it."""
    fallback = next(iter(speakers))
    waves: list[np.ndarray] = [np.zeros((0,), np.float32)] * len(texts)
    for name, speaker in speakers.items():
        mine = [i for i, (_, language) in enumerate(texts) if name == (language if language in speakers else fallback)]
        for i, wave in zip(mine, speaker.speak_many([texts[i][0] for i in mine], subject.tokenizer), strict=True):
            waves[i] = wave
    return waves


def _outcome(entry: HeldOutText | Item, text: str, heard: str, said: bool = True) -> Outcome:
    errors = character_errors(heard, text)
    right = said and normalise_transcript(heard) == normalise_transcript(text)
    digits, asked = (entry.num_digits, entry.question) if isinstance(entry, Item) else (0, "")
    return Outcome(entry.id, entry.kind, entry.language, right, digits, errors, asked, text=heard, truth=text)


def _read_back(
    texts: Sequence[HeldOutText], waves: Sequence[np.ndarray], recogniser: Recogniser, rate: int
) -> list[_Said]:
    heard = recogniser.hear(waves, rate)
    return [
        _Said(_outcome(text, text.text, read, len(wave) > 0), text.text, read, wave)
        for text, read, wave in zip(texts, heard, waves, strict=True)
    ]


def _answers(
    subject: Subject,
    speakers: Mapping[str, Speaker],
    recogniser: Recogniser,
    answered: Sequence[tuple[Item, str]],
    rate: int,
) -> list[_Said]:
    """The model's own answers aloud; one that cannot be put into words is said wrong."""
    template = subject.context.template
    given = {item.id: answer for item, answer in answered if not is_refusal(answer, template)}
    given = {name: text for name, answer in given.items() if (text := normalise(answer, template))}
    items = stratified([item for item, _ in answered if item.id in given], ANSWERS_PER_KIND)
    texts: list[str | None] = []
    for item in items:
        try:
            texts.append(answer_aloud(given[item.id], item.language))
        except UserError:  # a number beyond those that are ever said
            texts.append(None)
    spoken = [(text or "", item.language) for text, item in zip(texts, items, strict=True)]
    waves = speak_texts(speakers, subject, spoken)
    heard = recogniser.hear(waves, rate)
    return [
        _Said(_outcome(item, text or "", read, bool(text) and len(wave) > 0), text or given[item.id], read, wave, item)
        for item, text, read, wave in zip(items, texts, heard, waves, strict=True)
    ]


def _figures(group: Group, said: Sequence[_Said], **more: float) -> dict[str, Any]:
    wrong, characters = (sum(entry.outcome.errors[part] for entry in said) for part in (0, 1))
    rate = wrong / max(characters, 1)
    return group_figures(group, [entry.outcome for entry in said], character_error_rate=rate, **more)


# ---- sounds to listen to --------------------------------------------------------------------------------------------


def _keep_sounds(subject: Subject, said: Mapping[str, Sequence[_Said]], rate: int) -> list[dict[str, Any]]:
    """Writes some of the waves to the run's folder; returns what they are."""
    scratch = Scratch(place(subject.config.run_dir) / EVALUATION / AUDIO)
    folder = scratch.folder
    folder.mkdir(parents=True, exist_ok=True)
    sounds: list[dict[str, Any]] = []

    def keep(name: str, title: str, entry: _Said) -> None:
        write_wav(folder / f"{name}.wav", entry.wave, rate)
        question = None
        if entry.item is not None and entry.item.audio is not None:
            question = f"{name}_question.wav"
            asked = read_audio(subject.root / entry.item.audio, subject.config.audio)
            write_wav(folder / question, asked, subject.config.audio.sample_rate)
        sounds.append({
            "title": title,
            "text": entry.text,
            "heard": entry.heard,
            "file": f"{AUDIO}/{name}.wav",
            "item": None if entry.item is None else entry.item.id,
            "question": None if question is None else f"{AUDIO}/{question}",
        })  # fmt: skip

    for number, entry in enumerate(_varied(said.get("voice_answers", ()), KEPT_ANSWERS)):
        keep(f"answer_{number}", "answer to a spoken question", entry)
    titles = {"voice_synthesizer": "recording", "voice_copy": "codec copy", "voice_decoders": "spoken from the text"}
    spoken = {name: entries for name, entries in said.items() if name in titles}
    for number in _one_per_language(next(iter(spoken.values()), ())):
        for name, entries in spoken.items():
            if entries[number].wave is not None and len(entries[number].wave):
                keep(f"text_{number}_{name.removeprefix('voice_')}", titles[name], entries[number])
    scratch.close()
    return sounds


def _varied(said: Iterable[_Said], count: int) -> list[_Said]:
    """Some that could be said: kinds in turn, the languages alternating."""
    waiting = [entry for entry in said if entry.wave is not None and len(entry.wave)]
    languages = sorted({entry.outcome.language for entry in waiting})
    kinds: dict[str, int] = {}
    chosen: list[_Said] = []
    while waiting and len(chosen) < count:
        wanted = languages[len(chosen) % len(languages)]
        best = min(waiting, key=lambda entry: (kinds.get(entry.outcome.kind, 0), entry.outcome.language != wanted))
        waiting.remove(best)
        kinds[best.outcome.kind] = kinds.get(best.outcome.kind, 0) + 1
        chosen.append(best)
    return chosen


def _one_per_language(said: Sequence[_Said]) -> list[int]:
    """The place of the first text of every language."""
    first: dict[str, int] = {}
    for number, entry in enumerate(said):
        first.setdefault(entry.outcome.language, number)
    return list(first.values())
