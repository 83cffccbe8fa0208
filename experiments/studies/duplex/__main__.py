"""How a duplex conversation goes when people interrupt: latency, change of roles, what is remembered, memory.

    python -m experiments.studies.duplex
    python -m experiments.studies.duplex --checkpoint runs/quickstart --scenes 8 --output runs/duplex

Held-out voices ask about held-out pictures in scenes of six kinds (`scenes.py`), which are drawn anew. Work takes as
long as it takes on this machine, after every kind was played once to compile what it needs.

    recognised      of the sounds that are meant for the model, those that were taken for a query
    taken wrongly   of those that are not, those that were
    stop            from the recognition of a query to the last sample of the answer it stopped, median and most
    first sound     from the end of a question to the first sample of its answer, median
    last answer     is right; the picture was shown with the first question, so it has to be remembered
    finished        of the answers that only noise or other people spoke into, those that were heard to their end
    roles           of the answers after an interruption, those that the stream gave that had been listening

Memory is counted, not measured: bytes of all weights and caches of one conversation, for two streams that share the
weights, two with a language model each on two devices, and two whole models, as in the published demo; for the
full-size model in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.turns import describe_machine, format_machine, format_table, write_page
from experiments.studies.duplex.scenes import KINDS, Drawn, draw_scenes
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError
from vita_jax.evaluation.scoring import is_right
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.duplex_events import COMPLETED, ResponseDone, ResponseStarted
from vita_jax.inference.scene_run import Course, RunOptions, SceneCutShort, run_scene
from vita_jax.inference.scene_score import Scores, score
from vita_jax.inference.session import Session
from vita_jax.models.language.decoder import make_cache
from vita_jax.models.vita import Vita, VitaConfig, vita_1_5_with_voice
from vita_jax.parallel.process import prepare_process
from vita_jax.parallel.rules import unbox
from vita_jax.training.objectives import init_model
from vita_jax.training.stages import flatten

WEIGHTS = Path(__file__).parents[2] / "quickstart" / "weights"
RESULTS = Path(__file__).parent / "results"
NOTES = "## What this says"  # from here on the written page is kept: a person's words
FULL_SLOTS = 8192  # positions of a conversation with the full-size model
DISTURBED = ("sound", "other people")
HEAD = ("scenes", "recognised", "taken wrongly", "stop", "first sound", "last answer", "finished", "roles")


@dataclass
class Tally:
    """What is counted of a kind of scene. Pairs are (how many, of how many); latencies are in seconds."""

    scenes: int = 0
    failed: int = 0
    recognised: list[int] = field(default_factory=lambda: [0, 0])
    taken: list[int] = field(default_factory=lambda: [0, 0])
    right: list[int] = field(default_factory=lambda: [0, 0])
    finished: list[int] = field(default_factory=lambda: [0, 0])
    swapped: list[int] = field(default_factory=lambda: [0, 0])
    stops: list[float] = field(default_factory=list)
    responses: list[float] = field(default_factory=list)


def add(tally: Tally, drawn: Drawn, course: Course, scores: Scores) -> None:
    """Counts one scene."""
    tally.scenes += 1
    for pair, more in ((tally.recognised, scores.takeovers), (tally.taken, scores.false_takeovers)):
        pair[0], pair[1] = pair[0] + more[0], pair[1] + more[1]
    tally.stops += scores.stops
    tally.responses += scores.responses
    done = course.of(ResponseDone)
    tally.right[1] += 1
    tally.right[0] += bool(done) and is_right(drawn.asked, done[-1].text, drawn.answer)
    if drawn.kind in DISTURBED:
        tally.finished[1] += 1
        tally.finished[0] += bool(done) and done[0].status == COMPLETED
    streams = {event.response: event.stream for event in course.of(ResponseStarted)}
    for before, after in zip(done, done[1:], strict=False):
        if before.status != COMPLETED:
            tally.swapped[1] += 1
            tally.swapped[0] += streams[after.response] != streams[before.response]


def play(session: Session, per_kind: int, folder: Path, progress: Any = print) -> dict[str, Tally]:
    """Plays all scenes to a model; every kind once before it counts. Raises UserError as the session does."""
    tallies = {kind: Tally() for kind in KINDS}
    known: set[str] = set()
    for number, drawn in enumerate(draw_scenes(folder, per_kind)):
        tally = tallies[drawn.kind]
        for counts in (True,) if drawn.kind in known else (False, True):
            session.reset()
            try:
                course = run_scene(
                    drawn.scene, lambda clock: Duplex.of(session, clock=clock), RunOptions(round_seconds=None)
                )
            except SceneCutShort:  # the first question had no answer, say; any other error ends the study
                tally.failed += counts
                continue
            if counts:
                add(tally, drawn, course, score(course))
        known.add(drawn.kind)
        if (number + 1) % per_kind == 0:
            progress(
                f"{drawn.kind}: {tally.scenes} scenes, {tally.failed} cut short: what they wait for did not happen"
            )
    return tallies


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_of(config: VitaConfig, num_slots: int, dtype: jnp.dtype) -> dict[str, int]:
    """Bytes of both streams of a conversation, by how they share, from shapes alone."""
    shapes = flatten(unbox(jax.eval_shape(lambda: init_model(Vita(config), jax.random.key(0)))))
    bytes_of = {path: leaf.size * jnp.dtype(dtype).itemsize for path, leaf in shapes.items()}
    everything = sum(bytes_of.values())
    language = sum(size for path, size in bytes_of.items() if path.startswith("language/"))
    cache = jax.eval_shape(lambda: make_cache(config.language, 1, num_slots, dtype)).num_bytes
    return {
        "two streams, one set of weights": everything + 2 * cache,
        "a language model each, two devices": everything + language + 2 * cache,
        "two whole models": 2 * (everything + cache),
    }


# ---- the page -------------------------------------------------------------------------------------------------------


def share(pair: Sequence[int]) -> str:
    """ "11 of 12", or "-" where nothing was counted."""
    return f"{pair[0]} of {pair[1]}" if pair[1] else "-"


def row(kind: str, tally: Tally) -> tuple[str, ...]:
    """A line of the table."""
    stop = "-"
    if tally.stops:
        stop = f"{1000 * statistics.median(tally.stops):.0f}, {1000 * max(tally.stops):.0f} ms"
    first = f"{1000 * statistics.median(tally.responses):.0f} ms" if tally.responses else "-"
    counted = (tally.recognised, tally.taken), (tally.right, tally.finished, tally.swapped)
    return (kind, str(tally.scenes), *map(share, counted[0]), stop, first, *map(share, counted[1]))


def format_results(tallies: dict[str, Tally], memory: dict[str, dict[str, int]], *, markdown: bool = False) -> str:
    """Both tables."""
    scenes = format_table(("scene", *HEAD), [row(*entry) for entry in tallies.items()], markdown=markdown)
    ways = next(iter(memory.values()))
    lines = [(way, *(f"{sizes[way] / 2**20:,.0f} MiB" for sizes in memory.values())) for way in ways]
    return scenes + "\n\n" + format_table(("memory", *memory), lines, markdown=markdown)


def draw_plot(tallies: dict[str, Tally], path: Path) -> None:
    """Latencies of every scene by kind, and how often the last answer was right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2))
    for at, tally in enumerate(tallies.values()):
        for values, colour, shift in ((tally.responses, "tab:blue", -0.12), (tally.stops, "tab:red", 0.12)):
            places = [at + shift + 0.1 * (i / max(len(values) - 1, 1) - 0.5) for i in range(len(values))]
            left.plot(places, [1000 * value for value in values], ".", color=colour, alpha=0.6)
    left.axhline(200, color="tab:red", linewidth=0.8, linestyle=":")
    left.set_ylabel("ms")
    left.set_title("first sound of an answer (blue), silence of a stopped one (red; goal 200 ms)", fontsize=9)
    shares = [tally.right[0] / max(tally.right[1], 1) for tally in tallies.values()]
    right.bar(range(len(shares)), [100 * value for value in shares], color="tab:green")
    right.set_ylim(0, 100)
    right.set_title("the last answer is right, %", fontsize=9)
    for axes in (left, right):
        axes.set_xticks(range(len(tallies)), list(tallies), rotation=20, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(arguments: argparse.Namespace) -> int:
    """Plays, counts, writes."""
    if arguments.scenes < 1:
        raise UserError(f"--scenes {arguments.scenes} must be at least 1")
    prepare_process()
    machine = describe_machine(("jax",))
    session = Session.load(arguments.checkpoint, num_rows=2)
    with tempfile.TemporaryDirectory() as folder:
        tallies = play(session, arguments.scenes, Path(folder), lambda line: print(line, flush=True))
    memory = {
        "this model": memory_of(session.config.model, session.engine.num_slots, jnp.float32),
        "VITA-1.5": memory_of(vita_1_5_with_voice(), FULL_SLOTS, jnp.bfloat16),
    }
    print(format_results(tallies, memory), format_machine(machine), sep="\n\n")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_plot(tallies, output.with_suffix(".png"))
    kinds = "\n".join(f"- {kind}: {what}" for kind, what in KINDS.items())
    text = (
        "# Interrupting\n\nWritten by `python -m experiments.studies.duplex`; the head of "
        '`experiments/studies/duplex/__main__.py` says what the columns are. "Describe the picture." is asked first, '
        f"then:\n\n{kinds}\n\n{format_results(tallies, memory, markdown=True)}\n\n"
        f"![Latencies and right answers by kind of scene]({output.name}.png)\n\n{format_machine(machine)}.\n"
    )
    content = {"scenes": {kind: vars(tally) for kind, tally in tallies.items()}, "memory": memory, "machine": machine}
    write_page(output, text, NOTES, content)
    print(f"written: {output}.md")
    return 0


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.studies.duplex", description=__doc__)
    parser.add_argument("--checkpoint", default=str(WEIGHTS), metavar="DIR", help="a run; default: the kept weights")
    parser.add_argument("--scenes", type=int, default=20, metavar="N", help="of every kind; default 20")
    parser.add_argument("--output", default=str(RESULTS), metavar="PATH", help="without ending: .md, .json and .png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns its exit status."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
