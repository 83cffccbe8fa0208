"""How many people can talk to a server at once: simulated ones, over the realtime API on loopback.

    python -m experiments.benchmarks.talkers
    python -m experiments.benchmarks.talkers --talkers 4 --minutes 5 --answers 1
    python -m experiments.benchmarks.talkers --talkers 6 --sessions 4 --url http://localhost:8400

Every talker has a picture of its own and, again and again, opens a session, shows it, asks aloud about it, as fast as
one speaks and with the microphone open all the time, hears the answer to its end, asks a second question, and leaves.
Before that each of them has done so alone: what it is told among others must be what it was told alone, so a session
that heard, saw or reset another one would show. Talkers beyond the sessions a server takes are turned away and come
again after the time that it names.

A question begins at a multiple of 0.8 s of a session's sound, where blocks and the windows that speech is detected in
begin together: it is then heard alike each time.

First audio is the time from the last sample of the question to the first sound of the answer; the silence that ends an
utterance (half a second) is part of it. The server's memory is read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.scenes import Scene, draw_sheet
from data_pipelines.speech.synthesizer import Synthesizer
from experiments.benchmarks.turns import describe_machine, format_machine, format_table, write_page
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import resample
from vita_jax.serving.sounds import RATE, to_bytes

WEIGHTS = Path(__file__).parents[1] / "quickstart" / "weights"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "uvicorn", "websockets")
NOTES = "## What this says"  # from here on the written file is kept: a person's words
QUESTIONS = (("Count the digits.", "en-us"), ("Describe the picture.", "en-gb"))
BLOCK_SECONDS = 0.1
ALIGNED_BLOCKS = 8  # 0.8 s: 25 windows of 32 ms
PATIENCE = 30.0  # seconds without an answer: it was dropped
START_SECONDS = 300.0  # that a server may take to start


@dataclass
class Figures:
    """What the talkers met.

    Attributes:
      first_audio: seconds, of every answer, in order.
      answers, ignored: questions that were answered, and that were taken for noise.
      different: answers that were others than alone.
      dropped: questions without an answer, and sessions that broke off.
      refused: sessions for which there was no room.
      memory: (seconds since the beginning, MiB of the server).
    """

    first_audio: list[float] = field(default_factory=list)
    answers: int = 0
    ignored: int = 0
    different: int = 0
    dropped: int = 0
    refused: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Talker:
    """One of them. alone: what it was told without the others, by question."""

    number: int
    picture: str
    alone: list[str] = field(default_factory=list)


def make_pictures(count: int) -> list[str]:
    """Data URLs of pictures with digits, each another."""
    scans, urls = load_scan_splits(0)["held_out"], []
    for number, digits in zip(range(count), itertools.permutations(range(10), 4), strict=False):
        shown = digits[: 1 + number % 4]
        sheet = Scene(columns=2, rows=2, digits=shown, cells=tuple(range(len(shown))), ink=1 + number % 3, paper=4)
        pixels, _ = draw_sheet(sheet, scans, np.random.default_rng(number))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def make_questions() -> list[np.ndarray]:
    """(n,) float32 at 24 kHz each."""
    synthesizer, spoken = Synthesizer(), []
    for text, voice in QUESTIONS:
        samples, rate = synthesizer.speak(text, voice)
        spoken.append(resample(np.asarray(samples, np.float32), rate, RATE))
    return spoken


class Microphone:
    """Sends sound as it is spoken, silence in between, so long as the block lasts."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._left = socket, np.zeros((0,), np.float32)
        self._next: np.ndarray | None = None
        self.ended: float | None = None  # when the last sample of the question was sent
        self._task: asyncio.Task[None] | None = None

    def say(self, samples: np.ndarray) -> None:
        """The next question."""
        self._next, self.ended = samples, None

    async def __aenter__(self) -> Microphone:
        self._task = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        size, start = int(BLOCK_SECONDS * RATE), time.monotonic()
        for count in itertools.count(1):
            await asyncio.sleep(max(0.0, start + count * BLOCK_SECONDS - time.monotonic()))
            if self._next is not None and (count - 1) % ALIGNED_BLOCKS == 0:
                self._left, self._next = self._next, None
            block, self._left = self._left[:size], self._left[size:]
            spoke = len(block) > 0
            data = base64.b64encode(to_bytes(np.pad(block, (0, size - len(block))))).decode()
            await self._socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": data}))
            if spoke and not len(self._left):
                self.ended = time.monotonic()


async def answer(socket: ClientConnection, microphone: Microphone) -> tuple[str | None, float, float]:
    """Waits for an answer: its text (None: ignored), seconds to its first sound, seconds of sound."""
    text, first, seconds = "", 0.0, 0.0
    while True:
        event = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))
        match event["type"]:
            case "response.output_audio.delta":
                if not seconds:
                    first = time.monotonic() - (microphone.ended or time.monotonic())
                seconds += len(base64.b64decode(event["delta"])) / 2 / RATE
            case "response.output_audio_transcript.delta":
                text += event["delta"]
            case "vita_jax.input_audio_buffer.ignored":
                return None, 0.0, 0.0
            case "error":
                raise UserError(f"the server says: {event['error']['message']}")
            case "response.done":
                return text, first, seconds


async def converse(url: str, talker: Talker, questions: Sequence[np.ndarray], figures: Figures | None) -> list[str]:
    """One session. Returns what was said, "" for what was ignored; figures: None = it is alone."""
    said = []
    async with connect(f"{url.replace('http', 'ws', 1)}/v1/realtime", max_size=None) as socket:
        content = [{"type": "input_image", "image_url": talker.picture}]
        item = {"type": "message", "role": "user", "content": content}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        async with Microphone(socket) as microphone:
            for number, samples in enumerate(questions):
                microphone.say(samples)
                text, first, seconds = await answer(socket, microphone)
                said.append(text or "")
                if figures is not None:
                    figures.ignored += text is None
                    figures.answers += text is not None
                    if said[-1] != talker.alone[number]:
                        figures.different += 1
                        told = f"question {number + 1}: {said[-1]!r}, alone {talker.alone[number]!r}"
                        print(f"talker {talker.number}, {told}", file=sys.stderr)
                    if seconds:
                        figures.first_audio.append(first)
                await asyncio.sleep(seconds + 0.3)  # it is heard to its end
    return said


async def talk(url: str, talker: Talker, questions: Sequence[np.ndarray], end: float, figures: Figures) -> None:
    """Sessions until the end."""
    rng = np.random.default_rng(talker.number)
    while time.monotonic() < end:
        try:
            await converse(url, talker, questions, figures)
        except InvalidStatus as refused:
            figures.refused += 1
            await asyncio.sleep(float(refused.response.headers.get("Retry-After", 1)) * rng.uniform(0.3, 1))
        except (TimeoutError, ConnectionClosed, OSError, UserError) as error:
            figures.dropped += 1
            print(f"talker {talker.number}: {type(error).__name__} {error}", file=sys.stderr)
        await asyncio.sleep(rng.uniform(0.2, 1.5))


async def watch(pid: int | None, end: float, figures: Figures) -> None:
    """The server's memory."""
    begun = time.monotonic()
    while pid is not None and time.monotonic() < end:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        figures.memory.append((time.monotonic() - begun, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        await asyncio.sleep(2)


async def measure(url: str, talkers: Sequence[Talker], seconds: float, pid: int | None) -> Figures:
    """All of them: alone one after the other, then together."""
    figures, questions = Figures(), make_questions()
    for talker in talkers:
        talker.alone = await converse(url, talker, questions, None)
        print(f"talker {talker.number} alone: {talker.alone}", flush=True)
    end = time.monotonic() + seconds
    await asyncio.gather(watch(pid, end, figures), *(talk(url, talker, questions, end, figures) for talker in talkers))
    return figures


def growth(memory: Sequence[tuple[float, float]]) -> float:
    """MiB a minute over the second half, by least squares; 0 where there is too little."""
    late = [point for point in memory if point[0] >= memory[-1][0] / 2] if memory else []
    if len(late) < 3:
        return 0.0
    return 60 * float(np.polyfit(*zip(*late, strict=True), 1)[0])


def format_figures(figures: Figures, talkers: int, seconds: float, *, markdown: bool = False) -> str:
    """The table."""
    first = figures.first_audio or [float("nan")]
    rows = [
        ("talkers; minutes", f"{talkers}; {seconds / 60:g}"),
        ("questions answered; taken for noise", f"{figures.answers}; {figures.ignored}"),
        ("first audio p50; p95; longest", "; ".join(f"{np.quantile(first, q):.2f} s" for q in (0.5, 0.95, 1.0))),
        ("dropped", f"{figures.dropped}"),
        ("other than alone", f"{figures.different}"),
        ("sessions refused for want of room", f"{figures.refused}"),
    ]
    if figures.memory:
        size = (
            f"{figures.memory[0][1]:.0f}; {figures.memory[-1][1]:.0f} MiB; {growth(figures.memory):+.1f} MiB a minute"
        )
        rows.append(("memory at the beginning; end; growth in the second half", size))
    return format_table(("", ""), rows, markdown=markdown)


def start_server(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address. Raises UserError if it does not start."""
    command = [sys.executable, "-m", "vita_jax.serve", "--checkpoint", arguments.checkpoint, "--port", "0"]
    command += ["--answers", str(arguments.answers), "--limit", f"sessions={arguments.sessions or arguments.talkers}"]
    command += ["--limit", "requests_per_minute=100000"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + START_SECONDS
    for line in server.stdout:
        address = next((word for word in line.split() if word.startswith("http")), None)
        if address is not None:
            return server, address
        if time.monotonic() > end:
            break
    server.kill()
    raise UserError("the server does not start; run python -m vita_jax.serve to see why")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    if arguments.talkers < 1 or arguments.minutes <= 0:
        raise UserError("--talkers must be at least 1 and --minutes above 0")
    machine = describe_machine(PACKAGES)
    talkers = [Talker(number, picture) for number, picture in enumerate(make_pictures(arguments.talkers))]
    server, url = (None, arguments.url) if arguments.url else start_server(arguments)
    seconds = 60 * arguments.minutes
    try:
        figures = asyncio.run(measure(url, talkers, seconds, server.pid if server else None))
        left = urllib.request.urlopen(f"{url}/metrics").read().decode()
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    sessions = next(line for line in left.splitlines() if line.startswith("vita_jax_sessions "))
    print(format_figures(figures, len(talkers), seconds))
    print(f"sessions left behind: {sessions.split()[1]}; {format_machine(machine)}")
    if arguments.write:
        table = format_figures(figures, len(talkers), seconds, markdown=True)
        text = f"# Talkers at once\n\n{table}\n\n{format_machine(machine)}\n"
        write_page(RESULTS / "talkers", text, NOTES, {"machine": machine, "figures": vars(figures)})
    return 0


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks.talkers", description="Many talkers at once.", epilog=__doc__
    )
    parser.add_argument("--checkpoint", default=str(WEIGHTS), help="what is served (default the kept weights)")
    parser.add_argument("--talkers", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long (default 3)")
    parser.add_argument("--sessions", type=int, help="that the server takes (default as many as talkers)")
    parser.add_argument("--answers", type=int, default=1, help="see vita_jax.serve (default 1)")
    parser.add_argument("--url", help="a server that runs already, without a token")
    parser.add_argument("--write", action="store_true", help="write results/talkers.md and .json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
