"""Clips: what is to be heard, as data, and the WAV files made of it by several processes.

A `Clip` holds everything a recording depends on, so the bytes of a file do not depend on how many processes write it or
in which order.
"""

from __future__ import annotations

import multiprocessing
import wave
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from data_pipelines.speech.noises import (
    SPEECH_KINDS,
    augmented,
    babble,
    second_speaker,
    synthetic_noise,
    with_loudness,
)
from data_pipelines.speech.synthesizer import SAMPLE_RATE, SpeechSynthesizer, Synthesizer
from data_pipelines.speech.voices import Delivery, say
from vita_jax.errors import UserError

SPEECH = "speech"
# Root mean square of clips that are not varied.
LEVEL = 0.07
# Seconds of near silence around what is heard.
PAD = 0.08
PADS = (0.05, 0.25)
# Of every recording: no microphone is entirely silent.
NOISE_FLOOR = 2e-4
FADE = 0.05
REPORTS = 4  # progress lines

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Clip:
    """One recording to make.

    Attributes:
      path: of the WAV file.
      seed: of everything that is drawn while it is made.
      kind: "speech" (the first of `parts`), "babble" or "second_speaker" (made of all `parts`), or a kind of
        `synthetic_noise`.
      parts: what is said, by whom and how.
      seconds: how long, for babble and synthetic noise.
      varied: loudness and the silence around it are drawn, as in training; otherwise they are always the same.
      augmented: the speech is heard in a room, through a microphone, before `background`.
      background: kind of a synthetic noise behind the speech, or "second_speaker" for the second of `parts`.
      longest: seconds after which what is heard breaks off, as when somebody leaves; 0 = never.
    """

    path: str
    seed: tuple[int, ...]
    kind: str
    parts: tuple[tuple[str, Delivery], ...] = ()
    seconds: float = 0.0
    varied: bool = True
    augmented: bool = False
    background: str | None = None
    longest: float = 0.0


def write_wav(path: str | Path, waveform: np.ndarray) -> None:
    """Writes (n,) float32 in -1..1 at 16 kHz as WAV, mono, 16 bit."""
    samples = np.clip(np.rint(np.asarray(waveform, np.float64) * 32768), -32768, 32767).astype("<i2")
    with closing(wave.open(str(path), "wb")) as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())


def read_wav(path: str | Path) -> np.ndarray:
    """Reads a file of `write_wav`; (n,) float32 in -1..1. Raises UserError for another kind of WAV."""
    with closing(wave.open(str(path), "rb")) as file:
        found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if found != (1, 2, SAMPLE_RATE):
            raise UserError(
                f"{path} has {found[0]} channels of {8 * found[1]} bit at {found[2]} Hz; "
                f"expected 1 channel of 16 bit at {SAMPLE_RATE} Hz"
            )
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def waveform_of(clip: Clip, synthesizer: SpeechSynthesizer) -> np.ndarray:
    """What the recording holds: (n,) float32 in -1..1 at 16 kHz.

    Raises:
      UserError: an unknown kind, too few parts, or a synthesiser that is not at 16 kHz.
    """
    rng = np.random.default_rng(clip.seed)
    needed = 2 if clip.kind in SPEECH_KINDS or clip.background == "second_speaker" else clip.kind == SPEECH
    if len(clip.parts) < needed:
        raise UserError(f"{clip.path}: {clip.kind!r} needs {int(needed)} voices, got {len(clip.parts)}")
    said = []
    for text, delivery in clip.parts:
        waveform, rate = say(synthesizer, text, delivery)
        if rate != SAMPLE_RATE:
            raise UserError(f"the synthesiser speaks at {rate} Hz; clips are made at {SAMPLE_RATE} Hz, resample there")
        said.append(waveform)
    if clip.kind == SPEECH:
        content = _speech(clip, said, rng)
    elif clip.kind == "babble":
        content = babble(said, clip.seconds, rng)
    elif clip.kind == "second_speaker":
        content = second_speaker(said[0], said[1], rng)
    else:
        content = synthetic_noise(clip.kind, clip.seconds, rng)
    if clip.longest and len(content) > round(clip.longest * SAMPLE_RATE):
        content = content[: round(clip.longest * SAMPLE_RATE)] * fade_out(round(clip.longest * SAMPLE_RATE))
    return _recorded(content, clip.varied, rng)


def fade_out(size: int) -> np.ndarray:
    """(n,) ones that fall to 0 in the last `FADE` seconds."""
    left = np.arange(size, 0, -1) / (FADE * SAMPLE_RATE)
    return np.minimum(left, 1.0).astype(np.float32)


def _speech(clip: Clip, said: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    if not clip.augmented:
        return said[0]
    background = None
    if clip.background == "second_speaker":
        background = said[1]
    elif clip.background is not None:
        background = synthetic_noise(clip.background, len(said[0]) / SAMPLE_RATE, rng)
    return augmented(said[0], rng, background)


def _recorded(content: np.ndarray, varied: bool, rng: np.random.Generator) -> np.ndarray:
    level = 10 ** rng.uniform(-1.6, -0.9) if varied else LEVEL
    before, after = rng.uniform(*PADS, 2) if varied else (PAD, PAD)
    padded = np.pad(with_loudness(content, level), (round(before * SAMPLE_RATE), round(after * SAMPLE_RATE)))
    return (padded + NOISE_FLOOR * rng.standard_normal(len(padded))).astype(np.float32)


def render(clip: Clip, synthesizer: SpeechSynthesizer) -> float:
    """Writes the file of a clip; returns its duration in seconds."""
    waveform = waveform_of(clip, synthesizer)
    write_wav(clip.path, waveform)
    return len(waveform) / SAMPLE_RATE


def _start_worker() -> None:
    """One thread a process: matrices are small, and other processes work too."""
    threadpool_limits(1)


def _work(clip: Clip) -> float:
    return render(clip, Synthesizer())


def render_all(clips: Sequence[Clip], progress: Progress, *, processes: int = 2) -> dict[str, float]:
    """Writes all clips.

    Args:
      clips: with different paths, in folders that exist.
      progress: gets a line after each quarter.
      processes: how many work at the same time; 1 works in this process. The files are the same for any number.

    Returns:
      path -> seconds.

    Raises:
      UserError: as `waveform_of`; two clips of one path; `processes` below 1.
    """
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1")
    if len({clip.path for clip in clips}) != len(clips):
        raise UserError("two clips have the same path; give each a file of its own")
    Synthesizer()  # if the wheel is missing, say so here and not in every process
    seconds: dict[str, float] = {}
    report = max(1, -(-len(clips) // REPORTS))

    def collect(durations: Iterable[float]) -> dict[str, float]:
        for number, (clip, duration) in enumerate(zip(clips, durations, strict=True), start=1):
            seconds[clip.path] = duration
            if number % report == 0 or number == len(clips):
                progress(f"speech: {number} of {len(clips)} clips, {sum(seconds.values()) / 60:.1f} minutes of audio")
        return seconds

    if processes == 1:
        with threadpool_limits(1):
            return collect(map(_work, clips))
    # Not forked: the parent may run threads that a forked child would inherit in any state.
    with multiprocessing.get_context("spawn").Pool(processes, _start_worker) as pool:
        return collect(pool.imap(_work, clips, chunksize=16))
