"""`python -m vita_jax.duplex --script scene.json`: plays a scene to a model that listens while it talks; scores it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vita_jax.command_line import ArgumentParser, add_int8, json_file, run_command
from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import restart_with_huge_pages

if TYPE_CHECKING:
    import numpy as np

    from vita_jax.inference.scene import Source
    from vita_jax.inference.scene_score import Scores
    from vita_jax.inference.session import Session

EXAMPLES = """\
A scene is a JSON file that says which sounds are heard when, and which of them are meant for the model; times may also
be counted from what happens, such as the first sound of an answer (docs/talking.md). Sounds are WAV files ("wav"),
spoken by espeak-ng ("say", with "voice" and "rate_wpm") or made up ("noise": hum, white, pink, brown, chords, arpeggio,
babble, with "seconds"). It prints who spoke when, what happened, and the scores; of several scenes --output has the
figures of all together, with intervals.

Time is that of the sound. A round of the model's work takes 20 ms of it, so that the course is the same everywhere;
--measured has it take as long as it takes here.

examples:
  python -m vita_jax.duplex --script experiments/quickstart/scene.json --checkpoint experiments/quickstart/weights
  python -m vita_jax.duplex --script scene.json --picture scene.html
  python -m vita_jax.duplex --script scene.json --measured --voice espeak
  python -m vita_jax.duplex --script scenes/*.json --checkpoint runs/mine --output runs/mine/evaluation/duplex.json
"""

SAID_LEVEL = 0.07  # root mean square of what is spoken or made up
NOISE_SECONDS = 2.0
BABBLE = ("The train was late again.", "She bought some bread.", "It will rain tomorrow.", "They left at noon.")
BABBLE_VOICES = ("en-us", "en-gb", "en-029", "en-gb-scotland")


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m vita_jax.duplex", description="Plays a scene to a duplex conversation.", epilog=EXAMPLES
    )
    parser.add_argument("--script", metavar="FILE.json", nargs="+", required=True, help="the scene, or several")
    parser.add_argument(
        "--output", type=json_file, metavar="FILE.json", help="write scores, and a line for every sound beside it"
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", default="runs/quickstart", help="a run or a checkpoint; default runs/quickstart"
    )
    parser.add_argument("--picture", metavar="FILE", help="write who spoke when as .png or .html")
    parser.add_argument(
        "--voice", choices=("model", "espeak", "none"), default="model", help="what speaks; none: answers are text"
    )
    parser.add_argument(
        "--decide", choices=("auto", "token", "head"), default="auto", help="what tells queries from noise"
    )
    parser.add_argument("--devices", type=int, default=1, help="2: the second stream has a device of its own")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--round-ms", type=float, default=20.0, help="what a round of work takes (default 20)")
    time.add_argument("--measured", action="store_true", help="work takes as long as it takes on this machine")
    add_int8(parser)
    return parser


def duplex(arguments: argparse.Namespace) -> int:
    """Plays the scene, prints its course and its scores."""
    # Imported here so that --help and a mistyped argument answer at once.
    from vita_jax.chat import espeak_voice
    from vita_jax.inference.duplex import Duplex, DuplexOptions
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.inference.scene import read_scene
    from vita_jax.inference.scene_picture import check_picture, draw, draw_text, format_happenings
    from vita_jax.inference.scene_run import RunOptions, run_scene
    from vita_jax.inference.scene_score import format_scores, score
    from vita_jax.inference.session import Session
    from vita_jax.parallel.process import prepare_process
    from vita_jax.storage import on_disk

    if arguments.picture is not None:
        check_picture(arguments.picture)
        if len(arguments.script) > 1:
            raise UserError(f"--picture {arguments.picture} is of one scene; --script has {len(arguments.script)}")
    output = None if arguments.output is None else on_disk(arguments.output, "the scores of scenes")
    options = DuplexOptions(decide=arguments.decide, devices=arguments.devices)
    run = RunOptions(round_seconds=None if arguments.measured else arguments.round_ms / 1000)
    scenes = {script: read_scene(script, sources()) for script in arguments.script}
    prepare_process()
    session = Session.load(arguments.checkpoint, num_rows=2, quantization=int8_parts(arguments.int8))
    if arguments.int8:
        print(session.memory, end="\n\n")
    if arguments.voice == "espeak":
        session.external = espeak_voice
    speak = arguments.voice != "none"
    scores = {}
    for number, (script, scene) in enumerate(scenes.items()):
        if arguments.measured:  # everything is compiled in a run that is not counted
            run_scene(scene, lambda clock: Duplex.of(session, options, speak=speak, clock=clock), run)
            session.reset()
        course = run_scene(scene, lambda clock: Duplex.of(session, options, speak=speak, clock=clock), run)
        session.reset()
        scores[script] = score(course)
        told = format_scores(scores[script])
        if len(scenes) > 1:
            print(f"{script}:\n" if number == 0 else f"\n{script}:\n")
        print(draw_text(course), format_happenings(course), told, sep="\n\n")
        if arguments.picture is not None:
            draw(course, arguments.picture, told)
            print(f"\npicture: {arguments.picture}")
    if output is not None:
        print(f"\nwritten: {', '.join(map(str, write_scores(output, scores, session, arguments)))}")
    return 0


def write_scores(
    output: Path, scores: Mapping[str, Scores], session: Session, arguments: argparse.Namespace
) -> list[Path]:
    """Writes the scores of scenes, by their files, as the result of an evaluation. Returns what was written."""
    from vita_jax.evaluation.interruptions import interruption_figures, scene_lines
    from vita_jax.evaluation.measured import write_measured
    from vita_jax.evaluation.results import provenance

    how = {name: getattr(arguments, name) for name in ("voice", "decide", "devices", "measured")}
    lines = scene_lines(scores)
    result = {
        "benchmark": "duplex",
        "title": "scenes in which both may speak at any time",
        "model": arguments.checkpoint,
        "num_items": len(lines),
        "scenes": list(scores),
        "figures": interruption_figures(list(scores.values())),
        "undecided": sum(found.undecided for found in scores.values()),
        **how,
        "round_ms": None if arguments.measured else arguments.round_ms,
        "int8": sorted(arguments.int8),
        **provenance(session.config),
    }
    return write_measured(output.with_suffix(""), result, lines, None)


def sources() -> dict[str, Source]:
    """What a scene's sounds may come from besides files."""
    from vita_jax.inference.scene import Source

    return {
        "say": Source(_say, frozenset({"voice", "rate_wpm"})),
        "noise": Source(_noise, frozenset({"seconds"})),
    }


def _say(entry: Mapping[str, Any]) -> np.ndarray:
    from data_pipelines.speech.noises import with_loudness
    from data_pipelines.speech.synthesizer import Synthesizer

    rate = entry.get("rate_wpm", 175)
    if type(rate) is not int:
        raise UserError(f"rate_wpm is {rate!r}; expected a whole number of words per minute")
    return with_loudness(
        Synthesizer().speak(entry["say"], str(entry.get("voice", "en-us")), rate_wpm=rate)[0], SAID_LEVEL
    )


def _noise(entry: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    from data_pipelines.speech.noises import SYNTHETIC_KINDS, babble, synthetic_noise, with_loudness
    from data_pipelines.speech.synthesizer import Synthesizer

    kind, seconds, rng = entry["noise"], entry.get("seconds", NOISE_SECONDS), np.random.default_rng(0)
    if not isinstance(seconds, int | float) or not 0.1 <= seconds <= 60:
        raise UserError(f"seconds of the noise are {seconds!r}; expected a number from 0.1 to 60")
    if kind == "babble":
        voices = [Synthesizer().speak(text, voice)[0] for text, voice in zip(BABBLE, BABBLE_VOICES, strict=True)]
        return with_loudness(babble(voices, float(seconds), rng), SAID_LEVEL)
    if kind not in SYNTHETIC_KINDS:
        raise UserError(f"noise {kind!r} is unknown; use one of {', '.join((*SYNTHETIC_KINDS, 'babble'))}")
    return with_loudness(synthetic_noise(kind, float(seconds), rng), SAID_LEVEL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(duplex, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
