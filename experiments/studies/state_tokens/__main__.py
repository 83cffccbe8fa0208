"""Which sounds a model learns not to answer, by the sounds that it was taught not to answer.

    python -m experiments.studies.state_tokens --run runs/quickstart --run_dir runs/state_tokens
    python -m experiments.studies.state_tokens --run runs/quickstart --run_dir runs/state_tokens --only statements
    python -m experiments.studies.state_tokens --run runs/quickstart --run_dir /tmp/state_tokens --size smoke

A model says in two ways that a sound is not for it: by the first token of its answer, the noise state, and by its input
head, which reads the state in front of the answer. Audio SFT (stage 2.2) teaches both. Here it starts three times from
the stage `speech_alignment` of one finished run, with as many negatives of other kinds:

    statements    people saying something that is no question, each by themselves
    sounds        half of them; the others are babble and music (chords, arpeggios)
    speakers      the same, with two people talking to each other among them

The run is only read. Equal for all arms: where they start, the other sources with their shares and order, the number of
negatives and their share of the examples, steps, batches, rate, seed; and the sounds that are asked, all held out, see
`sounds.py`. Hums, coloured noise and clicks are in no arm's negatives. The same command goes on where it was stopped;
arms that are finished are not trained again. Size `small` is laid out for about 20 minutes of two CPU cores with the
quickstart's small run.

Leaves `<run_dir>/state_tokens.md`, `.json` and `.png`, with `--write` also in `results/` beside this file. Figures are
shares answered with the noise state (state token), or classed as noise (input head), with 95 % bootstrap intervals; the
share of a family is the mean over its conditions. It should be 100 % of what is not for the model, and 0 % of queries.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.quickstart.scans import load_scan_splits
from experiments.benchmarks.turns import format_table
from experiments.quickstart import NEGATIVES as NEGATIVES_SOURCE
from experiments.studies.arms import (
    Arm,
    add_arguments,
    points,
    run_arms,
    run_study,
    with_interval,
    write_results,
)
from experiments.studies.finished_run import add_run, arm_config, open_run
from experiments.studies.state_tokens.negatives import MIXES, RECORDS, build_negatives
from experiments.studies.state_tokens.sounds import CONDITIONS, NEGATIVES, QUERIES, SPLIT, build_sounds
from vita_jax.command_line import ArgumentParser, progress_line, run_command
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import answer_items
from vita_jax.evaluation.bootstrap import interval
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.evaluation.hearing import NOISE_GROUP, classify
from vita_jax.evaluation.items import ITEMS, Item, read_items
from vita_jax.evaluation.scoring import is_refusal
from vita_jax.evaluation.subject import Subject, benchmark_folder
from vita_jax.models.state_head import INPUT_CLASSES
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder

NAME = "state_tokens"
RESULTS = Path(__file__).parent / "results"
BEFORE, STAGE = "speech_alignment", "audio_sft"  # stages of the run: where the arms start, and what they are trained by
BASE = "statements"  # what the others are compared with, sound by sound
TOKEN, HEAD = WAYS = ("state token", "input head")
ANSWER_TOKENS = 2  # the symbol comes first
SHARE = "refused"
SEED = 0  # of the bootstrap
ASKED = "asked"  # folder of what is asked


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in: `steps` and `negatives` (records) of every arm, sounds `per_condition`."""

    steps: int
    negatives: int
    per_condition: int


SIZES = {"small": Size(1500, 1200, 40), "smoke": Size(3, 24, 2)}


# ---- arms -----------------------------------------------------------------------------------------------------------


def check_model(config: ExperimentConfig) -> None:
    """Raises UserError for a model that does not say in both ways what a sound is."""
    head = config.model.state_head
    if config.model.audio is None or head is None or head.place != "answer" or head.num_classes != len(INPUT_CLASSES):
        raise UserError(
            f"{config.run_dir}: the study needs a model that hears and has an input head of {', '.join(INPUT_CLASSES)}"
        )


def make_arms(config: ExperimentConfig, run_dir: str, steps: int) -> list[Arm]:
    """All arms; each a run in `<run_dir>/<arm>` that reads its negatives from `negatives_folder`.

    Args:
      config: of the finished run, see `open_run`.
      steps: of every arm.

    Raises:
      UserError: the run's stage has no negatives.
    """
    stage = config.stage(STAGE)
    if all(source.path != NEGATIVES_SOURCE.path for source in stage.sources):
        raise UserError(f"stages.{STAGE} of {config.run_dir} has no source {NEGATIVES_SOURCE.path!r} to replace")

    def arm(name: str, title: str) -> Arm:
        own = str((negatives_folder(run_dir, name) / RECORDS).absolute())
        sources = tuple(
            dataclasses.replace(source, path=own) if source.path == NEGATIVES_SOURCE.path else source
            for source in stage.sources
        )
        start = str(checkpoint_folder(config.run_dir, BEFORE))
        trained = dataclasses.replace(stage, sources=sources, steps=steps, start_from=start)
        return Arm(name, title, arm_config(config, f"{NAME}_{name}", str(Path(run_dir) / name), trained))

    return [arm(name, mix.title) for name, mix in MIXES.items()]


def negatives_folder(run_dir: str, arm: str) -> Path:
    """Where the negatives of an arm are."""
    return Path(run_dir) / "negatives" / arm


# ---- figures --------------------------------------------------------------------------------------------------------


def measure(arm: Arm, run_dir: str) -> dict[str, Any]:
    """The figures of a trained arm.

    Returns:
      {"state token", "input head": see `refusal_figures`}.
    """
    config = dataclasses.replace(
        arm.config, data=dataclasses.replace(arm.config.data, folder=str(Path(run_dir) / ASKED))
    )
    params, tokenizer = load_params(arm.config.run_dir).params, load_tokenizer(tokenizer_folder(arm.config))
    subject = Subject(config, params, tokenizer, benchmark=NAME)
    items = read_items(subject.root / ITEMS)
    answers = answer_items(
        subject.model,
        params,
        subject.context,
        items,
        subject.root,
        max_new_tokens=ANSWER_TOKENS,
        progress=progress_line("asked"),
    )
    refused = {
        TOKEN: [is_refusal(answer, subject.context.template) for answer in answers],
        HEAD: [name == NOISE_GROUP for name in classify(subject, items, NAME)],
    }
    return {way: refusal_figures(items, said) for way, said in refused.items()}


def refusal_figures(items: Sequence[Item], refused: Sequence[bool]) -> dict[str, Any]:
    """How much of what was asked is refused.

    Returns:
      {"conditions": {name: {"refused" (share), "low", "high" (95 % interval), "n"}}, "families": {name: the same, the
      share being the mean over conditions, and "title", "outcomes": {condition: {id: refused}}}}.
    """
    outcomes: dict[str, dict[str, dict[str, bool]]] = {}
    for item, said in zip(items, refused, strict=True):
        outcomes.setdefault(item.group, {}).setdefault(item.kind, {})[item.id] = bool(said)

    def share(parts: Sequence[Mapping[str, bool]]) -> dict[str, Any]:
        scores = [np.array(list(part.values()), float) for part in parts]
        low, high = interval(scores, SEED)
        mean = float(np.mean([part.mean() for part in scores]))
        return {SHARE: mean, "low": low, "high": high, "n": sum(map(len, scores))}

    return {
        "conditions": {name: share([part]) for family in outcomes.values() for name, part in family.items()},
        "families": {
            name: {"title": name, **share(list(family.values())), "outcomes": family}
            for name, family in outcomes.items()
        },
    }


# ---- the page -------------------------------------------------------------------------------------------------------


def table_of_families(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each arm and way, in Markdown."""
    rows = []
    for found in results.values():
        taught = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in found["kinds"].items())
        for way in WAYS:
            cells = (with_interval(found[way]["families"][family], SHARE) for family in (*NEGATIVES, *QUERIES))
            last = (f"{found['last_loss']:.3f}", f"{1000 * found['step_seconds']:.0f}")
            rows.append((found["title"], taught, way, *cells, *last))
    head = ("negatives", "of them", "refused by", *NEGATIVES, *QUERIES, "last loss", "ms/step")
    return format_table(head, rows, markdown=True)


def table_of_changes(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What every arm changes, in points on the same sounds, in Markdown; "" without the arm that it is compared with or
    without any other.
    """
    if BASE not in results or len(results) < 2:
        return ""
    rows = [
        (
            found["title"],
            way,
            *(
                points(compare_groups(results[BASE][way]["families"][family], found[way]["families"][family]))
                for family in (*NEGATIVES, *QUERIES)
            ),
        )
        for name, found in results.items()
        for way in WAYS
        if name != BASE
    ]
    head = (f"points to {MIXES[BASE].title}", "refused by", *NEGATIVES, *QUERIES)
    return format_table(head, rows, markdown=True)


def table_of_conditions(results: Mapping[str, Mapping[str, Any]], families: Sequence[str]) -> str:
    """A row for each condition of these families, a column for each arm and way, in Markdown."""
    chosen = [condition for condition in CONDITIONS if condition.family in families]
    rows = [
        (
            condition.name,
            *(
                with_interval(found[way]["conditions"][condition.name], SHARE)
                for found in results.values()
                for way in WAYS
            ),
        )
        for condition in chosen
    ]
    head = ("refused", *(f"{found['title']}: {way}" for found in results.values() for way in WAYS))
    return format_table(head, rows, markdown=True)


def study(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes."""
    size, run_dir = SIZES[arguments.size], arguments.run_dir
    config = open_run(arguments.run, (BEFORE,))
    check_model(config)
    steps, each = arguments.steps or size.steps, arguments.per_kind or size.per_condition
    arms, scans = make_arms(config, run_dir, steps), load_scan_splits(config.seed)
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=str(Path(run_dir) / ASKED)))
    build_sounds(benchmark_folder(asked, NAME), each, scans[SPLIT])
    kinds = {
        arm.name: build_negatives(negatives_folder(run_dir, arm.name), MIXES[arm.name], size.negatives, scans["train"])
        for arm in arms
        if arguments.only is None or arm.name in arguments.only
    }
    results = run_arms(arms, arguments.only, each, lambda arm, _: {"kinds": kinds[arm.name], **measure(arm, run_dir)})
    tables = [table_of_families(results), table_of_changes(results)]
    print("\n\n".join(text for text in tables if text))
    tables += ["Not for the model:", table_of_conditions(results, NEGATIVES)]
    tables += ["Queries:", table_of_conditions(results, QUERIES)]
    stage = arms[0].config.stages[0]
    settings = {
        "size": arguments.size,
        "run": f"{config.name}, {config.size}",
        "steps": stage.steps,
        "rows of a step": stage.batch_size,
        "rate": stage.learning_rate,
        "negatives": size.negatives,
        "sounds of a condition": each,
    }
    bars = {
        f"{family}, refused": {
            found["title"]: tuple(found[TOKEN]["families"][family][key] for key in (SHARE, "low", "high"))
            for found in results.values()
        }
        for family in (*NEGATIVES, QUERIES[-1])
    }
    folders = [Path(run_dir), *([RESULTS] if arguments.write else [])]
    write_results(folders, NAME, "What is not answered", [text for text in tables if text], settings, results, bars)


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.studies.state_tokens", description="State tokens under noise.", epilog=__doc__
    )
    add_run(parser)
    add_arguments(parser, "runs/state_tokens", tuple(MIXES))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for bad input, 128 + signal number when stopped."""
    return run_command(functools.partial(run_study, study), make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
