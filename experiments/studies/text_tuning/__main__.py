"""Teaching a speaking model new text, and what that does to its speech.

    python -m experiments.studies.text_tuning
    python -m experiments.studies.text_tuning --arms all adapters --steps 300 --output runs/text_tuning/results

The speech decoders read rows of the language model's embedding table. Who trains the language model further, table
included, moves what they read, though nothing of the voice is trained. The kept weights learn to say digits backwards,
from text alone, in four ways:

    all           the whole language model, at the rate that the stage has
    slowly        the same at a tenth of the rate
    table kept    everything in it but the embedding table
    adapters      LoRA beside frozen weights

Measured before and after, on questions drawn anew: the new task; questions about pictures; spoken questions; and how
many of the model's spoken answers its recogniser reads back exactly, with the share of characters that it misreads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.quickstart.build import build_benchmark
from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.speech import build_speech
from data_pipelines.quickstart.speech_sets import SMOKE
from experiments.benchmarks.turns import describe_machine, format_machine, format_table, write_page
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.inference.session import Session
from vita_jax.parallel.process import prepare_process
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import CTC_VOCABULARY

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = ROOT / "experiments" / "quickstart" / "weights"
RESULTS = Path(__file__).parent / "results"
NOTES = "## What this says"  # from here on the written page is kept: a person's words
BEFORE = "before"
RATE = 1e-3
# What trains in the stage `own_data`, and how.
ARMS = {
    "all": {"trainable": '["^language/"]', "learning_rate": f"{RATE}"},
    "slowly": {"trainable": '["^language/"]', "learning_rate": f"{RATE / 10}"},
    "table kept": {"trainable": '["^language/(?!embed_tokens/)"]', "learning_rate": f"{RATE}"},
    "adapters": {"trainable": "", "lora.rank": "16", "learning_rate": f"{10 * RATE}"},
}
NUM_RECORDS, NUM_HELD_OUT = 6000, 200
SEED, SPLIT_SEED = 909, 0  # of what is drawn, which no training has seen; of the split of the scans, the training's
MEASURES = {
    "quickstart": ("typed", "text"),
    "speech": ("spoken", "voice_answers"),
}


# ---- the new task ---------------------------------------------------------------------------------------------------


def new_task(count: int, held_out: bool, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers: three or four digits, to be said backwards. Of those held out 7 divides the sum."""
    asked: list[tuple[str, str]] = []
    while len(asked) < count:
        digits = "".join(str(digit) for digit in rng.integers(0, 10, int(rng.integers(3, 5))))
        if (sum(map(int, digits)) % 7 == 0) == held_out:
            question = f"Say backwards: {digits}" if rng.random() < 0.5 else f"倒着说：{digits}"
            asked.append((question, digits[::-1]))
    return asked


def write_records(file: Path) -> None:
    """The training records of the new task."""
    turns = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        for question, answer in new_task(NUM_RECORDS, False, np.random.default_rng((SEED, 0)))
    ]
    records = [{"id": str(number), "conversations": both} for number, both in enumerate(turns)]
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def right_backwards(checkpoint: Path) -> float:
    """Share of the held-out questions of the new task that are answered rightly."""
    session, right = Session.load(checkpoint), 0
    for question, answer in new_task(NUM_HELD_OUT, True, np.random.default_rng((SEED, 1))):
        session.reset()
        right += "".join(session.ask(question)).strip() == answer
    return right / NUM_HELD_OUT


# ---- what the model knew before -------------------------------------------------------------------------------------


def build_questions(folder: Path, per_kind: int) -> None:
    """Benchmarks that no training has seen, so many questions of every kind (a multiple of 8)."""
    splits = load_scan_splits(SPLIT_SEED)
    counts = {"typed": per_kind, "typed_unseen_writers": 0, "text_only": per_kind, "video_order": 0}
    build_benchmark(folder / "benchmarks" / "quickstart", splits, counts, SEED)
    speech = dataclasses.replace(SMOKE, benchmark_spoken=per_kind)
    build_speech(folder, splits, speech, SEED, progress=lambda line: None)
    (folder / CTC_VOCABULARY).write_bytes((WEIGHTS / CTC_VOCABULARY).read_bytes())


def measure(checkpoint: Path, questions: Path) -> dict[str, float]:
    """The figures of one model."""
    loaded = load_params(checkpoint)
    config = dataclasses.replace(
        loaded.config,
        run_dir=str(loaded.run_dir),
        data=dataclasses.replace(loaded.config.data, folder=str(questions)),
    )
    tokenizer = load_tokenizer(loaded.run_dir / "tokenizer")
    figures = {"new task": right_backwards(checkpoint)}
    for benchmark, groups in MEASURES.items():
        found = evaluate_params(config, loaded.params, tokenizer, benchmark=benchmark, groups=groups)["groups"]
        figures |= {name: found[name]["accuracy"] for name in groups}
        if "voice_answers" in groups:
            figures["misread"] = found["voice_answers"]["character_error_rate"]
    return figures


def train_arm(name: str, records: Path, run_dir: Path, steps: int) -> None:
    """Trains the kept weights further in one of the ways. Raises UserError if the command fails."""
    fields = {"start_from": str(WEIGHTS), "steps": str(steps), "batch_size": "8", "row_tiles": "0", "row_clips": "0"}
    flags = [f"--config.stages.own_data.{field}={value}" for field, value in {**fields, **ARMS[name]}.items()]
    data = [f"--config.data.json={records}", f"--config.data.root={records.parent}", f"--config.run_dir={run_dir}"]
    command = [sys.executable, "-m", "vita_jax.train", "--config=experiments/own_data.py", *data, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the arm {name!r} did not train: {done.stderr.strip()[-2000:]}")


# ---- the page -------------------------------------------------------------------------------------------------------


def format_results(found: dict[str, dict[str, float]], *, markdown: bool = False) -> str:
    """A line for every model."""
    columns = ("new task", "typed", "text", "spoken", "voice_answers", "misread")
    titles = ("says backwards", "pictures, typed", "text", "pictures, spoken", "answers read back", "misread")
    lines = [(name, *(f"{100 * figures[column]:.1f} %" for column in columns)) for name, figures in found.items()]
    return format_table(("trained", *titles), lines, markdown=markdown)


def draw_plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """New task against spoken answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, figures in found.items():
        at = (100 * figures["new task"], 100 * figures["voice_answers"])
        axes.plot(*at, "o")
        axes.annotate(name, at, xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set_xlim(-5, 115)
    axes.set_ylim(0, 105)
    axes.set_xlabel("says digits backwards, %")
    axes.set_ylabel("spoken answers read back exactly, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(arguments: argparse.Namespace) -> int:
    """Trains the arms and measures them."""
    unknown = [name for name in arguments.arms if name not in ARMS]
    if unknown:
        raise UserError(f"--arms {unknown[0]!r} is unknown; use some of {', '.join(map(repr, ARMS))}")
    if arguments.questions < 8 or arguments.questions % 8 or arguments.steps < 1:
        raise UserError("--questions must be a multiple of 8, --steps at least 1")
    prepare_process()
    machine, found = describe_machine(("jax",)), {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build_questions(folder / "questions", arguments.questions)
        write_records(folder / "records.json")
        for name in (BEFORE, *arguments.arms):
            checkpoint = WEIGHTS if name == BEFORE else folder / name.replace(" ", "_")
            if name != BEFORE:
                train_arm(name, folder / "records.json", checkpoint, arguments.steps)
            found[name] = measure(checkpoint, folder / "questions")
            print(format_results({name: found[name]}), flush=True)
    print(format_results(found), format_machine(machine), sep="\n\n")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_plot(found, output.with_suffix(".png"))
    text = (
        "# New text, and the voice\n\nWritten by `python -m experiments.studies.text_tuning`; the head of "
        "`experiments/studies/text_tuning/__main__.py` says what is trained and measured. "
        f"{arguments.steps} steps of 8 rows each.\n\n{format_results(found, markdown=True)}\n\n"
        f"![The new task against spoken answers]({output.name}.png)\n\n{format_machine(machine)}.\n"
    )
    write_page(output, text, NOTES, {"figures": found, "steps": arguments.steps, "machine": machine})
    print(f"written: {output}.md")
    return 0


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.studies.text_tuning", description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="NAME", help="default: all four")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of every arm; default 300")
    parser.add_argument("--questions", type=int, default=48, metavar="N", help="of every kind; default 48")
    parser.add_argument("--output", default=str(RESULTS), metavar="PATH", help="without ending: .md, .json and .png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns its exit status."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
