"""What the studies share: arms that start from one language model and one tower, and what is kept of each.

    RUN_DIR/shared          the run of the shared stages, with data and tokenizer
    RUN_DIR/shared/start    a checkpoint of the parts that all arms start from, and of nothing else
    .../ARM                 the run of an arm, of one stage; once it is measured, `arm.json` holds its figures

An arm with its `arm.json` is neither trained nor asked again; one that was stopped goes on as any run does.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.benchmarks.turns import describe_machine, format_machine, write_page
from vita_jax import config as config_lib
from vita_jax.command_line import ArgumentParser
from vita_jax.errors import UserError
from vita_jax.evaluation.bootstrap import interval
from vita_jax.evaluation.results import save_result
from vita_jax.parallel.process import prepare_process
from vita_jax.parallel.rules import unbox
from vita_jax.training import loop
from vita_jax.training.checkpoint import (
    CONFIG,
    StageCheckpoints,
    checkpoint_folder,
    complete_steps,
    load_params,
    read_meta,
    snapshot_meta,
)
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.families import ModelConfig, make_model
from vita_jax.training.metrics import read_metrics
from vita_jax.training.objectives import init_model
from vita_jax.training.stages import Stage, flatten, parameter_counts

SHARED, START, RESULT = "shared", "start", "arm.json"
PACKAGES = ("jax", "flax")
NOTES = "## What this says"  # from here on the written page is kept: a person's words
LAST_SHARE = 0.1  # of the steps, whose mean loss is the last loss
SEED = 0  # of the bootstrap
Bars = Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Arm:
    """One of what is compared.

    Attributes:
      name: of its folder.
      title: in tables.
      config: of its run, which has one stage.
      make_batches: see `loop.run`; None: the records of its stage.
    """

    name: str
    title: str
    config: ExperimentConfig
    make_batches: loop.MakeBatches | None = None


# ---- training -------------------------------------------------------------------------------------------------------


def train_shared(config: ExperimentConfig, prepare: Callable[[ExperimentConfig], Any], parts: Mapping[str, str]) -> str:
    """Data, tokenizer and the shared stages, as far as they are not there.

    Args:
      config: of the shared run.
      prepare: builds data and tokenizer.
      parts: component of the model -> the stage that trained it.

    Returns:
      The folder of a checkpoint of these components, for `start_from` of the arms.
    """
    loop.claim_run_dir(config, loop.REQUESTED)
    prepare(config)
    loop.run(config)
    return write_start(config, Path(config.run_dir) / START, parts)


def write_start(config: ExperimentConfig, start: Path, parts: Mapping[str, str]) -> str:
    """Writes a checkpoint of some components, unless it is there, and returns its folder; arguments as
    `train_shared`, `start` is the folder.
    """
    if not (start / CONFIG).is_file():
        shutil.rmtree(start, ignore_errors=True)  # what a killed process left
        stages = {part: checkpoint_folder(config.run_dir, stage) for part, stage in parts.items()}
        params = {part: load_params(folder).params[part] for part, folder in stages.items()}
        stage = config.stages[0]
        meta = snapshot_meta(config, stage, stage.steps, [0, 0], None, 0.0)
        with StageCheckpoints(checkpoint_folder(start, stage.name), keep=1) as checkpoints:
            checkpoints.save(stage.steps, params, None, meta)
        config_lib.save_json(config, start / CONFIG)  # last: from now on it is complete
    return str(start)


def run_arms(
    arms: Sequence[Arm],
    wanted: Sequence[str] | None,
    per_kind: int | None,
    measure: Callable[[Arm, int | None], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Trains and measures the arms that are wanted and have no figures yet.

    Args:
      wanted: names; None = all.
      per_kind: questions of each kind; None = all.
      measure: (arm that is trained, `per_kind`) -> its figures.

    Returns:
      Name -> figures, of all arms that have some: title, per_kind, `training_figures` and what `measure` found.

    Raises:
      UserError: an arm's folder holds a run with other settings, or one that was asked another number of questions.
      loop.Stopped: SIGTERM or SIGINT arrived; everything is saved.
    """
    found = {}
    for arm in arms:
        result = Path(arm.config.run_dir) / RESULT
        if result.is_file():
            loop.claim_run_dir(arm.config)
        elif wanted is None or arm.name in wanted:
            print(f"arm {arm.name}: {arm.title}", flush=True)
            loop.run(arm.config, make_batches=arm.make_batches)
            about = {"title": arm.title, "per_kind": per_kind}
            save_result({**about, **training_figures(arm.config), **measure(arm, per_kind)}, result)
        if result.is_file():
            found[arm.name] = read_result(result, per_kind)
    return found


def read_result(path: Path, per_kind: int | None) -> dict[str, Any]:
    """Figures that were kept. Raises UserError if they are of another number of questions."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if (asked := found["per_kind"]) != per_kind:
        raise UserError(
            f"{path} has {asked or 'all'} questions of each kind, and {per_kind or 'all'} are asked for; use the same "
            "--per_kind, or delete that file to have the arm asked again"
        )
    return found


def training_figures(config: ExperimentConfig) -> dict[str, Any]:
    """What a finished arm says of its training.

    Returns:
      {"losses": [[step, mean loss since the last report]], "last_loss": mean over the last tenth of the steps,
      "step_seconds": median over the reports behind the first, which also compiles}.
    """
    reports = [report for report in read_metrics(config.run_dir) if report["event"] == "step" and "loss" in report]
    steps = config.stages[0].steps
    # Never empty: whatever the interval of reports, the last step of a finished stage is in one (`Reporter.finish`).
    last = [report["loss"] for report in reports if report["step"] > (1 - LAST_SHARE) * steps]
    seconds = [report["step_seconds"] for report in reports[1:] or reports]
    return {
        "losses": [[report["step"], report["loss"]] for report in reports],
        "last_loss": float(np.mean(last)),
        "step_seconds": float(np.median(seconds)),
    }


def stage_cost(run_dir: str | Path, stage: Stage) -> dict[str, float]:
    """What a finished stage took.

    Returns:
      {"steps", "positions": of all its rows, padding included, "records": that it read and could use, up to the last 8
      rows that were packed together, "seconds"}.

    Raises:
      UserError: the stage is not finished.
    """
    folder = checkpoint_folder(run_dir, stage.name)
    if (complete_steps(folder) or [0])[-1] != stage.steps:
        raise UserError(f"{run_dir}: stage {stage.name!r} has no checkpoint of its step {stage.steps}; train it first")
    meta = read_meta(folder / str(stage.steps))
    records = sum(counts["seen"] - counts["bad"] for counts in _counts_in(meta["data_state"]))
    positions = stage.steps * stage.batch_size * stage.row_length
    return {"steps": stage.steps, "positions": positions, "records": records, "seconds": meta["seconds"]}


def _counts_in(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The `RecordCounts` in the state of a loader, one for each lane."""
    if "counts" in state:
        yield state["counts"]
        return
    for part in state.values():
        if isinstance(part, Mapping):
            yield from _counts_in(part)


def add_intervals(groups: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Groups of figures, see `evaluation.figures`, each with "low" and "high" of its accuracy (95 %, by bootstrap)."""
    for group in groups.values():
        parts = [np.array(list(outcomes.values()), float) for outcomes in group["outcomes"].values()]
        group["low"], group["high"] = interval(parts, SEED)
    return groups


@functools.lru_cache
def component_sizes(model: ModelConfig) -> Mapping[str, int]:
    """Parameters of every component, from shapes alone."""
    network = make_model(model)
    shapes = jax.eval_shape(lambda key: init_model(network, key), jax.random.key(0))
    return {name: frozen for name, (_, frozen) in parameter_counts(flatten(unbox(shapes)), ()).items()}


# ---- results --------------------------------------------------------------------------------------------------------


def write_results(
    folders: Sequence[Path],
    name: str,
    title: str,
    tables: Sequence[str],
    settings: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    bars: Mapping[str, Bars],
) -> None:
    """Writes results as `write_study` does, with a plot of losses and accuracies.

    Args:
      results: as `run_arms` gives them.
      bars: title of a panel -> title of an arm -> (accuracy, low, high).
    """
    curves = {found["title"]: found["losses"] for found in results.values()}
    write_study(folders, name, title, tables, settings, results, draw(curves, bars), "losses and accuracies")


def write_study(
    folders: Sequence[Path],
    name: str,
    title: str,
    tables: Sequence[str],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    figure: Figure,
    caption: str,
) -> None:
    """Writes `<name>.json`, `.md` and `.png` to every folder; what became of every question stays with the arms.

    Args:
      title: of the page.
      tables: in Markdown.
      settings: what all arms had in common.
      results: figures by arm.
      figure: the plot.
      caption: says what it shows.
    """
    machine = describe_machine(PACKAGES)
    machine.pop("load before", None)  # the arms were trained before this
    parts = [f"# {title}", *tables, f"![{caption}]({name}.png)"]
    parts += ["; ".join(f"{key} {value}" for key, value in settings.items()), format_machine(machine)]
    content = {"machine": machine, "settings": dict(settings), "arms": without_outcomes(results)}
    for folder in folders:
        write_page(folder / name, "\n\n".join(parts) + "\n", NOTES, content)
        figure.savefig(folder / f"{name}.png", dpi=150)


def without_outcomes(value: Any) -> Any:
    """The same figures without their entries "outcomes"."""
    if not isinstance(value, Mapping):
        return value
    return {name: without_outcomes(entry) for name, entry in value.items() if name != "outcomes"}


def draw(curves: Mapping[str, Sequence[Sequence[float]]], bars: Mapping[str, Bars]) -> Figure:
    """Losses over steps in one panel, and a panel of accuracies with their intervals for each entry of `bars`."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5.2 + 3.4 * len(bars), 3.6), layout="constrained")
        widths = [5.2, *(3.4,) * len(bars)]
        first, *others = figure.subplots(1, 1 + len(bars), squeeze=False, width_ratios=widths)[0]
        for title, points in curves.items():
            steps, losses = zip(*points, strict=True)
            first.plot(steps, losses, linewidth=1.2, marker="." if len(steps) < 3 else "", label=title)
        first.set(xlabel="step", ylabel="loss", yscale="log")
        first.legend(frameon=False, fontsize=8)
        for number, (axis, (title, values)) in enumerate(zip(others, bars.items(), strict=True)):
            places = np.arange(len(values))[::-1]
            heights = np.array([value for value, _, _ in values.values()])
            reach = np.array([(value - low, high - value) for value, low, high in values.values()]).T
            axis.barh(places, 100 * heights, xerr=100 * np.maximum(reach, 0), color="#8fb0e8", capsize=2)
            axis.set_yticks(places, list(values) if number == 0 else [""] * len(values))
            axis.set(xlim=(0, 100), xlabel="%")
            axis.set_title(title, fontsize=9, loc="left", parse_math=False)
        for axis in (first, *others):
            axis.grid(color="#e3e7ee", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def with_interval(found: Mapping[str, Any], of: str = "accuracy") -> str:
    """`63.1 % (60.0 to 66.2)` of figures with a share under that name, "low" and "high"."""
    return f"{100 * found[of]:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def points(change: Mapping[str, Any]) -> str:
    """`+1.2 (-0.5 to +2.9)` of a comparison as `comparison.compare_groups` gives it."""
    return f"{change['difference']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f})"


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser, run_dir: str, arms: Sequence[str]) -> None:
    """What the commands take whose arms are trained for as many steps each, whichever of them are."""
    add_common_arguments(parser, run_dir)
    parser.add_argument("--only", nargs="+", choices=arms, metavar="ARM", help=f"of {', '.join(arms)}; default all")
    parser.add_argument("--steps", type=int, metavar="N", help="of every arm, in place of the size's")


def add_common_arguments(parser: ArgumentParser, run_dir: str) -> None:
    """What all commands with arms take."""
    parser.add_argument("--run_dir", default=run_dir, metavar="DIR", help=f"default {run_dir}")
    parser.add_argument("--size", choices=("smoke", "small"), default="small", help="default small")
    parser.add_argument("--per_kind", type=int, metavar="N", help="questions of each kind, in place of the size's")
    parser.add_argument("--write", action="store_true", help="also write the results beside the command's file")


def run_study(study: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Checks the arguments, sets up the process, and returns the exit status of a study: 0, or 128 + the signal that
    stopped it.

    Raises:
      UserError: numbers below 1; and as `study`.
    """
    for name in ("steps", "per_kind"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    prepare_process()
    try:
        study(arguments)
    except loop.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    return 0
