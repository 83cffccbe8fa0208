"""Talking through a sound card that a test plays, and from files."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.inference.scripted import Line, Loudness, ScriptedStreams, ScriptedVoice, say
from vita_jax.errors import UserError
from vita_jax.inference import live
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.duplex_events import Ignored, Recognised, ResponseDone
from vita_jax.inference.scene_run import SimulatedClock

LONG = "one two three four, five six seven eight, nine ten."


class SoundCard:
    """Both ends of the library `sounddevice`: a room that says a track and counts what it hears."""

    def __init__(self, track: np.ndarray, clock: SimulatedClock) -> None:
        self.track, self.clock, self.open, self.heard, self.rates = track, clock, {}, [], []

    def stream(self, name):
        card = self

        class Stream:
            def __init__(self, *, samplerate, channels, dtype, blocksize, callback):
                assert (channels, dtype, blocksize) == (1, "float32", live.BLOCK)
                self.callback, self.rate = callback, samplerate
                card.rates.append(samplerate)

            def start(self):
                card.open[name] = self

            def close(self):
                del card.open[name]

        return Stream

    def tick(self) -> bool:
        """20 ms pass. Whether the track goes on."""
        block, self.track = self.track[: live.BLOCK], self.track[live.BLOCK :]
        self.open["in"].callback(np.pad(block, (0, live.BLOCK - len(block)))[:, None], len(block), None, None)
        self.clock.now += 0.02
        if "out" in self.open:
            out = np.ones((round(0.02 * self.open["out"].rate), 1), np.float32)
            self.open["out"].callback(out, len(out), None, None)
            self.heard.append(out[:, 0])
        return len(self.track) > 0


def conversation(lines, clock):
    voice = ScriptedVoice()
    session = SimpleNamespace(turns=[], media=[], context=None)
    return session, Duplex(ScriptedStreams(lines), Loudness(), lambda wave, text: voice, session=session, clock=clock)


def test_through_a_sound_card(monkeypatch):
    clock, events = SimulatedClock(), []
    track = say((0, 0.2), (1, 0.5), (0, 0.9), (2, 0.4), (0, 0.9), (3, 0.4), (0, 2.5))
    card, library = SoundCard(track, clock), ModuleType(live.LIBRARY)
    library.InputStream, library.OutputStream = card.stream("in"), card.stream("out")
    monkeypatch.setitem(sys.modules, live.LIBRARY, library)
    monkeypatch.setattr(live, "has_sound_card", lambda: True)
    monkeypatch.setattr(live, "time", SimpleNamespace(sleep=lambda seconds: None))
    session, duplex = conversation({1: Line(text=LONG), 2: Line("noise"), 3: Line(text="no.")}, clock)
    live.talk_live(duplex, events.append, card.tick)
    assert card.rates == [16000, 8000] and not card.open  # everything is closed
    decisions = [type(e).__name__ for e in events if isinstance(e, Recognised | Ignored)]
    assert decisions == ["Recognised", "Ignored", "Recognised"]
    first, second = [e for e in events if isinstance(e, ResponseDone)]
    assert (first.status, second.status) == ("cancelled", "completed")
    heard = np.count_nonzero(np.concatenate(card.heard)) / 8000
    assert heard == pytest.approx(0.3 * len(first.heard.split()) + 0.3, abs=0.3)
    assert session.turns[1]["value"] == "☞" + first.heard and session.turns[3]["value"] == "☞no. "


def test_a_machine_without_a_sound_card_says_so(monkeypatch):
    _, duplex = conversation({}, SimulatedClock())
    monkeypatch.setattr(live, "has_sound_card", lambda: False)
    with pytest.raises(UserError, match="pip install sounddevice"):
        live.talk_live(duplex, print)

    def broken(**settings):
        raise OSError("no device")

    library = ModuleType(live.LIBRARY)
    library.InputStream = broken
    monkeypatch.setattr(live, "has_sound_card", lambda: True)
    monkeypatch.setitem(sys.modules, live.LIBRARY, library)
    with pytest.raises(UserError, match="no device; give sound files"):
        live.talk_live(duplex, print)


def test_files_are_said_one_after_another():
    clock, events = SimulatedClock(), []
    session, duplex = conversation({1: Line(text=LONG), 2: Line("noise"), 3: Line(text="no.")}, clock)
    live.talk_from_files(duplex, clock, [say((n, 0.5)) for n in (1, 2, 3)], events.append)
    assert [e.status for e in events if isinstance(e, ResponseDone)] == ["completed", "completed"]
    assert [turn["value"].strip() for turn in session.turns] == ["<audio>", "☞" + LONG, "<audio>", "☞no."]


def test_a_player_is_stopped_where_it_is():
    player = live.Player()
    player.add(1, np.ones(100, np.float32))
    assert player.take(40).sum() == 40 and player.played == 40
    player.stop()
    assert player.take(40).sum() == 0 and player.played == 40
    player.add(2, np.ones(10, np.float32))
    assert player.response == 2 and player.take(40).sum() == 10 and player.played == 10
