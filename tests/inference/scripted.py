"""A model for duplex tests that says what a script has it say, and whoever listens to it.

Utterances are constant sounds whose value is their number, so that whatever is mixed up shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from vita_jax.data.records import Media
from vita_jax.errors import UserError
from vita_jax.inference.duplex import Duplex, DuplexOptions
from vita_jax.inference.duplex_events import AudioDelta, ResponseDone, ResponseStarted

RATE = 8000  # of the voice, Hz
BLOCK = 320  # samples that a microphone gives, 20 ms
UNIT = 0.001  # value of utterance 1, twice of utterance 2 and so on
MAX_TURNS = 12


@dataclass
class Line:
    """What the model makes of one utterance: state "audio", "text", "noise" or None (nothing to say)."""

    state: str | None = "audio"
    text: str = "yes."
    thinks: int = 1  # rounds before it is decided


@dataclass
class ScriptedSound:
    media: Media
    blocks: list[np.ndarray] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.blocks)) // 1280

    @property
    def values(self) -> set[int]:
        """Numbers of the sounds that it holds."""
        return {int(v) for v in np.unique(np.rint(np.concatenate(self.blocks) / UNIT))} - {0}


class ScriptedReply:
    def __init__(self, stream: int, line: Line, decided: bool, state: str | None) -> None:
        self.stream, self.line, self.decided, self.state = stream, line, decided, state
        self.symbol, self.done, self.stopped = "", False, False
        self._left, self._words, self._text = line.thinks, line.text.split(), ""

    def step(self) -> bool:
        if self.done:
            return False
        if self._left:
            self._left -= 1
            return True
        if self.line.state is None and not self.decided:
            self.done = True
        elif not self.symbol:
            self.symbol, self.state, self.decided = "☞", self.state if self.decided else self.line.state, True
        elif self._words and self.state != "noise":
            self._text += self._words.pop(0) + " "
        else:
            self.done = True
        return True

    def update(self) -> None:
        pass

    def poll(self) -> str:
        text, self._text = self._text, ""
        return text if self.decided and self.state != "noise" else ""

    def stop(self) -> None:
        self.done = self.stopped = True


class ScriptedStreams:
    """Answers by `lines`, utterance number -> line; typed questions are answered by what they say."""

    def __init__(self, lines: dict[int, Line]) -> None:
        self.lines = lines
        self.sounds: list[ScriptedSound] = []
        self.asked: list[tuple[int, list[dict[str, str]]]] = []
        self.forgotten: list[str] = []
        self.replies: dict[int, ScriptedReply] = {}
        self.prepared, self.closed = 0, False

    def begin_sound(self) -> ScriptedSound:
        self.sounds.append(ScriptedSound(Media("audio", str(len(self.sounds)), b"")))
        return self.sounds[-1]

    def hear(self, sound: ScriptedSound, block: np.ndarray) -> None:
        assert sound is self.sounds[-1]
        sound.blocks.append(block)

    def end_sound(self, sound: ScriptedSound) -> bool:
        return sound.num_tokens > 0

    def forget(self, sound: ScriptedSound) -> None:
        self.forgotten.append(sound.media.name)

    def look(self, picture: Media) -> None: ...

    def prepare(self, stream: int, turns: list, media: Sequence[Media], sound: ScriptedSound) -> None:
        assert self.replies.get(stream) is None or self.replies[stream].done
        self.prepared += 1

    def ask(self, stream, turns, media, *, decided=False, state=None) -> ScriptedReply:
        if len(turns) > MAX_TURNS:
            raise UserError("too long")
        assert sum(turn["value"].count("<audio>") for turn in turns) == sum(m.kind == "audio" for m in media)
        assert sum(turn["value"].count("<image>") for turn in turns) == sum(m.kind == "image" for m in media)
        others = [reply for number, reply in self.replies.items() if number != stream and not reply.done]
        assert len(others) <= 1
        self.asked.append((stream, turns))
        if media and media[-1].kind == "audio" and "<audio>" in turns[-1]["value"]:
            sound = self.sounds[int(media[-1].name)]
            line = self.lines[min(sound.values)]
        else:
            line = Line("text", turns[-1]["value"].rpartition("\n")[2])
        self.replies[stream] = ScriptedReply(stream, line, decided, state)
        return self.replies[stream]

    def step(self) -> bool:
        return any([reply.step() for reply in self.replies.values()])

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedVoice:
    """So many seconds of sound for each word, in parts of a tenth of a second."""

    seconds_per_word: float = 0.3
    sampling_rate: int = RATE

    def say(self, piece: str, number: int, opening: bool):
        left = round(self.seconds_per_word * len(piece.split()) * self.sampling_rate)
        while left > 0:
            part = min(left, self.sampling_rate // 10)
            left -= part
            yield np.full(part, 0.1, np.float32)


class Loudness:
    """What is not quiet is speech."""

    chunk_samples = 512

    def __call__(self, chunk: np.ndarray) -> float:
        return float(np.abs(chunk).max() >= 0.5 * UNIT)


class Stage:
    """A conversation in simulated time, with a player that plays what it gets and tells where it is."""

    def __init__(self, lines, *, round_seconds=0.01, voice=None, reports=False, options=None, speak=True):
        self.now, self.round_seconds, self.reports = 0.0, round_seconds, reports
        self.streams = ScriptedStreams(lines)
        self.session = SimpleNamespace(turns=[], media=[], context=None)
        voice = voice or ScriptedVoice()
        self.duplex = Duplex(
            self.streams,
            Loudness(),
            (lambda wave, text: voice) if speak else None,
            options or DuplexOptions(),
            session=self.session,
            clock=lambda: self.now,
        )
        self.events: list = []
        self.heard_until, self.played, self.starts = 0.0, {}, {}
        self._given, self._queue = 0, []  # samples heard; [(response, start, seconds)]

    def play(self, track: np.ndarray, until_quiet: float = 0.0) -> list:
        """Everything that happens while a sound (n,) is heard, and then in silence until nothing does."""
        for start in range(0, len(track), BLOCK):
            self._block(track[start : start + BLOCK])
        quiet = 0.0
        while quiet < until_quiet:
            count = len(self.events)
            self._block(np.zeros(BLOCK, np.float32))
            quiet = 0.0 if len(self.events) > count or self.duplex._response is not None else quiet + BLOCK / 16000
        return self.events

    def _block(self, block: np.ndarray) -> None:
        self._given += len(block)
        self.duplex.hear(block)
        until = self._given / 16000
        busy = True
        while busy and self.now < until:  # a round that takes longer than a block lets the next ones wait
            self.now = max(self.now, until - len(block) / 16000)
            busy = self.duplex.advance()
            self.now += self.round_seconds if busy else 0.0
            self._follow()
        self.now = max(self.now, until)

    def _follow(self) -> None:
        for event in self.duplex.events():
            self.events.append(event)
            match event:
                case ResponseStarted():
                    self.played[event.response] = []
                case AudioDelta():
                    begin = max([self.now, *(start + seconds for start, seconds in self.played[event.response])])
                    self.played[event.response].append((begin, len(event.samples) / event.sampling_rate))
                case ResponseDone():
                    self.starts[event.response] = self.position(event.response)
        current = self.duplex._response
        if self.reports and current is not None:
            self.duplex.played(self.position(current.number), current.number)

    def position(self, response: int) -> float:
        """Seconds of an answer that have been played."""
        return sum(min(max(self.now - start, 0.0), seconds) for start, seconds in self.played[response])


def say(*parts: tuple[int, float]) -> np.ndarray:
    """(number, seconds) after each other; 0 is silence."""
    return np.concatenate([np.full(round(16000 * seconds), UNIT * number, np.float32) for number, seconds in parts])
