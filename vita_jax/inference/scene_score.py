"""How well a duplex conversation went: who was answered, who was ignored, how soon the model fell silent.

    takeover          of the sounds that are meant for the model, those that were taken for a query
    false takeover    of the sounds that are not, those that were taken for a query
    stop latency      from the recognition of a query to the last sample of the answer that it stopped
    silence latency   from the end of that query to the same
    response latency  from the end of a query to the first sample of its answer

A sound belongs to the utterance that holds most of it, if that is more than half. A sound that is not meant for the
model and lies in an utterance with one that is, is mixed and not counted: no decision about it could be wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from vita_jax.inference.duplex_events import (
    CANCELLED,
    Ignored,
    Recognised,
    ResponseDone,
    ResponseStarted,
    SpeechStopped,
)
from vita_jax.inference.scene_run import Course
from vita_jax.inference.vad import SAMPLE_RATE

MAX_STOP_SECONDS = 0.2  # the goal for the stop latency
BELONGS = 0.5  # share of a sound that makes it part of an utterance


@dataclass(frozen=True)
class Verdict:
    """What became of one sound. decision: "query", "ignored: ...", "mixed", "not heard"; right: None = not counted."""

    name: str
    meant: bool
    decision: str
    right: bool | None


@dataclass
class Scores:
    """Of one scene. Latencies are in seconds."""

    verdicts: list[Verdict] = field(default_factory=list)
    stops: list[float] = field(default_factory=list)
    silences: list[float] = field(default_factory=list)
    responses: list[float] = field(default_factory=list)
    undecided: int = 0

    @property
    def takeovers(self) -> tuple[int, int]:
        """How many of the sounds that were meant were answered, and how many there were."""
        meant = [verdict for verdict in self.verdicts if verdict.meant]
        return sum(verdict.decision == "query" for verdict in meant), len(meant)

    @property
    def false_takeovers(self) -> tuple[int, int]:
        """The same of those that were not meant."""
        others = [verdict for verdict in self.verdicts if not verdict.meant and verdict.right is not None]
        return sum(verdict.decision == "query" for verdict in others), len(others)


def score(course: Course) -> Scores:
    """The scores of a scene."""
    scores = Scores()
    stopped = {event.utterance: event for event in course.of(SpeechStopped)}
    decisions = {event.utterance: event for event in [*course.of(Recognised), *course.of(Ignored)]}
    scores.undecided = len(stopped.keys() - decisions.keys())
    owners = {sound.name: _utterance(course, sound.name, stopped) for sound in course.scene.sounds}
    meant = {owners[sound.name] for sound in course.scene.sounds if sound.meant} - {None}
    queries: dict[int, float] = {}  # utterance -> when the query ended
    for sound in course.scene.sounds:
        owner = owners[sound.name]
        decision = decisions.get(owner)
        if not sound.meant and owner in meant:
            scores.verdicts.append(Verdict(sound.name, False, "mixed", None))
            continue
        said = "not heard" if decision is None else "query"
        if isinstance(decision, Ignored):
            said = f"ignored: {decision.state}"
        scores.verdicts.append(Verdict(sound.name, sound.meant, said, (said == "query") == sound.meant))
        if sound.meant and said == "query":
            queries[owner] = max(queries.get(owner, 0.0), course.sounds[sound.name].end)
    _latencies(course, queries, scores)
    return scores


def _utterance(course: Course, name: str, stopped: dict[int, SpeechStopped]) -> int | None:
    span = course.sounds[name]
    overlaps = {
        number: min(event.end / SAMPLE_RATE, span.end) - max(event.start / SAMPLE_RATE, span.start)
        for number, event in stopped.items()
    }
    best = max(overlaps, key=overlaps.get, default=None)
    return best if best is not None and overlaps[best] > BELONGS * (span.end - span.start) else None


def _latencies(course: Course, queries: dict[int, float], scores: Scores) -> None:
    audible: dict[int, list[float]] = {}
    for span in course.audible:
        audible.setdefault(span.name, []).extend((span.start, span.end))
    recognised = {event.utterance: event.at for event in course.of(Recognised)}
    asked_by = {event.response: event.utterance for event in course.of(ResponseStarted)}
    cancelled = {event.response for event in course.of(ResponseDone) if event.status == CANCELLED}
    for response, utterance in asked_by.items():
        if utterance in queries and response in audible:
            scores.responses.append(min(audible[response]) - queries[utterance])
        stopper = asked_by.get(response + 1)
        if response in cancelled and stopper is not None and response in audible:
            scores.stops.append(max(max(audible[response]) - recognised[stopper], 0.0))
            if stopper in queries:
                scores.silences.append(max(audible[response]) - queries[stopper])


def format_scores(scores: Scores) -> str:
    """The scores as lines of text."""

    def share(part: tuple[int, int]) -> str:
        return f"{part[0]} of {part[1]}" + (f" ({100 * part[0] / part[1]:.0f} %)" if part[1] else "")

    def seconds(values: Sequence[float]) -> str:
        if not values:
            return "-"
        return (
            f"median {1000 * statistics.median(values):.0f} ms, most {1000 * max(values):.0f} ms, {len(values)} times"
        )

    lines = [
        f"{'takeover':18}{share(scores.takeovers)}",
        f"{'false takeover':18}{share(scores.false_takeovers)}",
        f"{'stop latency':18}{seconds(scores.stops)} (goal {1000 * MAX_STOP_SECONDS:.0f} ms)",
        f"{'silence latency':18}{seconds(scores.silences)}",
        f"{'response latency':18}{seconds(scores.responses)}",
    ]
    wrong = [f"{verdict.name!r}: {verdict.decision}" for verdict in scores.verdicts if verdict.right is False]
    if wrong:
        lines.append(f"{'wrong':18}" + "; ".join(wrong))
    if scores.undecided:
        lines.append(f"{'undecided':18}{scores.undecided} utterances")
    return "\n".join(lines)
