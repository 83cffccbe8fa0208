"""Text to speech without a network: espeak-ng, driven through the shared library in the wheel `espeakng-loader`.

espeak-ng (1.52, GPL-3.0; installed beside this package, nothing of it is copied here) keeps the state of its
oscillators in variables of the library, so a clip depends on everything spoken before it in the same process. To make a
clip a function of its text and voice alone, the library is loaded anew for every clip and unloaded afterwards; that
costs about 3 ms. As there is one such library in a process, a lock lets one clip be spoken at a time.

One core speaks 200 to 270 seconds of audio a second, provided that the linear algebra library keeps to one thread.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import resample

SAMPLE_RATE = 16000  # Hz, of everything that leaves this file
# Loudness below which the start and the end of a clip are cut, and what is kept of the quiet there.
SILENCE_LEVEL = 0.004
KEPT_SILENCE = 0.04  # seconds

RATES = (80, 450)  # words per minute that espeak-ng accepts
PITCHES = (0, 99)

# Values of `espeak_AUDIO_OUTPUT`, `espeak_PARAMETER` and flags in espeak-ng's speak_lib.h.
_SYNCHRONOUS, _DONT_EXIT = 2, 1 << 15
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_CHARS_UTF8 = 1
_OK = 0
_SEED = 1  # of breath and whispers; otherwise taken from the clock
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_LOCK = threading.Lock()

# Languages of the quickstart: code -> espeak-ng's name of the voice file.
ACCENTS = {
    "en-us": "gmw/en-US",
    "en-us-nyc": "gmw/en-US-nyc",
    "en-gb": "gmw/en",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb-x-gbclan": "gmw/en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "gmw/en-GB-x-gbcwmd",
    "en-029": "gmw/en-029",
    "cmn": "sit/cmn",
}


class SpeechSynthesizer(Protocol):
    """What the speech data need of a synthesiser; any other one with this method can take the place of espeak-ng."""

    def speak(
        self,
        text: str,
        voice: str,
        *,
        rate_wpm: int = 175,
        pitch: int = 50,
        pitch_range: int = 50,
        variant: str | None = None,
    ) -> tuple[np.ndarray, int]:
        """Speaks `text`; returns the waveform (n,) float32 in -1..1 and its sample rate in Hz.

        The same arguments must give the same samples, in any process and in any order of calls.
        """
        ...


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "speech data are spoken by espeak-ng, and the package 'espeakng-loader' that holds it is not installed: "
            "`pip install 'espeakng-loader>=0.2.4'` (requirements.txt lists it), or build without speech"
        ) from error
    return espeakng_loader


@functools.cache
def list_variants() -> tuple[str, ...]:
    """The voice variants of espeak-ng, such as "m1", "f3", "klatt", "croak", "whisper", sorted."""
    return tuple(sorted(path.name for path in (Path(_loader().get_data_path()) / "voices" / "!v").iterdir()))


def list_voices() -> tuple[str, ...]:
    """The language codes that can be spoken: accents of English, and Mandarin ("cmn")."""
    return tuple(ACCENTS)


def trim_silence(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Cuts a waveform (n,) where it is quieter than `SILENCE_LEVEL` at both ends, but for `KEPT_SILENCE` seconds."""
    loud = np.flatnonzero(np.abs(waveform) > SILENCE_LEVEL)
    if not len(loud):
        return waveform[:0]
    kept = round(KEPT_SILENCE * sample_rate)
    return waveform[max(0, loud[0] - kept) : loud[-1] + 1 + kept]


class Synthesizer:
    """espeak-ng as a `SpeechSynthesizer`. Cheap to make; holds no state of the library between clips.

    Raises:
      UserError: the wheel is missing, or its library does not load here.
    """

    def __init__(self) -> None:
        loader = _loader()
        self._library_path = loader.get_library_path()
        self._data_path = os.fsencode(loader.get_data_path())

    def speak(
        self,
        text: str,
        voice: str,
        *,
        rate_wpm: int = 175,
        pitch: int = 50,
        pitch_range: int = 50,
        variant: str | None = None,
    ) -> tuple[np.ndarray, int]:
        """Speaks a text, without the silence around it.

        Args:
          text: what to say; digits and signs are read as the language does.
          voice: one of `list_voices()`.
          rate_wpm: words per minute, 80..450.
          pitch: 0..99, about an octave and a half.
          pitch_range: 0..99, how lively. Mandarin needs some: its tones are pitch.
          variant: one of `list_variants()`, changes throat and breath; None is the plain voice.

        Returns:
          (n,) float32 in -1..1, and 16000.

        Raises:
          UserError: an unknown voice or variant, a number out of range, a text in which nothing can be said.
        """
        self._check(text, voice, rate_wpm, pitch, pitch_range, variant)
        name = ACCENTS[voice] + (f"+{variant}" if variant else "")
        with _LOCK:
            samples, rate = self._spoken(text, name, {_RATE: rate_wpm, _PITCH: pitch, _PITCH_RANGE: pitch_range})
        waveform = resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE)
        waveform = trim_silence(np.clip(waveform, -1, 1), SAMPLE_RATE)
        if not len(waveform):
            raise UserError(f"nothing can be said of the text {text!r} in voice {voice!r}; give it words")
        return waveform, SAMPLE_RATE

    def _check(self, text: str, voice: str, rate_wpm: int, pitch: int, pitch_range: int, variant: str | None) -> None:
        if not text.strip() or "\0" in text:
            raise UserError(f"the text to speak is {text!r}; give it words, and no null character")
        if voice not in ACCENTS:
            raise UserError(f"unknown voice {voice!r}; known: {', '.join(ACCENTS)}")
        # espeak-ng itself takes the plain voice when it does not know the variant.
        if variant is not None and variant not in list_variants():
            raise UserError(f"unknown variant {variant!r} of a voice; known: {', '.join(list_variants())}")
        for name, value, (low, high) in (
            ("rate_wpm", rate_wpm, RATES),
            ("pitch", pitch, PITCHES),
            ("pitch_range", pitch_range, PITCHES),
        ):
            if not low <= value <= high:
                raise UserError(f"{name}={value} of a voice must be from {low} to {high}")

    def _spoken(self, text: str, name: str, parameters: dict[int, int]) -> tuple[np.ndarray, int]:
        """The samples (n,) int16 and their rate in Hz, from a library loaded for this clip only."""
        try:
            library = ctypes.CDLL(self._library_path)
        except OSError as error:
            raise UserError(
                f"espeak-ng's library {self._library_path} does not load ({error}); reinstall 'espeakng-loader'"
            ) from error
        try:
            return _speak_once(library, self._data_path, text, name, parameters)
        finally:
            _unload(library, self._library_path)


def _speak_once(
    library: ctypes.CDLL, data_path: bytes, text: str, name: str, parameters: dict[int, int]
) -> tuple[np.ndarray, int]:
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, _DONT_EXIT)
    if rate <= 0:
        raise UserError(
            f"espeak-ng does not start with its data in {os.fsdecode(data_path)}; reinstall espeakng-loader"
        )
    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    pieces: list[bytes] = []

    def receive(samples: Any, count: int, events: int | None) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    callback = _CALLBACK(receive)  # this name keeps it alive while the library calls it
    library.espeak_SetSynthCallback(callback)
    try:
        if library.espeak_SetVoiceByName(name.encode()) != _OK:
            raise UserError(f"espeak-ng has no voice {name!r}; install espeakng-loader 0.2.4 or newer")
        for parameter, value in parameters.items():
            library.espeak_SetParameter(parameter, value, 0)
        data = text.encode("utf-8") + b"\0"
        if library.espeak_Synth(data, len(data), 0, 0, 0, _CHARS_UTF8, None, None) != _OK:
            raise UserError(f"espeak-ng could not speak {text!r} in voice {name!r}")
    finally:
        library.espeak_Terminate()
    return np.frombuffer(b"".join(pieces), np.int16), rate


def _unload(library: ctypes.CDLL, path: str) -> None:
    """Unloads the library and with it its state. Raises UserError if something else in this process holds on to it."""
    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
        return
    _ctypes.dlclose(library._handle)
    try:
        ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:  # not loaded any more, as it should be
        return
    raise UserError(
        f"{path} is in use by other code of this process, so clips would depend on what was spoken before; "
        "build the speech data in a process of its own"
    )
