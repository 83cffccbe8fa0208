"""A duplex conversation with whoever is there: through the sound card of this machine, or from sound files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.duplex_events import CANCELLED, AudioDelta, Event, ResponseDone
from vita_jax.inference.scene_run import SimulatedClock
from vita_jax.inference.vad import SAMPLE_RATE

BLOCK = 320  # samples that the microphone gives at a time, 20 ms
IDLE_SECONDS = 0.005  # between two looks when there is nothing to do
# Silence after a sound file that ends whatever was said, and how long one waits for nothing to happen any more.
PAUSE_SECONDS = 1.5
MOST_SECONDS = 120.0

LIBRARY = "sounddevice"

Told = Callable[[Event], None]


def has_sound_card() -> bool:
    """Whether the library for microphones is installed."""
    return find_spec(LIBRARY) is not None


class Player:
    """What is still to be played, shared with the thread of the sound card.

    Attributes:
      response: the answer that it plays.
    """

    def __init__(self) -> None:
        self.response: int | None = None
        self._samples, self._played, self._lock = np.zeros((0,), np.float32), 0, threading.Lock()

    def add(self, response: int, samples: np.ndarray) -> None:
        """More of an answer, (n,) float32; another one than before begins anew."""
        with self._lock:
            if response != self.response:
                self.response, self._samples, self._played = response, samples, 0
            else:
                self._samples = np.concatenate([self._samples, samples])

    def take(self, count: int) -> np.ndarray:
        """The next samples for the loudspeaker, (count,), with silence where there are none."""
        with self._lock:
            taken, self._samples = self._samples[:count], self._samples[count:]
            self._played += len(taken)
        return np.pad(taken, (0, count - len(taken)))

    def stop(self) -> None:
        """Nothing more of the current answer is played."""
        with self._lock:
            self._samples = self._samples[:0]

    @property
    def played(self) -> int:
        """Samples of the current answer that the loudspeaker has taken."""
        return self._played


def talk_live(duplex: Duplex, told: Told, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Talks through the microphone and the loudspeaker until the caller is interrupted (or `goes_on` says no).

    The loudspeaker should not be heard by the microphone: use headphones.

    Args:
      duplex: with the real clock. It is closed.
      told: gets every event.
      goes_on: asked after every round.

    Raises:
      UserError: no sound card, or no library for it.
    """
    library, player = _library(), Player()
    streams = [_open(library.InputStream, SAMPLE_RATE, lambda data, *_: duplex.hear(data[:, 0].copy()))]
    rate = 0

    def follow() -> None:
        nonlocal rate
        for event in duplex.events():
            told(event)
            if isinstance(event, AudioDelta):
                player.add(event.response, event.samples)
                if not rate:
                    rate = event.sampling_rate
                    streams.append(_open(library.OutputStream, rate, lambda out, count, *_: _fill(out, player)))
            elif isinstance(event, ResponseDone) and event.status == CANCELLED and event.response == player.response:
                player.stop()
                duplex.played(player.played / rate, event.response)
        if rate and player.response is not None:
            duplex.played(player.played / rate, player.response)

    try:
        while goes_on():
            if not duplex.advance():
                time.sleep(IDLE_SECONDS)
            follow()
    finally:
        for stream in streams:
            stream.close()
        duplex.close()
        follow()


def _library() -> Any:
    if not has_sound_card():
        raise UserError(
            f"the microphone needs the package {LIBRARY!r}, which is not installed: `pip install {LIBRARY}`, or give "
            "sound files by --audio"
        )
    import sounddevice

    return sounddevice


def _open(kind: Callable[..., Any], rate: int, callback: Callable[..., None]) -> Any:
    try:
        stream = kind(samplerate=rate, channels=1, dtype="float32", blocksize=BLOCK, callback=callback)
        stream.start()
    except Exception as error:  # the library's own, which is only known once it is installed
        raise UserError(f"the sound card cannot be used at {rate} Hz: {error}; give sound files by --audio") from error
    return stream


def _fill(out: np.ndarray, player: Player) -> None:
    out[:, 0] = player.take(len(out))


def talk_from_files(duplex: Duplex, clock: SimulatedClock, waves: Iterable[np.ndarray], told: Told) -> None:
    """Says one sound after another, each once the answer to the one before has been heard.

    Args:
      duplex: made with `clock`. It is closed.
      clock: the time of the sounds.
      waves: (n,) float32 at 16 kHz each.
      told: gets every event.
    """

    def hear(block: np.ndarray) -> bool:
        """Whether anything happened."""
        duplex.hear(block)
        clock.now += len(block) / SAMPLE_RATE
        while duplex.advance():
            pass
        events = duplex.events()
        for event in events:
            told(event)
        return bool(events)

    for wave in waves:
        for start in range(0, len(wave), BLOCK):
            hear(wave[start : start + BLOCK])
        quiet, until = 0.0, clock.now + MOST_SECONDS
        while (quiet < PAUSE_SECONDS or duplex.answering) and clock.now < until:
            quiet = 0.0 if hear(np.zeros((BLOCK,), np.float32)) else quiet + BLOCK / SAMPLE_RATE
    duplex.close()
    for event in duplex.events():
        told(event)
