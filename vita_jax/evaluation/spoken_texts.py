"""Texts of a folder that a model says and that are read back, for models without data of a run.

A folder has `manifest.jsonl`: {"text", "language": "en" or "zh", "id", "audio"} a line, all but `text` may be missing.
The voice is the run's (`speak.voices`), else that of the first recording (`audio`) in each language. What is said is
read back by the run's recogniser; a model without one writes down what it hears itself, which is kinder to it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.ctc_vocabulary import normalise_transcript
from vita_jax.data.manifests import MANIFEST
from vita_jax.data.speech_pairs import read_wave
from vita_jax.data.spoken_words import check_language, language_of
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import ID, Question, objects
from vita_jax.evaluation.answering import Progress
from vita_jax.evaluation.asking import AskOptions, KeptAnswers, ask_questions, mark
from vita_jax.evaluation.question_scores import figures, score_answer
from vita_jax.evaluation.recognition import SHORTEST, load_recogniser, why_no_recogniser
from vita_jax.evaluation.results import align, percent, provenance
from vita_jax.evaluation.sets import WRITE_DOWN_ZH
from vita_jax.evaluation.subject import Subject
from vita_jax.evaluation.voice import speak_texts
from vita_jax.evaluation.waves import real_time_factors
from vita_jax.inference.speak import RECORDINGS, Speaker, voice_of, voices, write_wav
from vita_jax.storage import place
from vita_jax.training.experiment import VOICES, data_folder

NAME = "spoken_texts"
WRITE_DOWN = {"en": "Write down what you hear.", "zh": WRITE_DOWN_ZH}
# Texts whose sound is written before the next are spoken.
AT_ONCE = 32
WAV_HEADER_BYTES = 44  # a file of no more has no sample

Line = dict[str, Any]


def read_texts(folder: Path) -> tuple[list[Question], dict[str, Path]]:
    """The texts of a folder, and the first recording of each language.

    Returns:
      Questions whose truth is the text and whose category its language, without files; {language: recording}.

    Raises:
      UserError: naming the line: no text with a letter or digit in it, another language, an id that was there before.
    """
    texts, recordings, names = [], {}, set()
    for number, (where, entry) in enumerate(objects(folder / MANIFEST)):
        text, name = entry.get("text"), str(entry.get("id", number))
        if not isinstance(text, str) or not normalise_transcript(text):
            raise UserError(f"{where}: text={text!r} must be a text with a letter or digit in it")
        if name in names:
            raise UserError(f"{where}: id {name} is there twice")
        names.add(name)
        language = str(entry.get("language", language_of(text)))
        check_language(language)
        texts.append(Question(name, WRITE_DOWN[language], (), (text,), (), language))
        if entry.get("audio"):
            recordings.setdefault(language, folder / str(entry["audio"]))
    return texts, recordings


def measure_spoken_texts(
    subject: Subject,
    folder: Path,
    sounds: Path,
    kept: KeptAnswers,
    options: AskOptions,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Line]]:
    """Says every text, reads it back, and takes the time.

    Args:
      subject: a model with speech decoders and a codec.
      folder: see the top of this file.
      sounds: gets what is said as WAV files; a text whose file is there is not said again.
      kept: gets what the model hears, where it reads back itself.
      options: of that; its identity also says whose voice a file has.
      limit: only the first so many texts.
      progress: called with (said, total).

    Returns:
      {"title", "model", "num_items", the figures of `question_scores.figures` ("cer"), "exact" (share without any
      error), "heard_by": "recogniser" or "model", "voice", "real_time" (see `waves`), "seconds", and `provenance`}; and
      a line for every text: {"question_id", "prompt" (the text), "text" (what was heard), "file", and its score}.

    Raises:
      UserError: the model does not speak, has no voice, or nothing reads back; or a damaged manifest.
    """
    started, config = time.monotonic(), subject.config
    if config.model.codec is None or config.model.speech is None:
        raise UserError("texts are said by speech decoders and a codec; this model lacks them")
    by_recogniser = why_no_recogniser(config) is None
    if not by_recogniser and config.model.audio is None:
        raise UserError("this model does not hear and has no recogniser, so nothing reads back what it says")
    texts, recordings = read_texts(folder)
    texts = texts[:limit]
    codes, whose = _voices(subject, recordings, folder)
    files = _say(subject, codes, texts, sounds, options.identity, progress)
    said = [place for place, file in enumerate(files) if file.stat().st_size > WAV_HEADER_BYTES]
    heard = [""] * len(texts)  # of what is silent nothing is heard
    if by_recogniser:
        waves = [read_wave(files[place], config.model.codec.sampling_rate) for place in said]
        recogniser = load_recogniser(config, subject.params).in_chunks(-1, -1)
        answers = recogniser.hear(waves, config.model.codec.sampling_rate)
    else:
        asked = [Question(texts[place].id, texts[place].question, (("audio", files[place].name),)) for place in said]
        answers = [line["text"] for line in ask_questions(subject, asked, sounds, kept, options)]
    for where, answer in zip(said, answers, strict=True):
        heard[where] = answer
    scores = [score_answer(text, answer, None, "cer") for text, answer in zip(texts, heard, strict=True)]
    lines = [
        {ID: text.id, "prompt": text.truths[0], "text": answer, "file": file.name, "model_id": kept.model_name, **score}
        for text, answer, file, score in zip(texts, heard, files, scores, strict=True)
    ]
    result = {
        "title": "texts said and read back (CER)",
        "model": kept.model_name,
        "num_items": len(texts),
        **figures("cer", texts, scores),
        "exact": sum(score["score"] == 0 for score in scores) / len(scores),
        "heard_by": "recogniser" if by_recogniser else "model",
        "voice": whose,
        "real_time": real_time_factors(config.model, subject.params),
        "seconds": time.monotonic() - started,
        **provenance(config),
    }
    return result, lines


def _voices(subject: Subject, recordings: dict[str, Path], folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """The codes of each voice by its language, and where they are from."""
    config, params = subject.config, subject.params
    own = (place(config.run_dir) / VOICES, data_folder(config) / RECORDINGS)
    known = next((str(path) for path in own if path.is_file()), None)
    if known is None and not recordings:
        raise UserError(f"the model's voice is unknown: give recordings (audio) in {folder / MANIFEST}, or {own[0]}")
    if known is not None:
        return voices(config, params), known
    rate = config.model.codec.sampling_rate
    found = {name: voice_of(config.model, params, read_wave(path, rate)) for name, path in recordings.items()}
    return found, f"recordings of {folder}"


def _say(
    subject: Subject,
    codes: dict[str, np.ndarray],
    texts: Sequence[Question],
    sounds: Path,
    identity: str,
    progress: Progress | None,
) -> list[Path]:
    """The WAV file of every text; its name stands for the text, the model and the voices."""
    rate = subject.config.model.codec.sampling_rate
    whose = [identity, {name: np.asarray(code).tolist() for name, code in sorted(codes.items())}]
    speakers = {name: Speaker(subject.config.model, subject.params, code) for name, code in codes.items()}
    files = [sounds / f"{mark([text.truths[0], text.category, whose])}.wav" for text in texts]
    left = [place for place, file in enumerate(files) if not file.is_file()]
    sounds.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(left), AT_ONCE):
        if progress is not None:
            progress(len(texts) - len(left) + start, len(texts))
        part = left[start : start + AT_ONCE]
        waves = speak_texts(speakers, subject, [(texts[place].truths[0], texts[place].category) for place in part])
        for where, wave in zip(part, waves, strict=True):
            # What hears needs a few frames; silence behind a short sound says nothing.
            padded = np.pad(wave, (0, max(0, int(SHORTEST * rate) - len(wave)))) if len(wave) else wave
            partial = files[where].with_suffix(".partial")
            write_wav(partial, padded, rate)
            partial.replace(files[where])
    if progress is not None:
        progress(len(texts), len(texts))
    return files


def format_spoken_texts(result: dict[str, Any]) -> str:
    """The result as text."""
    reach = f"{percent(result['low'])} .. {percent(result['high'])}"
    lines = [
        f"{result['num_items']} texts in {result['seconds']:.0f} s, read back by the {result['heard_by']}",
        "",
        f"character error rate {percent(result['value'])} (95 % interval {reach})",
        f"without any error: {percent(result['exact'])}",
        "",
    ]
    rows = [(name, percent(part["value"]), str(part["n"])) for name, part in result["by_category"].items()]
    lines += [*align([("language", "misread", "n"), *rows]), ""]
    told = ", ".join(f"{name} {factor:.3f}" for name, factor in result["real_time"].items())
    return "\n".join([*lines, f"seconds of computing per second of sound: {told}"])
