"""Connectors side by side: how a language model is shown pictures, with as many parameters and steps for each way.

    python -m experiments.studies.connectors --run_dir runs/connectors
    python -m experiments.studies.connectors --run_dir runs/connectors --language tuned
    python -m experiments.studies.connectors --run_dir /tmp/connectors --size smoke

Trains the small LLaVA's language model and tower once, then an arm around each connector (`models.py` says which), and
asks all of them the same held-out questions. The same command goes on where it was stopped; arms that are finished are
not trained again. Size `small` is laid out for 30 to 40 minutes of two CPU cores for each `--language`.

Equal for all arms: the weights they start from; the tower, which stays as it is; the language model, which stays as it
is too (`--language frozen`) or trains along (`tuned`); the conversations of every step, one picture each, and their
order; the text around questions and answers, and which of it is learnt; steps, optimiser, rate and schedule; parameters
of the connector, but for `linear`; the questions, and how answers are drawn and compared.

What cannot be equal:
* where the parameters work. Connectors of LLaVA work once on a picture; the blocks of `gated` work on every position of
  text, also of text without a picture, which is why the column `text` moves there with a frozen language model;
* what the language model reads. It has a position for each visual token of a LLaVA, and for `gated` one position with a
  learnt embedding, which is counted among the parameters; rows are as long as that takes, and so are the steps;
* where training starts. `gated` begins as the bare language model, the others with noise in place of the picture;
* how well one rate suits all. It is the same and tuned for none: `--rate`, into another folder, says how much hangs on
  it.

Leaves `<run_dir>/<language>.json`, `.md` and `.png`, with `--write` also in `results/` beside this file. Figures:

    parameters    that the connector adds
    tokens        of a picture that the language model attends to, in its rows or across
    positions     that a picture takes in its rows
    all kinds     accuracy on typed questions about pictures, mean over the kinds, with the 95 % bootstrap interval
    to the MLP    the difference of it in points on the same questions, with the 95 % interval of the pairs
    text          accuracy on questions about scenes in words
    last loss     mean over the last tenth of the steps
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.quickstart.questions import KINDS
from experiments.benchmarks.turns import format_table
from experiments.llava import quickstart as llava
from experiments.studies.arms import (
    Arm,
    add_arguments,
    add_intervals,
    points,
    run_arms,
    run_study,
    train_shared,
    with_interval,
    write_results,
)
from experiments.studies.connectors.conversations import flamingo_answers, one_position
from experiments.studies.connectors.models import PARTS, SIZES, TAG, connector_parameters, make_arms, shared_config
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import answer_items
from vita_jax.evaluation.benchmarks import QUICKSTART
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.evaluation.figures import score
from vita_jax.evaluation.items import ITEMS, read_items, stratified
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import ExperimentConfig, build_model, example_context, tokenizer_folder

ARMS = ("linear", "two_matrices", "mlp", "perceiver", "perceiver_few", "gated")
COMPARED = "mlp"  # what the others are compared with, question by question
TYPED, TEXT = "typed", "text"
RESULTS = Path(__file__).parent / "results"


def measure(arm: Arm, per_kind: int, shared: ExperimentConfig) -> dict[str, Any]:
    """The figures of a trained arm.

    Args:
      per_kind: questions of each kind of each group.
      shared: the run whose benchmark is asked.

    Returns:
      {"parameters", "tokens", "positions", "groups": {name: figures as `evaluation.figures` has them, and "low", "high"
      of the accuracy}}.
    """
    model, params = arm.config.model, load_params(arm.config.run_dir).params
    gated, tokenizer = isinstance(model, FlamingoConfig), load_tokenizer(tokenizer_folder(shared))
    groups = tuple(group for group in QUICKSTART.groups if group.name in (TYPED, TEXT))
    root, names = benchmark_folder(shared), {group.items for group in groups}
    items = [item for item in stratified(read_items(root / ITEMS), per_kind) if item.group in names]
    network = build_model(arm.config)
    if gated:
        context = example_context(one_position(shared), tokenizer)
        answers = flamingo_answers(network, params, context, items, root, TAG)
    else:
        context = example_context(arm.config, tokenizer)
        answers = answer_items(network, params, context, items, root)
    found = score(dataclasses.replace(QUICKSTART, groups=groups), items, answers, context.template)["groups"]
    return {
        "parameters": connector_parameters(model),
        "tokens": model.resampler.num_latents if gated else model.tokens_per_tile,
        "positions": 1 if gated else model.tokens_per_tile,
        "groups": add_intervals(found),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each arm, in Markdown; the last one is what the best constant answers reach."""
    head = ("connector", "parameters", "tokens", "positions", "all kinds", "to the MLP")
    head = (*head, *KINDS, "text", "last loss", "ms/step")
    rows = []
    for name, found in results.items():
        typed, base = found["groups"][TYPED], results.get(COMPARED)
        compared = base is not None and name != COMPARED
        cells = [found["title"], *(f"{found[key]:,}" for key in ("parameters", "tokens", "positions"))]
        cells += [with_interval(typed)]
        cells += [points(compare_groups(base["groups"][TYPED], typed)) if compared else "-"]
        cells += [f"{100 * typed['by_kind'][kind]['accuracy']:.1f} %" for kind in KINDS]
        text, seconds = found["groups"][TEXT]["accuracy"], found["step_seconds"]
        rows.append((*cells, f"{100 * text:.1f} %", f"{found['last_loss']:.3f}", f"{1000 * seconds:.0f}"))
    priors = [f"{100 * found['groups'][group]['prior']:.1f} %" for group in (TYPED, TEXT)]
    rows.append(("(constant answers)", "0", "0", "0", priors[0], "-", *("-",) * len(KINDS), priors[1], "-", "-"))
    return format_table(head, rows, markdown=True)


def study(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes."""
    size = SIZES[arguments.size]
    shared = shared_config(arguments.size, arguments.run_dir)
    start = train_shared(shared, llava.prepare, PARTS)
    arms = make_arms(arguments.size, arguments.run_dir, start, arguments.language, arguments.steps, arguments.rate)
    per_kind = arguments.per_kind or size.per_kind
    results = run_arms(arms, arguments.only, per_kind, functools.partial(measure, shared=shared))
    stage = arms[0].config.stages[0]
    asked = next(iter(results.values()))["groups"]
    settings = {
        "size": arguments.size,
        "language model": arguments.language,
        "steps": stage.steps,
        "conversations of a step": stage.batch_size,
        "rate": stage.learning_rate,
        "typed questions": asked[TYPED]["n"],
        "text questions": asked[TEXT]["n"],
    }
    bars = {
        title: {
            found["title"]: tuple(found["groups"][group][key] for key in ("accuracy", "low", "high"))
            for found in results.values()
        }
        for title, group in (("pictures, all kinds", TYPED), ("scenes in words", TEXT))
    }
    text = table(results)
    print(text)
    folders = [Path(arguments.run_dir), *([RESULTS] if arguments.write else [])]
    title = f"Connectors, language model {arguments.language}"
    write_results(folders, arguments.language, title, [text], settings, results, bars)


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    if arguments.rate is not None and not arguments.rate > 0:
        raise UserError(f"--rate {arguments.rate} must be above 0")
    return run_study(study, arguments)


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.studies.connectors", description="Compares connectors.", epilog=__doc__
    )
    add_arguments(parser, "runs/connectors", ARMS)
    parser.add_argument(
        "--language", choices=("frozen", "tuned"), default="frozen", help="the language model; default frozen"
    )
    parser.add_argument("--rate", type=float, metavar="R", help="peak learning rate, in place of the size's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for bad input, 128 + signal number when stopped."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
