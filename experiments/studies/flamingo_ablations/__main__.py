"""Flamingo's ablations (arXiv 2204.14198, section 3.3), each around one and the same language model and tower.

    python -m experiments.studies.flamingo_ablations --run_dir runs/flamingo_ablations
    python -m experiments.studies.flamingo_ablations --run_dir /tmp/ablations --size smoke

Trains the stages `lists`, `language` and `tower` of `experiments/flamingo/quickstart.py` once, then from these its
stage `seeing` for every arm: as it is, and with one thing changed. Data, their order, steps, optimiser and rate are the
same; parameters are not, and are given. Each arm is asked the same queries with the same demonstrations. The same
command goes on where it was stopped; arms that are finished are not trained again.

    none                a gated block before every layer, a Perceiver, the language model frozen but for two new tokens
    no_gate             no tanh gates
    every_2, every_4    layers of the language model to a block
    transformer, mlp    in place of the Perceiver
    unfrozen            the language model trains along

Leaves `<run_dir>/flamingo.json`, `.md` and `.png`, with `--write` also in `results/` beside this file. Figures are
accuracies with 95 % bootstrap intervals by number of shots: of typed questions, of names for digits that are drawn
anew for every episode (generated, and ranked among its names), and of the order of digits in clips, which have no
support. The second table has the differences to `none` in points on the same queries, with the 95 % intervals of the
pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.turns import format_table
from experiments.flamingo import quickstart as flamingo
from experiments.studies.arms import (
    SHARED,
    Arm,
    add_arguments,
    component_sizes,
    points,
    run_arms,
    run_study,
    train_shared,
    with_interval,
    write_results,
)
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.json_lines import write_json_lines
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.evaluation.few_shot import LINES, evaluate_few_shot, subject_of
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import (
    CheckpointConfig,
    ExperimentConfig,
    data_folder,
    tokenizer_folder,
)

TITLES = {
    "none": "Flamingo",
    "no_gate": "no gates",
    "every_2": "a block every 2 layers",
    "every_4": "a block every 4 layers",
    "transformer": "Transformer resampler",
    "mlp": "MLP resampler",
    "unfrozen": "language model unfrozen",
}
BASE = "none"
# Component -> the stage of the shared run that trains it.
PARTS = {"language": "language", "vision": "tower"}
NAME = "flamingo"
RESULTS = Path(__file__).parent / "results"


def shared_config(size: str, run_dir: str) -> ExperimentConfig:
    """The run of the small Flamingo up to its last stage."""
    config = flamingo.get_config(size)
    stages = config.stages[:-1]
    return dataclasses.replace(config, name="flamingo_ablations", run_dir=str(Path(run_dir) / SHARED), stages=stages)


def make_arms(size: str, run_dir: str, start: str, steps: int | None = None) -> list[Arm]:
    """All arms; each a run in `<run_dir>/<arm>`.

    Args:
      start: a checkpoint of language model and tower; data and tokenizer are there, too.
      steps: in place of the size's.
    """
    shared = shared_config(size, run_dir)

    def arm(ablation: str, title: str) -> Arm:
        config = flamingo.get_config(size, ablation)
        seeing = config.stages[-1]
        config = dataclasses.replace(
            config,
            run_dir=f"{run_dir}/{ablation}",
            data=dataclasses.replace(config.data, folder=str(data_folder(shared))),
            tokenizer=dataclasses.replace(config.tokenizer, folder=str(tokenizer_folder(shared))),
            checkpoint=CheckpointConfig(every_steps=500, keep=1),
            stages=(dataclasses.replace(seeing, start_from=start, steps=steps or seeing.steps),),
        )
        return Arm(ablation, title, flamingo.with_new_tokens(config))

    return [arm(ablation, title) for ablation, title in TITLES.items()]


def trained_parameters(config: ExperimentConfig) -> int:
    """Of an arm: what it adds to language model and tower, and the language model or its new tokens."""
    sizes, (stage,) = component_sizes(config.model), config.stages
    added = sum(count for part, count in sizes.items() if part not in PARTS)
    new = len(stage.trained_tokens) * config.model.language.hidden_size
    return added + (new or sizes["language"])


def measure(arm: Arm, per_kind: int | None) -> dict[str, Any]:
    """The figures of a trained arm: {"parameters", "tasks": see `evaluation.few_shot`}; its answers go to its folder.

    per_kind: queries of each kind of each task; None = all.
    """
    config = arm.config
    subject = subject_of(config, load_params(config.run_dir).params, load_tokenizer(tokenizer_folder(config)), None)
    result, lines = evaluate_few_shot(subject, config.few_shot, limit=per_kind)
    write_json_lines(Path(config.run_dir) / LINES, lines)
    return {"parameters": trained_parameters(config), "tasks": result["few_shot"]}


def columns(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(task, shots, title) of everything that was measured, in order."""
    for task, found in next(iter(results.values()))["tasks"].items():
        for shots in found["shots"]:
            yield task, shots, f"{task.replace('_', ' ')}, {shots}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each arm, a column for each task and number of shots, in Markdown."""
    measured = list(columns(results))
    rows = []
    for found in results.values():
        cells = (with_interval(found["tasks"][task]["shots"][shots]) for task, shots, _ in measured)
        last = (f"{found['last_loss']:.3f}", f"{1000 * found['step_seconds']:.0f}")
        rows.append((found["title"], f"{found['parameters']:,}", *cells, *last))
    head = ("", "trained parameters", *(title for *_, title in measured), "last loss", "ms/step")
    return format_table(head, rows, markdown=True)


def table_of_changes(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What every ablation changes, in points on the same queries, in Markdown; "" without the arm it is compared with
    or without any other.
    """
    if BASE not in results or len(results) < 2:
        return ""
    measured, base = list(columns(results)), results[BASE]["tasks"]
    rows = [
        (
            found["title"],
            *(
                points(compare_groups(base[task]["shots"][shots], found["tasks"][task]["shots"][shots]))
                for task, shots, _ in measured
            ),
        )
        for name, found in results.items()
        if name != BASE
    ]
    head = (f"points to {TITLES[BASE]}", *(title for *_, title in measured))
    return format_table(head, rows, markdown=True)


def bars_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Panels of the plot: every task with the most shots that it was asked with, ranked names in place of generated."""
    last = {task: (task, shots, title) for task, shots, title in columns(results)}
    last = {task: entry for task, entry in last.items() if f"{task}_ranked" not in last}
    return {
        title: {
            found["title"]: tuple(found["tasks"][task]["shots"][shots][key] for key in ("accuracy", "low", "high"))
            for found in results.values()
        }
        for task, shots, title in last.values()
    }


def study(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes."""
    shared = shared_config(arguments.size, arguments.run_dir)
    start = train_shared(shared, flamingo.prepare, PARTS)
    arms = make_arms(arguments.size, arguments.run_dir, start, arguments.steps)
    results = run_arms(arms, arguments.only, arguments.per_kind, measure)
    tables = [text for text in (table(results), table_of_changes(results)) if text]
    print("\n\n".join(tables))
    stage = arms[0].config.stages[0]
    settings = {
        "size": arguments.size,
        "steps": stage.steps,
        "rows of a step": stage.batch_size,
        "rate": stage.learning_rate,
        "queries of a kind": arguments.per_kind or "all",
    }
    folders = [Path(arguments.run_dir), *([RESULTS] if arguments.write else [])]
    write_results(folders, NAME, "Flamingo's ablations", tables, settings, results, bars_of(results))


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.studies.flamingo_ablations", description="Ablations of Flamingo.", epilog=__doc__
    )
    add_arguments(parser, "runs/flamingo_ablations", tuple(TITLES))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for bad input, 128 + signal number when stopped."""
    return run_command(functools.partial(run_study, study), make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
