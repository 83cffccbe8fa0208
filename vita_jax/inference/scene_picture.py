"""The course of a scene as a picture of time: who spoke when, what was heard, which stream answered."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from vita_jax.errors import UserError
from vita_jax.inference.duplex_events import (
    CANCELLED,
    COMPLETED,
    Ignored,
    Recognised,
    ResponseDone,
    ResponseSent,
    ResponseStarted,
    SpeechStarted,
    SpeechStopped,
    TextDelta,
)
from vita_jax.inference.scene_run import Course
from vita_jax.inference.vad import SAMPLE_RATE

COLUMNS = 100  # of the picture in text
SECONDS_PER_COLUMN = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PICTURES = (".png", ".html")

# Kind of a bar -> its character and its colour.
MEANT, NOT_MEANT, HEARD, DECIDING, WRITING, SPEAKING = "meant", "not meant", "heard", "deciding", "writing", "speaking"
LOOKS = {
    MEANT: ("█", "#2b6cb0"),
    NOT_MEANT: ("▒", "#a0aec0"),
    HEARD: ("─", "#90cdf4"),
    DECIDING: ("?", "#f6ad55"),
    WRITING: ("·", "#c6f6d5"),
    SPEAKING: ("█", "#2f855a"),
}
# Kind of a mark -> its character and its colour.
MARKS = {Recognised: ("Q", "#2f855a"), Ignored: ("x", "#718096"), CANCELLED: ("!", "#c53030")}


@dataclass(frozen=True)
class Lane:
    """One line of the picture. bars: (start, end, kind of LOOKS) in seconds; marks: (time, kind of MARKS)."""

    name: str
    bars: tuple[tuple[float, float, str], ...]
    marks: tuple[tuple[float, type | str], ...] = ()


def lanes(course: Course) -> list[Lane]:
    """The lines of the picture, from those who speak to the model to what it says."""
    sounds = [(sound.meant, course.sounds[sound.name]) for sound in course.scene.sounds]
    found = [Lane("to the model", tuple((span.start, span.end, MEANT) for meant, span in sounds if meant))]
    others = tuple((span.start, span.end, NOT_MEANT) for meant, span in sounds if not meant)
    if others:
        found.append(Lane("not to it", others))
    started = {event.utterance: event.sample / SAMPLE_RATE for event in course.of(SpeechStarted)}
    decisions = [*course.of(Recognised), *course.of(Ignored)]
    decided = {event.utterance: event.at for event in decisions}
    bars: list[tuple[float, float, str]] = []
    for event in course.of(SpeechStopped):
        bars.append((started[event.utterance], event.at, HEARD))
        if decided.get(event.utterance, event.at) > event.at:
            bars.append((event.at, decided[event.utterance], DECIDING))
    found.append(Lane("heard", tuple(bars), tuple((event.at, type(event)) for event in decisions)))
    done = {event.response: event for event in course.of(ResponseDone)}
    sent = {event.response: event.at for event in course.of(ResponseSent)}
    for stream in (0, 1):
        mine = [event for event in course.of(ResponseStarted) if event.stream == stream]
        bars = [
            (event.at, min(sent.get(event.response, done[event.response].at), done[event.response].at), WRITING)
            for event in mine
        ]
        numbers = {event.response for event in mine}
        bars += [(span.start, span.end, SPEAKING) for span in course.audible if span.name in numbers]
        marks = [(done[n].at, CANCELLED) for n in sorted(numbers) if done[n].status == CANCELLED]
        found.append(Lane(f"stream {stream}", tuple(bars), tuple(marks)))
    return found


def draw_text(course: Course) -> str:
    """The picture in characters, with a scale in seconds."""
    step = next((s for s in SECONDS_PER_COLUMN if course.end / s <= COLUMNS), SECONDS_PER_COLUMN[-1])
    columns = int(course.end / step) + 1
    width = max(len(lane.name) for lane in lanes(course)) + 2
    scale = [" "] * (columns + 8)
    for column in range(0, columns, 10):
        label = f"{column * step:g}"
        scale[column : column + len(label)] = label
    lines = [f"{'seconds':{width}}" + "".join(scale).rstrip()]
    for lane in lanes(course):
        row = [" "] * columns
        for start, end, kind in lane.bars:
            first, last = int(start / step + 0.5), int(end / step + 0.5)
            for column in range(first, min(max(last, first + 1), columns)):
                row[column] = LOOKS[kind][0]
        for time, kind in lane.marks:
            row[min(int(time / step + 0.5), columns - 1)] = MARKS[kind][0]
        lines.append(f"{lane.name:{width}}" + "".join(row).rstrip())
    key = (
        f"█ speaks  ▒ not to the model  ─ heard  ? undecided  Q query  x ignored  · writes  ! stopped; {step:g} s each"
    )
    return "\n".join([*lines, key])


def happenings(course: Course) -> list[tuple[float, str]]:
    """What happened, for readers: (seconds, line), in order."""
    found = [(span.start, f"{span.name!r} begins") for span in course.sounds.values()]
    texts: dict[int, str] = {}
    first = {}
    for span in course.audible:
        first.setdefault(span.name, span.start)
    found += [(at, f"answer {response} is heard") for response, at in first.items()]
    for _, event in course.events:
        match event:
            case SpeechStopped():
                seconds = (event.end - event.start) / SAMPLE_RATE
                found.append((event.at, f"utterance {event.utterance} is over ({seconds:.1f} s)"))
            case Ignored():
                found.append((event.at, f"utterance {event.utterance} is ignored: {event.reason or event.state}"))
            case Recognised():
                found.append((event.at, f"utterance {event.utterance} is a query ({event.state or 'no symbol'})"))
            case ResponseStarted():
                found.append((event.at, f"answer {event.response} begins on stream {event.stream}"))
            case TextDelta():
                texts[event.response] = texts.get(event.response, "") + event.text
            case ResponseDone(status=status):
                text = f"answer {event.response} is {status}: {event.text!r}"
                found.append((event.at, text if status == COMPLETED else f"{text}, heard {event.heard!r}"))
    return sorted(found, key=lambda item: item[0])


def format_happenings(course: Course) -> str:
    """`happenings` as lines of text."""
    return "\n".join(f"{at:8.2f}  {line}" for at, line in happenings(course))


def check_picture(path: str | Path) -> Path:
    """The path, if a picture may have it. Raises UserError for another kind of file, or if its folder is missing."""
    path = Path(path)
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path}: pictures are written as {' or '.join(PICTURES)}; give the file such a name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}; make it, or choose another")
    return path


def draw(course: Course, path: str | Path, caption: str = "") -> None:
    """Writes the picture as PNG, or as an HTML page with the picture and what happened.

    Raises:
      UserError: see `check_picture`, or it cannot be written.
    """
    path = check_picture(path)
    picture = io.BytesIO()
    figure(course).savefig(picture, format="png", dpi=150)
    content = picture.getvalue()
    if path.suffix.lower() == ".html":
        rows = "".join(f"<tr><td>{at:.2f}</td><td>{html.escape(line)}</td></tr>" for at, line in happenings(course))
        content = (
            "<!doctype html><meta charset='utf-8'><title>Duplex scene</title>"
            "<style>body{font-family:sans-serif;margin:2em}img{max-width:100%}td{padding:0 1em}</style>"
            f"<img alt='who spoke when' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"
            f"<pre>{html.escape(caption)}</pre><table><tr><th>seconds</th><th></th></tr>{rows}</table>\n"
        ).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def figure(course: Course) -> Figure:
    """The picture as a matplotlib figure."""
    found = lanes(course)
    with matplotlib.rc_context({"font.size": 8}):
        drawing = Figure(figsize=(max(6.0, min(0.8 * course.end, 24.0)), 0.5 * len(found) + 1.2), layout="constrained")
        axes = drawing.subplots()
        for row, lane in enumerate(reversed(found)):
            for start, end, kind in lane.bars:
                axes.broken_barh([(start, max(end - start, 0.01))], (row - 0.35, 0.7), facecolors=LOOKS[kind][1])
            for time, kind in lane.marks:
                character, colour = MARKS[kind]
                axes.plot([time, time], [row - 0.45, row + 0.45], color=colour, linewidth=1.5)
                axes.annotate(character, (time, row + 0.45), color=colour, ha="center", va="bottom", fontsize=7)
        axes.set_yticks(range(len(found)), [lane.name for lane in reversed(found)])
        axes.set_xlim(0, course.end)
        axes.set_xlabel("seconds")
        handles = [matplotlib.patches.Patch(color=colour, label=kind) for kind, (_, colour) in LOOKS.items()]
        axes.legend(handles=handles, ncols=len(handles), loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    return drawing
