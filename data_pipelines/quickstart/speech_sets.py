"""What is to be heard in the quickstart's speech sets, and the records and manifests about it.

Everything is planned in one process from one seed; `speech.py` has the clips made in parallel and the rest written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.quickstart.questions import LANGUAGES, Question, ask, phrasings
from data_pipelines.quickstart.scans import ScanSplit
from data_pipelines.quickstart.scenes import draw_sheet, sample_scene
from data_pipelines.quickstart.sentences import (
    REFUSAL,
    TRANSCRIBE,
    Split,
    distinct_sentences,
    draw_statement,
    draw_words,
    split_of,
)
from data_pipelines.speech.clips import SPEECH, Clip
from data_pipelines.speech.noises import BABBLE_VOICES, SYNTHETIC_KINDS
from data_pipelines.speech.voices import Voice, assistant_voice, draw_delivery, training_voices, voices_of
from vita_jax.data.spoken_words import answer_aloud, heard
from vita_jax.errors import UserError

ROUNDS = 4  # questions about one picture
SPOKEN_KINDS = ("count", "kth", "kth", "largest", "sum", "sum", "read", "ink", "paper", "caption")
SPOKEN_SHARE = 0.5
AUGMENTED_SHARE = 0.15
# Of the transcribed clips. The recogniser is to read back what is asked and answered, however short, and to listen
# rather than to guess.
QUESTIONS_SHARE = 0.1
ANSWERS_SHARE = 0.15
WORDS_SHARE = 0.3
# What a sound that is not for the model is, among the negatives.
NEGATIVE_MIX: Mapping[str, float] = MappingProxyType(
    {SPEECH: 0.5, "second_speaker": 0.12, "babble": 0.13, "synthetic": 0.25}
)
NEGATIVE_SECONDS = (0.6, 2.5)
NEGATIVE_LONGEST = 3.6  # with silence around it still as long as the longest sentence
PICTURE_SHARE = 0.4  # of the negatives
ASSISTANT_ANSWERS_SHARE = 0.5  # of the assistant's texts; the others are sentences
SHORT_ANSWER = 2  # spoken units; answers up to that length are all trained, there are too few to hold any out

Progress = Callable[[str], None]


@dataclass(frozen=True)
class SpeechCounts:
    """How much to make.

    Attributes:
      asr: transcribed clips, half in each language.
      question_clips: recordings of questions, which the records of `spoken` share.
      spoken, negatives: records.
      speech_out: texts in the assistant's voice, half in each language.
      benchmark_spoken: questions of each kind, unseen voices; a multiple of 8 has all digit counts in both languages.
      benchmark_noise, benchmark_transcribe: items of each kind.
      benchmark_speech_out: held-out texts in the assistant's voice.
      processes: that make clips at the same time; does not change them.
    """

    asr: int = 16000
    question_clips: int = 1200
    spoken: int = 1500
    negatives: int = 1200
    speech_out: int = 5000
    benchmark_spoken: int = 48
    benchmark_noise: int = 40
    benchmark_transcribe: int = 80
    benchmark_speech_out: int = 160
    processes: int = 2


SMOKE = SpeechCounts(48, 72, 16, 16, 24, 8, 4, 6, 8, processes=1)  # two processes start longer than one works


@dataclass
class Folder:
    """The files of one set while they are planned: the clips to make, and what will be written about them."""

    path: Path
    seed: tuple[int, ...]
    rng: np.random.Generator = field(init=False)
    clips: list[Clip] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    manifest: list[dict[str, Any]] = field(default_factory=list)
    pictures: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        shutil.rmtree(self.path, ignore_errors=True)
        (self.path / "media").mkdir(parents=True)

    def clip(self, kind: str = SPEECH, **how: Any) -> str:
        """Plans a recording; returns its path below the folder. `how` as the fields of `Clip`."""
        name = f"media/{len(self.clips):06d}.wav"
        self.clips.append(Clip(str(self.path / name), (*self.seed, len(self.clips)), kind, **how))
        return name

    def picture(self, scene: Any, scans: ScanSplit) -> str:
        """Draws a sheet; returns its path below the folder."""
        name = f"media/{self.pictures:06d}.png"
        self.pictures += 1
        pixels, _ = draw_sheet(scene, scans, self.rng)
        Image.fromarray(pixels).save(self.path / name, compress_level=1)
        return name

    def write(self, seconds: dict[str, float]) -> None:
        """Writes records.json and manifest.jsonl, those of them that have content, with durations in seconds."""
        if self.records:
            (self.path / "records.json").write_text(json.dumps(self.records, ensure_ascii=False), encoding="utf-8")
        if self.manifest:
            for entry in self.manifest:
                entry["duration"] = round(seconds[str(self.path / entry["audio"])], 4)
            write_lines(self.path / "manifest.jsonl", self.manifest)


def write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")


def turns(*texts: str) -> list[dict[str, str]]:
    """Questions and answers in turn, as the conversations of a record."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def _choice(options: Any, rng: np.random.Generator) -> Any:
    return options[rng.integers(len(options))]


# ---- training sets ---------------------------------------------------------------------------------------------------


def _training_clip(folder: Folder, text: str, language: str, voices: tuple[Voice, ...]) -> str:
    """A recording for training: `AUGMENTED_SHARE` of them in rooms, most of those with something behind the voice."""
    rng = folder.rng
    parts = [(text, draw_delivery(voices, rng))]
    augmented = bool(rng.random() < AUGMENTED_SHARE)
    background = None
    if augmented:
        background = _choice((None, "second_speaker", *SYNTHETIC_KINDS), rng)
        if background == "second_speaker":
            parts.append((draw_statement(language, "train", rng), draw_delivery(voices, rng)))
    return folder.clip(parts=tuple(parts), augmented=augmented, background=background)


def _transcribed(language: str, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """What is said, how it is transcribed, and its kind: "sentence", all different, "words", "answer" or "question"."""
    questions, answers, words = (round(count * share) for share in (QUESTIONS_SHARE, ANSWERS_SHARE, WORDS_SHARE))
    sentences = distinct_sentences(language, "train", count - questions - answers - words, rng)
    said = [(text, text, "sentence") for text in sentences]
    said += [(text, text, "words") for text in (draw_words(language, "train", rng) for _ in range(words))]
    while len(said) < count - questions:
        question = _questions(sample_scene(rng), rng, 1)[0]
        aloud = answer_aloud(question.answer, language)
        if question.language == language and answer_split(aloud, language) == "train":
            said.append((aloud, aloud, "answer"))
    asked = rng.choice(phrasings(SPOKEN_KINDS, language), questions).tolist()
    said += [(text, heard(text), "question") for text in asked]
    return [said[index] for index in rng.permutation(count)]


def plan_asr(folder: Folder, count: int) -> None:
    """Transcribed clips, as a manifest and as records that ask for the transcript in writing.

    Words in no order are for the recogniser alone, which they teach to hear; the language model, which learns its
    speech in minutes, gets further with sentences.
    """
    for language in LANGUAGES:
        for spoken, text, kind in _transcribed(language, count // 2, folder.rng):
            audio = _training_clip(folder, spoken, language, training_voices(language))
            name = f"asr-{len(folder.manifest)}"
            folder.manifest.append({"id": name, "audio": audio, "text": text, "kind": kind, "language": language})
            if kind == "words":
                continue
            request = f"<audio>\n{_choice(TRANSCRIBE[language], folder.rng)}"
            folder.records.append({"id": name, "audio": audio, "conversations": turns(request, text)})


def _question_clips(folder: Folder, count: int) -> dict[str, list[str]]:
    """Question in writing -> its recordings; all questions equally often."""
    asked = [(text, language) for language in LANGUAGES for text in phrasings(SPOKEN_KINDS, language)]
    if count < len(asked):
        raise UserError(f"question_clips={count}, but there are {len(asked)} questions to speak; give at least as many")
    clips: dict[str, list[str]] = {text: [] for text, _ in asked}
    for index in range(count):
        text, language = asked[index % len(asked)]
        clips[text].append(_training_clip(folder, text, language, training_voices(language)))
    return clips


def _questions(scene: Any, rng: np.random.Generator, count: int) -> list[Question]:
    kinds = rng.permutation(SPOKEN_KINDS)[:count]
    return [ask(scene, str(kind), _choice(LANGUAGES, rng), rng) for kind in kinds]


def plan_spoken(folder: Folder, scans: ScanSplit, count: int, question_clips: int) -> None:
    """Pictures with `ROUNDS` questions each, `SPOKEN_SHARE` of them spoken and at least one."""
    rng, clips = folder.rng, _question_clips(folder, question_clips)
    for index in range(count):
        scene = sample_scene(rng)
        questions = _questions(scene, rng, ROUNDS)
        aloud = rng.random(ROUNDS) < SPOKEN_SHARE
        aloud[rng.integers(ROUNDS)] |= not aloud.any()
        texts, audio = [], []
        for question, spoken in zip(questions, aloud, strict=True):
            if spoken:
                audio.append(_choice(clips[question.text], rng))
            texts += ["<audio>" if spoken else question.text, question.answer]
        texts[0] = "<image>\n" + texts[0]
        record = {"id": f"spoken-{index}", "image": folder.picture(scene, scans), "audio": audio}
        folder.records.append({**record, "conversations": turns(*texts)})


def noise_clip(folder: Folder, kind: str, language: str, split: Split, varied: bool) -> tuple[str, str]:
    """Plans a sound that is not for the model, by voices and of statements of one split.

    Args:
      kind: "speech" (a statement), "babble", "second_speaker", or a kind of `synthetic_noise`.

    Returns:
      Path below the folder, and what is said in it ("" for babble and sounds without words).
    """
    rng = folder.rng
    voices = voices_of(language, split)
    number = {SPEECH: 1, "second_speaker": 2, "babble": int(rng.integers(*BABBLE_VOICES))}.get(kind, 0)
    parts = tuple((draw_statement(language, split, rng), draw_delivery(voices, rng)) for _ in range(number))
    audio = folder.clip(kind, parts=parts, seconds=float(rng.uniform(*NEGATIVE_SECONDS)), varied=varied,
                        longest=NEGATIVE_LONGEST)  # fmt: skip
    return audio, "" if kind == "babble" else " / ".join(text for text, _ in parts)


def plan_negatives(folder: Folder, scans: ScanSplit, count: int, mix: Mapping[str, float] = NEGATIVE_MIX) -> None:
    """Sounds that are not for the model, alone or after a picture; `inserted_id` is the index of the refusal.

    Half of those with a picture come after a question that is answered.

    Args:
      mix: kind -> share, of 1 in all: kinds of `noise_clip`, and "synthetic" for any of `SYNTHETIC_KINDS`.
    """
    rng = folder.rng
    kinds, shares = list(mix), list(mix.values())
    for index in range(count):
        kind = str(rng.choice(kinds, p=shares))
        if kind == "synthetic":
            kind = str(_choice(SYNTHETIC_KINDS, rng))
        language = str(_choice(LANGUAGES, rng))
        audio, _ = noise_clip(folder, kind, language, "train", varied=True)
        # Sounds without words belong to no language.
        refusal = REFUSAL["en" if kind in SYNTHETIC_KINDS else language]
        texts, media = ["<audio>", refusal], {}
        if rng.random() < PICTURE_SHARE:
            scene = sample_scene(rng)
            media["image"] = folder.picture(scene, scans)
            if rng.random() < 0.5:
                question = _questions(scene, rng, 1)[0]
                texts = [question.text, question.answer, *texts]
            texts[0] = "<image>\n" + texts[0]
        record = {"id": f"negatives-{index}", **media, "audio": audio, "conversations": turns(*texts)}
        folder.records.append({**record, "inserted_id": len(texts) - 1})


# ---- the assistant's voice -------------------------------------------------------------------------------------------


def answer_split(aloud: str, language: str) -> Split:
    """The split of a spoken answer: short ones ("seven", "红色") are trained, the others go by their text."""
    length = len(aloud.split()) if language == "en" else len(aloud)
    return "train" if length <= SHORT_ANSWER else split_of(aloud)


def assistant_texts(language: str, split: Split, count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """What the assistant says: different texts, `ASSISTANT_ANSWERS_SHARE` of them answers to questions about pictures.

    Returns:
      {"text": as it is said, "written": as the language model writes it, "language", "kind": "answer" or "sentence"};
      an answer also has its "question".
    """
    entries: dict[str, dict[str, str]] = {}
    answers = round(count * ASSISTANT_ANSWERS_SHARE)
    while len(entries) < answers:
        question = _questions(sample_scene(rng), rng, 1)[0]
        if question.language != language:
            continue
        aloud = answer_aloud(question.answer, language)
        if question.answer not in entries and answer_split(aloud, language) == split:
            entries[question.answer] = {"text": aloud, "written": question.answer, "kind": "answer"} | {
                "language": language, "question": question.text
            }  # fmt: skip
    for text in distinct_sentences(language, split, count - answers, rng):
        entries[text] = {"text": text, "written": text, "kind": "sentence", "language": language}
    return list(entries.values())


def plan_speech_out(folder: Folder, split: Split, count: int) -> None:
    """Text-speech pairs in the assistant's voice of each language, always equally loud."""
    for language in LANGUAGES:
        for entry in assistant_texts(language, split, count // 2, folder.rng):
            delivery = draw_delivery((assistant_voice(language),), folder.rng)
            audio = folder.clip(parts=((entry["text"], delivery),), varied=False)
            folder.manifest.append({"id": f"speech_out-{len(folder.manifest)}", "audio": audio, **entry})
