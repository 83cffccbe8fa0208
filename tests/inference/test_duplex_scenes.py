"""Scenes with the kept weights: they hear questions about a picture while they answer one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.scenes import Scene as Sheet
from data_pipelines.quickstart.scenes import draw_sheet
from tests.data.media import write_wav
from vita_jax import chat
from vita_jax import duplex as command
from vita_jax.inference.duplex import Duplex, DuplexOptions
from vita_jax.inference.duplex_events import Ignored, Recognised, ResponseDone, ResponseStarted, SpeechStarted
from vita_jax.inference.scene import Moment, Scene, SceneImage, SceneSound
from vita_jax.inference.scene_run import Course, RunOptions, run_scene
from vita_jax.inference.scene_score import MAX_STOP_SECONDS, score
from vita_jax.inference.session import Session

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "experiments/quickstart/weights"
DIGITS = (4, 2, 7, 1)
DESCRIBE, COUNT, STATEMENT = (
    "Describe the picture.",
    "Count the digits.",
    "The train was late again and we had to wait.",
)
START = Moment(0.4)
# Right when the one before is over: while its answer is being made or heard.
AT_ONCE = Moment(0.05, "speech stopped")
LONG_AGO = "red/white: 4271\nWhat are the digits?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def loaded() -> Session:
    return Session.load(WEIGHTS, num_rows=2)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "digits.png"
    sheet = Sheet(columns=2, rows=4, digits=DIGITS, cells=(0, 2, 4, 6), ink=1, paper=2)
    pixels, _ = draw_sheet(sheet, load_scan_splits(0)["held_out"], np.random.default_rng(5))
    Image.fromarray(pixels).save(path)
    return path


def said(text: str, moment: Moment, voice: str = "en-us", meant: bool = True) -> SceneSound:
    # Short questions are asked fast: the kept weights' answers take no two seconds.
    how = {"say": text, "voice": voice, "rate_wpm": 220 if text == COUNT else 175}
    return SceneSound(f"{text} {moment}", moment, command.sources()["say"].make(how), meant)


@pytest.fixture
def play(loaded, picture):
    def run(*sounds: SceneSound, session: Session | None = None, round_seconds=0.02, **options) -> Course:
        scene = Scene(sounds, (SceneImage(Moment(0.0), picture),))
        run.session = loaded.beside() if session is None else session
        return run_scene(
            scene,
            lambda clock: Duplex.of(run.session, DuplexOptions(**options), clock=clock),
            RunOptions(round_seconds=round_seconds),
        )

    return run


def answers(course: Course) -> list[str]:
    return [event.text for event in course.of(ResponseDone)]


def statuses(course: Course) -> list[str]:
    return [event.status for event in course.of(ResponseDone)]


@pytest.mark.parametrize("decide", ["token", "head"])
def test_a_statement_to_somebody_else_is_ignored_while_the_answer_goes_on(play, decide):
    alone = play(said(DESCRIBE, START), decide=decide)
    course = play(said(DESCRIBE, START), said(STATEMENT, AT_ONCE, "en-gb", False), decide=decide)
    assert [event.state for event in course.of(Ignored)] == ["noise"]
    assert statuses(course) == ["completed"] and answers(course) == answers(alone)
    assert sum(span.end - span.start for span in course.audible) == sum(s.end - s.start for s in alone.audible) > 1.0
    scores = score(course)
    assert scores.takeovers == (1, 1) and scores.false_takeovers == (0, 1) and not scores.undecided
    assert [turn["value"][:1] for turn in play.session.turns] == ["<", "☞"]
    # It began to speak while the answer was heard.
    assert course.of(SpeechStarted)[1].sample / 16000 < course.audible[-1].end


@pytest.mark.parametrize("decide", ["token", "head"])
def test_a_question_stops_the_answer_and_is_answered_by_the_other_stream(play, decide):
    course = play(said(DESCRIBE, START), said(COUNT, AT_ONCE, "en-gb"), decide=decide)
    first, second = course.of(ResponseDone)
    assert (first.status, second.status) == ("cancelled", "completed") and second.text.strip() == "4"
    assert [event.stream for event in course.of(ResponseStarted)] == [0, 1]
    scores = score(course)
    assert scores.takeovers == (2, 2) and len(scores.stops) == 1 and scores.stops[0] <= MAX_STOP_SECONDS
    assert first.text.startswith(first.heard) and 0 < len(first.heard) < len(first.text)
    assert play.session.turns[1]["value"] == "☞" + first.heard
    # Nothing of the first answer is heard once the second query is recognised, but what the sound card had.
    end = max(span.end for span in course.audible if span.name == 1)
    assert end <= course.of(Recognised)[1].at + MAX_STOP_SECONDS


def test_before_the_first_sample_the_question_gives_way_with_its_picture_kept(play):
    course = play(said(DESCRIBE, START), said(COUNT, AT_ONCE, "en-gb"), round_seconds=0.3)
    assert statuses(course) == ["cancelled", "completed"] and {span.name for span in course.audible} == {2}
    assert course.of(ResponseDone)[0].heard == "" and answers(course)[1].strip() == "4"
    assert [turn["value"].strip() for turn in play.session.turns] == ["<image>\n<audio>", "☞4"]


def test_after_the_last_sample_it_is_the_next_turn(play):
    course = play(said(DESCRIBE, START), said(COUNT, Moment(0.1, "done"), "en-gb"))
    assert statuses(course) == ["completed", "completed"] and answers(course)[1].strip() == "4"
    assert not score(course).stops


def test_twice_in_a_row(play):
    course = play(
        said(DESCRIBE, START), said(DESCRIBE, AT_ONCE, "en-gb"), said(COUNT, Moment(0.05, "speech stopped", 2))
    )
    assert statuses(course) == ["cancelled", "cancelled", "completed"]
    heard = [event.heard for event in course.of(ResponseDone)]
    assert all(heard) and heard[2].strip().isdecimal()
    assert [turn["value"] for turn in play.session.turns[1::2]] == ["☞" + text for text in heard]
    assert [event.stream for event in course.of(ResponseStarted)] == [0, 1, 0]
    scores = score(course)
    assert scores.takeovers == (3, 3) and max(scores.stops) <= MAX_STOP_SECONDS


def test_during_prefill(play, loaded):
    """A long conversation, a machine that takes a second for a round: the next question comes before it is read."""
    session = loaded.beside()
    session.turns = [{"from": "human", "value": LONG_AGO}, {"from": "gpt", "value": "☜4271"}] * 45
    course = play(said(DESCRIBE, START), said(COUNT, Moment(2.4), "en-gb"), session=session, round_seconds=1.0)
    first, second = course.of(Recognised)
    assert course.sounds[f"{COUNT} {Moment(2.4)}"].start < first.at < second.at
    assert statuses(course) == ["cancelled", "completed"] and not score(course).undecided
    assert {span.name for span in course.audible} == {2} and len(session.turns) == 92


def test_two_devices_say_the_same(play, picture):
    """The second stream on a device of its own."""
    course = play(said(DESCRIBE, START), said(COUNT, AT_ONCE, "en-gb"))
    script = f"""
import jax
from pathlib import Path
from tests.inference import test_duplex_scenes as here
from vita_jax.inference.session import Session
assert len(jax.devices()) == 2
with jax.default_matmul_precision("highest"):
    scene = here.Scene((here.said(here.DESCRIBE, here.START), here.said(here.COUNT, here.AT_ONCE, "en-gb")),
                       (here.SceneImage(here.Moment(0.0), Path({str(picture)!r})),))
    session = Session.load(here.WEIGHTS)
    def make(clock):
        duplex = here.Duplex.of(session, here.DuplexOptions(devices=2), clock=clock)
        tables = [engine._params["embed_tokens"]["embedding"] for engine in duplex._streams.engines]
        places = [next(iter(table.devices())) for table in tables]
        assert len(set(places)) == 2, places
        return duplex
    course = here.run_scene(scene, make, here.RunOptions())
print(here.json.dumps([[e.status, e.text, e.heard] for e in course.of(here.ResponseDone)]))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    want = [[event.status, event.text, event.heard] for event in course.of(ResponseDone)]
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_the_command_prints_a_scene_and_its_scores(tmp_path, capsys):
    arguments = ["--script", str(ROOT / "experiments/quickstart/scene.json"), "--checkpoint", str(WEIGHTS)]
    arguments += ["--output", str(tmp_path / "duplex.json")]
    assert command.main([*arguments, "--picture", str(tmp_path / "scene.html")]) == 0
    printed, written = capsys.readouterr().out.split("\n\nwritten: ")
    printed, picture = printed.split("\n\npicture: ")
    assert written.startswith(str(tmp_path / "duplex.json"))
    assert json.loads((tmp_path / "duplex.json").read_text())["figures"]["takeover"]["n"] == 3
    assert printed.splitlines()[0].startswith("seconds") and "stream 1" in printed
    scores = {line[:18].strip(): line[18:] for line in printed.splitlines()[-7:]}
    assert scores["takeover"].startswith("3 of 3") and scores["false takeover"].startswith("0 of 2")
    assert "goal 200 ms" in scores["stop latency"] and "1 times" in scores["stop latency"]
    assert (tmp_path / "scene.html").stat().st_size > 10_000


def test_chat_hears_files_in_place_of_a_microphone(picture, tmp_path, capsys):
    for number, (text, voice) in enumerate(((DESCRIBE, "en-us"), (STATEMENT, "en-gb"), (COUNT, "en-gb"))):
        write_wav(tmp_path / f"{number}.wav", said(text, START, voice).samples)
    files = [str(tmp_path / f"{number}.wav") for number in range(3)]
    spoken = tmp_path / "replies.wav"
    arguments = ["--checkpoint", str(WEIGHTS), "--image", str(picture), "--duplex", "--audio", *files]
    assert chat.main([*arguments, "--speak", str(spoken)]) == 0
    first, refused, second, written = capsys.readouterr().out.splitlines()
    assert first.startswith("> ") and first.endswith("4271") and (refused, second.strip()) == (chat.NOT_MEANT, "> 4")
    assert written.startswith(f"spoken: {spoken} (") and spoken.stat().st_size > 32_000


def test_both_streams_share_one_set_of_weights(loaded):
    duplex = Duplex.of(loaded.beside(), speak=False)
    (engine,) = duplex._streams.engines
    assert engine is loaded.engine and all(seat.engine is engine for seat in duplex._streams.seats)
    mine = jax.tree.leaves(engine._params)
    assert all(one is other for one, other in zip(mine, jax.tree.leaves(loaded.params["language"]), strict=True))
    duplex.close()
