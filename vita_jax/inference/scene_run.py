"""A scene played to a duplex conversation in simulated time: a microphone that mixes, a player that can be stopped.

Time is that of the sound. The model's work takes as long as `RunOptions.round_seconds` says, so that a scene has the
same course on every machine, or as long as it really takes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.duplex_events import (
    CANCELLED,
    AudioDelta,
    Event,
    Ignored,
    Recognised,
    ResponseDone,
    ResponseSent,
    SpeechStarted,
    SpeechStopped,
)
from vita_jax.inference.scene import Moment, Scene, SceneImage, SceneSound
from vita_jax.inference.vad import SAMPLE_RATE


class SceneCutShort(UserError):
    """A scene ended while something in it still waited: what it waits for did not happen."""


_ANCHORS = {
    SpeechStarted: "speech started",
    SpeechStopped: "speech stopped",
    Recognised: "recognised",
    Ignored: "ignored",
    ResponseSent: "sent",
    ResponseDone: "done",
}


@dataclass(frozen=True)
class RunOptions:
    """How a scene is played.

    Attributes:
      round_seconds: that a round of work takes; None = as long as it takes on this machine.
      block_seconds: what the microphone gives at a time.
      player_seconds: of sound that the player has handed to the sound card and cannot take back.
      quiet_seconds: the scene ends when nothing has happened for so long.
      max_seconds: or after so long.
    """

    round_seconds: float | None = 0.02
    block_seconds: float = 0.02
    player_seconds: float = 0.02
    quiet_seconds: float = 2.0
    max_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.round_seconds is not None and not self.round_seconds > 0:
            raise UserError(f"a round takes {self.round_seconds} s; it must take some time")
        for name in ("block_seconds", "quiet_seconds", "max_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)} must be above 0")


@dataclass(frozen=True)
class Span:
    """[start, end) in seconds of something with a name or a number."""

    name: str | int
    start: float
    end: float


@dataclass
class Course:
    """What happened in a scene. Times are in seconds.

    Attributes:
      scene: that was played.
      events: in order, with the time at which they were seen.
      sounds: when each sound of the scene was heard; name by name, in the scene's order.
      audible: when which answer was heard.
      end: of the scene.
    """

    scene: Scene
    events: list[tuple[float, Event]] = field(default_factory=list)
    sounds: dict[str, Span] = field(default_factory=dict)
    audible: list[Span] = field(default_factory=list)
    end: float = 0.0

    def of(self, kind: type) -> list[Event]:
        """The events of a kind, in order."""
        return [event for _, event in self.events if isinstance(event, kind)]


class SimulatedClock:
    """The time of a scene. now: seconds; called it says the same."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SceneRun:
    """One run of a scene; `run` is all there is to call."""

    def __init__(self, scene: Scene, duplex: Duplex, clock: SimulatedClock, options: RunOptions) -> None:
        self.course, self._duplex, self._clock, self._options = Course(scene), duplex, clock, options
        self._rng = np.random.default_rng(0)
        self._heard = 0  # samples
        self._placed: list[tuple[int, SceneSound]] = []
        self._sounds, self._images = list(scene.sounds), list(scene.images)
        self._anchors: dict[tuple[str, int], float] = {}
        self._last = 0.0  # when something happened last
        self._until: dict[int, float] = {}  # when the sound of an answer ends
        self._playing: int | None = None  # the answer that has the player

    def run(self) -> Course:
        """Plays the scene to its end.

        Raises:
          SceneCutShort: something that the scene waits for did not happen.
        """
        block = round(self._options.block_seconds * SAMPLE_RATE)
        while not self._over():
            self._place()
            while (self._heard + block) / SAMPLE_RATE <= self._clock.now + 1e-9:
                self._duplex.hear(self._microphone(block))
                self._place()
            start = time.perf_counter()
            busy = self._duplex.advance()
            if self._options.round_seconds is None:
                self._clock.now += time.perf_counter() - start
            elif busy:
                self._clock.now += self._options.round_seconds
            self._follow()
            if not busy:
                self._clock.now = max(self._clock.now, (self._heard + block) / SAMPLE_RATE)
        self._duplex.close()
        self._follow()
        self.course.end = self._clock.now
        if self._sounds or self._images:
            waits = (self._sounds or self._images)[0]
            name = waits.name if isinstance(waits, SceneSound) else waits.path.name
            raise SceneCutShort(
                f"the scene ended at {self._clock.now:.1f} s while {name!r} still waited for {waits.moment.after!r} "
                f"number {waits.moment.nth}, which did not happen"
            )
        return self.course

    def _over(self) -> bool:
        sound_ends = max([span.end for span in self.course.sounds.values()], default=0.0)
        timed = any(waiting.moment.after is None for waiting in [*self._sounds, *self._images])
        busy_until = max(self._last, sound_ends)
        return self._clock.now > self._options.max_seconds or (
            not timed and self._clock.now - busy_until > self._options.quiet_seconds
        )

    # ---- the room ---------------------------------------------------------------------------------------------------

    def _time_of(self, moment: Moment) -> float | None:
        if moment.after is None:
            return moment.seconds
        anchor = self._anchors.get((moment.after, moment.nth))
        return None if anchor is None else anchor + moment.seconds

    def _due(self, waiting: list[SceneSound] | list[SceneImage], before: float) -> list:
        due = [item for item in waiting if (at := self._time_of(item.moment)) is not None and at < before]
        for item in due:
            waiting.remove(item)
        return due

    def _place(self) -> None:
        """Sounds and pictures whose time has come begin with the next block."""
        block = self._options.block_seconds
        for sound in self._due(self._sounds, self._heard / SAMPLE_RATE + block):
            first = max(self._heard, round(self._time_of(sound.moment) * SAMPLE_RATE))
            self._placed.append((first, sound))
            start = first / SAMPLE_RATE
            self.course.sounds[sound.name] = Span(sound.name, start, start + len(sound.samples) / SAMPLE_RATE)
        for image in self._due(self._images, self._heard / SAMPLE_RATE + block):
            self._duplex.show(image.path)

    def _microphone(self, count: int) -> np.ndarray:
        block = self._rng.normal(0, self.course.scene.noise_floor, count).astype(np.float32)
        for first, sound in self._placed:
            begin, end = max(first, self._heard), min(first + len(sound.samples), self._heard + count)
            if begin < end:
                block[begin - self._heard : end - self._heard] += sound.samples[begin - first : end - first]
        self._heard += count
        return np.clip(block, -1, 1)

    # ---- the player -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        now = self._clock.now
        for event in self._duplex.events():
            self.course.events.append((now, event))
            self._last = now
            if type(event) in _ANCHORS:
                self._happened(_ANCHORS[type(event)], now)
            if isinstance(event, AudioDelta):
                self._play(event, now)
            elif isinstance(event, ResponseDone):
                self._playing = None
                if event.status == CANCELLED:
                    self._duplex.played(self._stop(event.response, now), event.response)
        if self._playing is not None:
            if self._until[self._playing] > now:
                self._last = now
            self._duplex.played(self._position(self._playing, now), self._playing)

    def _happened(self, anchor: str, now: float) -> None:
        nth = 1 + sum(name == anchor for name, _ in self._anchors)
        self._anchors[anchor, nth] = now

    def _play(self, event: AudioDelta, now: float) -> None:
        if event.response not in self._until:
            self._happened("first sound", now)
        self._playing = event.response
        start = max(now, self._until.get(event.response, 0.0))
        self._until[event.response] = start + len(event.samples) / event.sampling_rate
        self.course.audible.append(Span(event.response, start, self._until[event.response]))

    def _position(self, response: int, now: float) -> float:
        spans = [span for span in self.course.audible if span.name == response]
        return sum(max(min(span.end, now) - span.start, 0.0) for span in spans)

    def _stop(self, response: int, now: float) -> float:
        """Nothing more of an answer is heard, but what the sound card has. Returns seconds of it that were heard."""
        until = now + self._options.player_seconds
        kept = []
        for span in self.course.audible:
            if span.name != response or span.end <= until:
                kept.append(span)
            elif span.start < until:
                kept.append(Span(response, span.start, until))
        self.course.audible = kept
        self._until[response] = min(self._until.get(response, now), until)
        return self._position(response, until)


def run_scene(scene: Scene, make: Callable[[SimulatedClock], Duplex], options: RunOptions = RunOptions()) -> Course:
    """Plays a scene to the conversation that `make` makes with a clock. Raises as `SceneRun.run`."""
    clock = SimulatedClock()
    return SceneRun(scene, make(clock), clock, options).run()
