"""Who may speak when: one decision for every utterance, answers that stop where they were heard, roles that swap."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.media import png_bytes
from tests.inference.scripted import UNIT, Line, ScriptedVoice, Stage, say
from vita_jax.data.records import Media
from vita_jax.errors import UserError
from vita_jax.inference.duplex import DuplexOptions
from vita_jax.inference.duplex_events import (
    AudioDelta,
    Ignored,
    Recognised,
    ResponseDone,
    ResponseSent,
    ResponseStarted,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
)
from vita_jax.inference.playback import Playback, expected_seconds

LONG = "one two three four, five six seven eight, nine ten."  # 10 words, 3 s in 3 pieces


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def heard_of(stage):
    return [turn["value"].removeprefix("☞") for turn in stage.session.turns[1::2]]


# ---- whatever happens ------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["red", "seven,", "no.", "green", "forty-two", "it."]), max_size=12).map(" ".join)
LINES = st.builds(Line, st.sampled_from(["audio", "audio", "noise", "noise", "text", None]), WORDS, st.integers(0, 60))
UNANSWERED = Line("audio", "", 0)
# (silence before it, seconds, line): silences are clearly a pause or clearly an end.
SAID = st.lists(
    st.tuples(st.sampled_from([0.1, 0.7, 1.1, 3.0]), st.sampled_from([0.05, 0.3, 0.9, 1.6]), LINES), max_size=6
)


@example(  # a slow voice is interrupted while its only piece is still being made
    [(0.1, 0.05, UNANSWERED)] * 3
    + [(0.7, 0.05, Line("audio", "red red red red red red red", 0)), (0.1, 0.05, UNANSWERED)]
    + [(0.7, 0.3, UNANSWERED)],
    0.005,
    0.6,
    False,
    [],
)
@given(
    SAID,
    st.sampled_from([0.005, 0.02, 0.11]),
    st.sampled_from([0.05, 0.3, 0.6]),
    st.booleans(),
    st.lists(st.integers(0, 400), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_every_utterance_has_one_decision_and_every_answer_one_end(said, round_seconds, per_word, reports, cancels):
    lines = {number: line for number, (_, _, line) in enumerate(said, start=1)}
    voice = ScriptedVoice(per_word)
    stage = Stage(lines, round_seconds=round_seconds, voice=voice, reports=reports)
    parts = [part for number, (gap, seconds, _) in enumerate(said, 1) for part in ((0, gap), (number, seconds))]
    track = say((0, 0.2), *parts)
    for block in sorted(cancels):
        done = block * 320
        stage.play(track[:done])
        stage.duplex.cancel()
        track = track[done:]
    stage.play(track, until_quiet=7.0)
    stage.duplex.close()
    events = stage.events
    check_utterances(events, stage, said)
    check_responses(events, stage, per_word)
    check_history(events, stage)


def check_utterances(events, stage, said):
    groups = []  # what is said without a real pause is one utterance
    for number, (gap, _, _) in enumerate(said, start=1):
        if gap < 0.5 and groups:
            groups[-1].add(number)
        else:
            groups.append({number})
    assert [sound.values for sound in stage.streams.sounds] == groups  # nothing lost, nothing mixed
    order = [(type(e).__name__, e.utterance) for e in events if isinstance(e, SpeechStarted | SpeechStopped)]
    assert order == [(kind, n) for n in range(1, len(groups) + 1) for kind in ("SpeechStarted", "SpeechStopped")]
    decisions = [e for e in events if isinstance(e, Ignored | Recognised)]
    assert [e.utterance for e in decisions if getattr(e, "state", "") != "short"] == sorted(
        e.utterance for e in decisions if getattr(e, "state", "") != "short"
    )
    assert Counter(e.utterance for e in decisions) == Counter(range(1, len(groups) + 1))
    for event in decisions:
        group = groups[event.utterance - 1]
        line, seconds = said[min(group) - 1][2], sum(said[number - 1][1] for number in group)
        meant = line.state in ("audio", "text")
        if isinstance(event, Ignored) and event.state == "short":
            assert seconds < 0.3
        else:
            assert seconds > 0.08 and event.state == (line.state or "empty") and isinstance(event, Recognised) == meant


def check_responses(events, stage, per_word):
    running, texts, streams = None, {}, []
    for before, event in zip([None, *events], events, strict=False):
        match event:
            case ResponseStarted():
                assert running is None
                running, texts[event.response] = event.response, ""
                streams.append(event.stream)
            case TextDelta():
                assert event.response == running
                texts[running] += event.text
            case AudioDelta():
                assert event.response == running and len(event.samples)
            case ResponseDone():
                assert event.response == running and event.text == texts[running]
                assert texts[running].startswith(event.heard)
                if event.status == "cancelled":
                    words = stage.starts[running] / per_word + 1e-6
                    assert len(event.heard.split()) <= words  # never more than was played
                else:
                    assert event.heard == event.text
                running = None
            case Ignored():  # what is being said goes on
                assert not isinstance(before, ResponseDone) or before.status != "cancelled" or before.at <= event.at
    assert running is None
    assert all(first != second for first, second in zip(streams, streams[1:], strict=False))
    started, done = of(events, ResponseStarted), of(events, ResponseDone)
    assert [e.response for e in started] == [e.response for e in done] == list(range(1, len(started) + 1))
    assert [e.utterance for e in started] == [e.utterance for e in of(events, Recognised)]


def check_history(events, stage):
    heard = [event.heard for event in of(events, ResponseDone) if event.heard.strip()]
    assert heard_of(stage) == heard[-len(heard_of(stage)) :] if heard_of(stage) else not heard or len(heard) > 5
    for _, turns in stage.streams.asked:  # every question is asked after answers of which only what was heard is left
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) + ["human"]
    assert stage.streams.closed


# ---- one thing at a time ---------------------------------------------------------------------------------------------


def names(events):
    """What happened, in order, without the many deltas."""
    out = []
    for event in events:
        name = type(event).__name__
        if isinstance(event, TextDelta | AudioDelta):
            continue
        detail = getattr(event, "status", "") or (event.state if isinstance(event, Ignored | Recognised) else "")
        out.append(f"{name} {detail}".strip())
    return out


def test_a_query_is_answered():
    stage = Stage({1: Line(text="it is seven.")})
    events = stage.play(say((0, 0.5), (1, 1.0)), until_quiet=1.5)
    assert names(events) == [
        "SpeechStarted", "SpeechStopped", "Recognised audio", "ResponseStarted", "ResponseSent",
        "ResponseDone completed",
    ]  # fmt: skip
    started, stopped, _, _, sent, done = [e for e in events if not isinstance(e, TextDelta | AudioDelta)]
    # 300 ms before the speech, which begins in a chunk of 512 samples; 200 ms and a chunk after it.
    assert 8000 - 4800 - 512 < started.sample <= 8000 - 4800 and 24000 + 3200 <= stopped.end < 24000 + 3200 + 1024
    assert stopped.at == pytest.approx(1.5 + 0.5, abs=0.08)
    assert done.at - sent.at > 0.5 and done.heard == done.text == "it is seven. "
    assert stage.session.turns == [
        {"from": "human", "value": "<audio>\n"}, {"from": "gpt", "value": "☞it is seven. "}
    ]  # fmt: skip
    assert stage.streams.prepared >= 5  # put before the model while it was spoken


@pytest.mark.parametrize("state", ["noise", None])
def test_noise_changes_nothing(state):
    quiet = Stage({1: Line(text=LONG)})
    alone = quiet.play(say((0, 0.2), (1, 0.5), (0, 4.0)), until_quiet=1.0)
    stage = Stage({1: Line(text=LONG), 2: Line(state)})
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 1.0), (2, 0.8)), until_quiet=1.5)
    assert [e for e in names(events) if "Speech" not in e and "Ignored" not in e] == names(alone)[2:]
    assert of(events, Ignored)[0].state == (state or "empty")
    assert of(events, ResponseDone)[0].at == pytest.approx(of(alone, ResponseDone)[0].at, abs=0.05)
    np.testing.assert_array_equal(
        np.concatenate([e.samples for e in of(events, AudioDelta)]),
        np.concatenate([e.samples for e in of(alone, AudioDelta)]),
    )
    assert stage.session.turns == quiet.session.turns and stage.streams.forgotten == ["1"]


def test_a_query_stops_the_answer_where_it_is_heard_and_the_roles_swap():
    stage = Stage({1: Line(text=LONG), 2: Line(text="no.", thinks=5)})
    # It answers at about 1.2 s; the second query is over at 2.0 and recognised at about 2.55.
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 0.8), (2, 0.5)), until_quiet=1.5)
    first, second = of(events, ResponseDone)
    (_, recognised) = of(events, Recognised)
    assert first.status == "cancelled" and first.at == recognised.at
    assert not [e for e in of(events, AudioDelta) if e.response == 1 and e.at > recognised.at]
    words = stage.starts[1] / 0.3
    assert len(first.heard.split()) == int(words + 1e-6) and LONG.startswith(first.heard.strip())
    assert [e.stream for e in of(events, ResponseStarted)] == [0, 1]
    assert heard_of(stage) == [first.heard, "no. "] and second.status == "completed"
    # The second answer was given to a history that has exactly that.
    assert stage.streams.asked[-1][1][1]["value"] == "☞" + first.heard


def test_an_answer_that_nobody_heard_is_forgotten_and_its_picture_is_not():
    stage = Stage({1: Line(text=LONG, thinks=40), 2: Line(text="no.")}, round_seconds=0.05)
    picture = Media("image", "p", png_bytes(8, 8))
    stage.duplex._show(picture)
    # The second query is recognised while the first answer has not made a sound.
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 0.7), (2, 0.4)), until_quiet=2.0)
    first = of(events, ResponseDone)[0]
    assert (first.status, first.heard) == ("cancelled", "") and not [
        e for e in of(events, AudioDelta) if e.response == 1
    ]
    assert stage.session.turns[0]["value"] == "<image>\n<audio>\n" and heard_of(stage) == ["no. "]
    assert stage.session.media[0] is picture and len(stage.session.media) == 2


def test_twice_in_a_row():
    lines = {1: Line(text=LONG), 2: Line(text=LONG), 3: Line(text="no.")}
    stage = Stage(lines, reports=True)
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 0.8), (2, 0.5), (0, 0.8), (3, 0.5)), until_quiet=1.5)
    done = of(events, ResponseDone)
    assert [e.status for e in done] == ["cancelled", "cancelled", "completed"]
    assert [e.stream for e in of(events, ResponseStarted)] == [0, 1, 0]
    assert heard_of(stage) == [e.heard for e in done] and all(e.heard for e in done)


def test_after_the_last_sample_there_is_nothing_to_stop():
    stage = Stage({1: Line(text="yes."), 2: Line(text="no.")})
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 2.0), (2, 0.5)), until_quiet=1.5)
    assert [e.status for e in of(events, ResponseDone)] == ["completed", "completed"]


def test_sent_but_not_played_can_still_be_stopped():
    stage = Stage({1: Line(text="one two three four five."), 2: Line(text="no.")})
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 0.6), (2, 0.3)), until_quiet=1.5)
    sent, done = of(events, ResponseSent)[0], of(events, ResponseDone)[0]
    assert sent.at < done.at and done.status == "cancelled" and 0 < len(done.heard.split()) < 5


def test_a_second_query_before_the_first_is_decided():
    stage = Stage({1: Line(text=LONG, thinks=100), 2: Line(text="no.", thinks=100)}, round_seconds=0.02)
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 0.7), (2, 0.4)), until_quiet=3.0)
    assert [e.utterance for e in of(events, Recognised)] == [1, 2]
    assert [e.status for e in of(events, ResponseDone)] == ["cancelled", "completed"]


def test_typed_questions_need_no_decision():
    stage = Stage({1: Line(text=LONG)})
    stage.play(say((0, 0.2), (1, 0.5), (0, 1.2)))
    stage.duplex.ask("really?")
    events = stage.play(say((0, 0.1)), until_quiet=1.0)
    assert [e.state for e in of(events, Recognised)] == ["audio", "text"]
    assert [e.status for e in of(events, ResponseDone)] == ["cancelled", "completed"]
    assert stage.session.turns[2]["value"] == "really?"
    with pytest.raises(UserError, match="question is empty"):
        stage.duplex.ask(" ")


def test_a_button_ends_an_utterance_at_once():
    stage = Stage({1: Line()})
    stage.play(say((1, 0.64)))
    stage.duplex.end_utterance()
    stage.duplex.advance()
    (stopped,) = of(stage.duplex.events(), SpeechStopped)
    assert stopped.at == stage.now and stopped.end == 0.64 * 16000


def test_the_player_knows_better():
    """A player that is late, and says so only when it was stopped."""
    stage = Stage({1: Line(text=LONG)})
    stage.play(say((0, 0.2), (1, 0.5), (0, 2.5)))
    stage.duplex.cancel()
    stage.play(say((0, 0.1)))
    assert len(heard_of(stage)[0].split()) > 3
    stage.duplex.played(0.95, 1)
    stage.play(say((0, 0.1)))
    assert heard_of(stage) == ["one two three "]
    stage.duplex.played(0.1, 1)
    stage.play(say((0, 0.1)))
    assert stage.session.turns == []


def test_text_counts_as_heard_where_nothing_speaks():
    stage = Stage({1: Line(text=LONG), 2: Line(text="no.")}, speak=False)
    events = stage.play(say((0, 0.2), (1, 0.5), (0, 0.8)), until_quiet=1.0)
    assert not of(events, AudioDelta) and of(events, ResponseDone)[0].heard.split() == LONG.split()


def test_the_oldest_is_forgotten_when_there_is_no_room():
    lines = {number: Line(text=f"{number}.") for number in range(1, 10)}
    stage = Stage(lines)
    events = stage.play(say(*[part for n in lines for part in ((0, 1.5), (n, 0.4))]), until_quiet=1.5)
    assert len(of(events, Recognised)) == 9 and [text.strip() for text in heard_of(stage)] == [
        "4.",
        "5.",
        "6.",
        "7.",
        "8.",
        "9.",
    ]
    assert stage.streams.forgotten == ["0", "1", "2"]


def test_closing_decides_everything():
    stage = Stage({1: Line(text=LONG), 2: Line(), 3: Line()}, round_seconds=0.01)
    stage.streams.lines[2].thinks = 1000
    stage.play(say((0, 0.2), (1, 0.5), (0, 0.7), (2, 0.4), (0, 0.7), (3, 0.5)))
    stage.duplex.close()
    stage._follow()
    assert [(e.utterance, e.state) for e in of(stage.events, Ignored)] == [(2, "failed"), (3, "failed")]
    assert of(stage.events, ResponseDone)[-1].status == "cancelled" and stage.streams.closed


def test_playback_by_the_clock_and_by_reports():
    playback = Playback()
    playback.begin("one two three four.")
    playback.add(1.0, now=10.0)
    playback.add(1.0, now=10.2)
    playback.end()
    assert playback.position(10.5) == pytest.approx(0.5) and playback.heard(11.1) == "one two "
    assert playback.ahead(30.0) == 0
    playback.begin("five six seven eight nine.")
    playback.add(0.2, now=30.0)
    assert playback.heard(31.0) == "one two three four."  # a fifth of a second is not five words
    playback.reported = 0.6
    assert playback.heard(31.0) == "one " and playback.ahead(31.0) == pytest.approx(1.6)
    assert expected_seconds("two words 红色") == pytest.approx(2 * 0.6 + 2 * 0.4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "fr"}, "language 'fr'"),
        ({"decide": "coin"}, "decide 'coin'"),
        ({"devices": 3}, "devices 3"),
        ({"lead_seconds": 0.0}, "lead_seconds 0.0"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        DuplexOptions(**changes)


def test_quiet_is_quiet():
    assert UNIT > 0 and not Stage({}).play(say((0, 2.0)))
