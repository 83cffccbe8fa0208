"""Scenes: what a file may say, how a course is scored, how it is drawn. The model is scripted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.media import write_wav
from tests.inference.scripted import UNIT, Line, Loudness, ScriptedStreams, ScriptedVoice
from tests.training.tiny import experiment
from vita_jax import duplex as command
from vita_jax.errors import UserError
from vita_jax.inference.duplex import Duplex, DuplexOptions
from vita_jax.inference.duplex_events import ResponseDone
from vita_jax.inference.scene import Moment, Scene, SceneSound, Source, read_scene
from vita_jax.inference.scene_picture import check_picture, draw, draw_text, format_happenings
from vita_jax.inference.scene_run import RunOptions, run_scene
from vita_jax.inference.scene_score import Scores, format_scores, score

LONG = "one two three four, five six seven eight, nine ten."


def sound(number: int, moment: Moment, seconds: float = 0.5, meant: bool = True) -> SceneSound:
    return SceneSound(str(number), moment, np.full(round(16000 * seconds), UNIT * number, np.float32), meant)


def play(lines: dict[int, Line], *sounds: SceneSound, **options):
    class Talk:
        turns, media, context = [], [], None

    def make(clock):
        voice = ScriptedVoice()
        return Duplex(
            ScriptedStreams(lines), Loudness(), lambda wave, text: voice, DuplexOptions(), session=Talk, clock=clock
        )

    return run_scene(Scene(sounds, noise_floor=0.0), make, RunOptions(**options))


def interrupted():
    return play(
        {1: Line(text=LONG), 2: Line("noise"), 3: Line(text="no.")},
        sound(1, Moment(0.5)),
        sound(2, Moment(0.0, "first sound"), 0.4, meant=False),
        sound(3, Moment(0.1, "ignored"), 0.4),
    )


def test_times_are_counted_from_what_happens():
    course = interrupted()
    spans = course.sounds
    # The end of the first sound is noticed after 500 ms of silence, a chunk for each end of it, and two rounds.
    assert 1.5 <= min(span.start for span in course.audible) <= 1.75
    assert spans["2"].start == pytest.approx(min(span.start for span in course.audible), abs=0.03)
    assert spans["3"].start == pytest.approx(spans["2"].end + 0.6, abs=0.1)


def test_scores_of_an_interrupted_answer():
    course = interrupted()
    scores = score(course)
    assert scores.takeovers == (2, 2) and scores.false_takeovers == (0, 1) and scores.undecided == 0
    assert [(v.decision, v.right) for v in scores.verdicts] == [
        ("query", True),
        ("ignored: noise", True),
        ("query", True),
    ]
    # Recognised, one round of 20 ms until the player hears of it, 20 ms that the sound card has.
    assert scores.stops == [pytest.approx(0.04, abs=1e-6)]
    assert len(scores.silences) == 1 and 0.5 < scores.silences[0] < 0.75 and len(scores.responses) == 2
    (first, second) = course.of(ResponseDone)
    heard = sum(span.end - span.start for span in course.audible if span.name == 1)
    # Of what it knows: two rounds ago the player was 40 ms behind.
    assert first.status == "cancelled" and 0 <= heard / 0.3 - len(first.heard.split()) < 1 + 0.04 / 0.3
    text = format_scores(scores)
    assert "2 of 2 (100 %)" in text and "0 of 1 (0 %)" in text and "most 40 ms" in text and "wrong" not in text


def test_scores_of_scenes_are_a_result(tmp_path):
    """Two scenes: of three sounds that are meant two are answered, of the two others one."""
    wrong = play({1: Line("noise"), 2: Line(text="yes.")}, sound(1, Moment(0.2)), sound(2, Moment(2.0), meant=False))
    scores = {"a.json": score(interrupted()), "b.json": score(wrong)}
    arguments = command.make_parser().parse_args(["--script", "a.json", "b.json", "--round-ms", "40"])
    session = SimpleNamespace(config=experiment(tmp_path / "run"))
    written = command.write_scores(tmp_path / "duplex.json", scores, session, arguments)
    assert written[:2] == [tmp_path / "duplex.json", tmp_path / "duplex.jsonl"]
    result = json.loads(written[0].read_text())
    takeover, false = result["figures"]["takeover"], result["figures"]["false_takeover"]
    assert (takeover["value"], takeover["n"], takeover["low"], takeover["high"]) == (pytest.approx(2 / 3), 3, 0, 1)
    assert (false["value"], false["n"], false["low"], false["high"]) == (0.5, 2, 0, 1)
    stop = result["figures"]["stop_latency"]
    assert stop["n"] == 1 and all(stop[name] == pytest.approx(0.04, abs=1e-6) for name in ("value", "low", "most"))
    assert (result["scenes"], result["round_ms"], result["num_items"]) == (["a.json", "b.json"], 40.0, 5)
    assert {"commit", "changed", "version", "config"} <= set(result)
    lines = [json.loads(line) for line in written[1].read_text().splitlines()]
    assert [(line["scene"], line["text"], line["truth"], line["score"]) for line in lines] == [
        ("a.json", "query", "query", 1),
        ("a.json", "ignored: noise", "noise", 1),
        ("a.json", "query", "query", 1),
        ("b.json", "ignored: noise", "query", 0),
        ("b.json", "query", "noise", 0),
    ]


def test_wrong_decisions_are_named():
    course = play(
        {1: Line("noise"), 2: Line(text="yes.")},
        sound(1, Moment(0.2)),
        sound(2, Moment(2.0), meant=False),
        sound(3, Moment(4.0), 0.1, meant=False),  # too short to be an utterance
    )
    scores = score(course)
    assert scores.takeovers == (0, 1) and scores.false_takeovers == (1, 2)
    assert "'1': ignored: noise; '2': query" in format_scores(scores)


def test_sounds_that_overlap_are_one_utterance_and_not_counted():
    course = play({1: Line(), 2: Line(), 3: Line()}, sound(1, Moment(0.2)), sound(2, Moment(0.3), 0.3, meant=False))
    assert [(v.decision, v.right) for v in score(course).verdicts] == [("query", True), ("mixed", None)]
    assert format_scores(Scores()).count("0 of 0") == 2


def test_a_slow_machine_answers_late_and_loses_nothing():
    lines = {1: Line(text=LONG, thinks=4), 2: Line(text="no.", thinks=4)}
    sounds = sound(1, Moment(0.2)), sound(2, Moment(1.4), 0.4)
    quick, slow = play(lines, *sounds), play(lines, *sounds, round_seconds=0.2)
    assert score(quick).takeovers == score(slow).takeovers == (2, 2)
    assert score(slow).responses[-1] > score(quick).responses[-1] + 1.0
    assert [span.name for span in slow.audible][-1] == 2 and all(stop <= 0.42 for stop in score(slow).stops)


def test_what_does_not_happen_is_said():
    with pytest.raises(UserError, match="'2' still waited for 'done' number 3, which did not happen"):
        play({1: Line()}, sound(1, Moment(0.2)), sound(2, Moment(0.0, "done", 3)))


def test_the_picture_in_text_says_who_spoke_when():
    course = interrupted()
    lines = draw_text(course).splitlines()
    assert [line[:12].strip() for line in lines[:-1]] == [
        "seconds", "to the model", "not to it", "heard", "stream 0", "stream 1"
    ]  # fmt: skip
    step = 0.05 if course.end <= 5 else 0.1
    row = {line[:14].strip(): line[14:] for line in lines}
    assert row["to the model"].index("█") == round(0.5 / step) and row["not to it"].count("▒") == round(0.4 / step)
    assert row["heard"].count("Q") == 2 and row["heard"].count("x") == 1
    assert row["stream 0"].rstrip()[-1] == "!" and "█" in row["stream 0"] and "█" in row["stream 1"]
    assert row["stream 0"].index("!") <= row["stream 1"].index("█")
    happened = format_happenings(course)
    assert "utterance 2 is ignored: noise" in happened and "answer 1 is cancelled" in happened


def test_the_picture_as_a_file(tmp_path):
    course = interrupted()
    draw(course, tmp_path / "a.png")
    draw(course, tmp_path / "a.html", "scores <here>")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "scores &lt;here&gt;" in page and "is ignored: noise" in page
    for name, message in (("a.svg", ".png or .html"), ("none/a.png", "no folder")):
        with pytest.raises(UserError, match=message):
            check_picture(tmp_path / name)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(path, **content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_file_is_read(tmp_path):
    write_wav(tmp_path / "a.wav", np.full(1600, 0.25, np.float32), 16000)
    path = write(
        tmp_path / "scene.json",
        show=[{"image": "p.png", "at": 1}],
        sounds=[
            {"wav": "a.wav", "at": 0.5, "gain": 2},
            {
                "name": "tone",
                "made": "up",
                "long": 3,
                "at": {"after": "first sound", "nth": 2, "plus": 0.1},
                "meant": False,
            },
        ],
        noise_floor=0.001,
    )
    made = Source(lambda entry: np.ones(entry["long"]), frozenset({"long"}))
    scene = read_scene(path, {"made": made})
    first, second = scene.sounds
    assert (first.name, first.moment, first.meant) == ("wav a.wav", Moment(0.5), True)
    np.testing.assert_allclose(first.samples, np.full(1600, 0.5), atol=1e-4)
    assert (second.moment, second.meant, len(second.samples)) == (Moment(0.1, "first sound", 2), False, 3)
    assert scene.images[0].path == tmp_path / "p.png" and scene.noise_floor == 0.001


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "sounds is None"),
        ({"sounds": []}, "at least one sound"),
        ({"sounds": [{"at": 0}]}, "exactly one source"),
        ({"sounds": [{"wav": "a.wav"}], "speed": 1}, "unknown field 'speed'"),
        ({"sounds": [{"wav": "none.wav", "at": 0}]}, "none.wav"),
        ({"sounds": [{"say": "a", "at": 0, "volume": 1}]}, "unknown field 'volume'"),
        ({"sounds": [{"say": "a", "at": {"after": "lunch"}}]}, "at.after is 'lunch'; expected one of"),
        ({"sounds": [{"say": "a", "at": -1}]}, "seconds from 0"),
        ({"sounds": [{"say": "a", "at": 0, "meant": "yes"}]}, "meant is 'yes'"),
        ({"sounds": [{"say": "a", "at": {"after": "done", "nth": 0}}]}, "nth is 0"),
        ({"sounds": [{"say": "a", "at": 0, "voice": "nobody"}]}, "unknown voice 'nobody'"),
        ({"sounds": [{"noise": "thunder", "at": 0}]}, "noise 'thunder' is unknown"),
        ({"sounds": [{"noise": "hum", "seconds": 0, "at": 0}]}, "from 0.1 to 60"),
        ({"sounds": [{"say": "a", "at": 0}], "show": [{"at": 0}]}, "image is None"),
    ],
)
def test_mistakes_name_the_field(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_scene(write(tmp_path / "scene.json", **content), command.sources())


def test_the_command_says_what_is_wrong_before_it_loads_anything(tmp_path, capsys):
    path = write(tmp_path / "scene.json", sounds=[{"noise": "hum", "at": 0, "seconds": 0.2, "meant": False}])
    for arguments, message in (
        ([], "--script"),
        (["--script", str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--script", str(path), "--picture", "a.gif"], ".png or .html"),
        (["--script", str(path), str(path), "--picture", "a.png"], "is of one scene; --script has 2"),
        (["--script", str(path), "--output", "a.txt"], "its name must end with .json"),
        (["--script", str(path), "--round-ms", "0"], "must take some time"),
        (["--script", str(path), "--checkpoint", str(tmp_path / "none")], "does not exist"),
    ):
        assert command.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
