"""Modality conflict: what a model can do after each stage of its curriculum, and if everything is trained at once.

    python -m experiments.studies.modality_conflict --run_dir runs/modality_conflict
    python -m experiments.studies.modality_conflict --run_dir runs/conflict_of_run --run runs/quickstart
    python -m experiments.studies.modality_conflict --run_dir runs/conflict_part --run runs/quickstart --share 0.4
    python -m experiments.studies.modality_conflict --run_dir /tmp/conflict --size smoke

The papers train stage by stage so that pictures, clips and sound do not spoil each other and the text (VITA-1.5,
arXiv 2501.01957, sections 1 and 3.3). Here the quickstart's stages 1.1, 1.2, 1.3, 2.1b and 2.2 stand against one stage
with the same data from the same start. Both are asked the same held-out questions after as many steps: about pictures,
about the order of digits in clips, about scenes in words, and spoken ones about pictures.

Without `--run` what both start from is trained here: language model, tower and speech encoder with its adapter; with it
a run of the quickstart lends them, its data and its tokenizer. `--share` is the part of the quickstart's steps (without
`--run` also of its training data) that is trained. With `--run` and without `--share` the stages of that run are
measured as they are and only the other arm is trained: 7,400 steps, an estimated 25 minutes of two CPU cores. The
other two are laid out for 15 to 20, to which making the data comes where no run lends any. The same command goes on
where it was stopped; what is finished is neither trained nor asked again.

Equal for both arms: the weights they start from, but see below; steps; positions of rows within rounding; sources, and
the share of all records that each gives; the parts that are trained at all; optimiser and schedule, but for stages that
train by Muon; the questions, and how answers are drawn and compared.

What cannot be equal:
* when a part trains. All at once, all of them do so all the time; the stages train the projector alone in 1.1, the
  vision tower in 1.2 and 1.3 only, adapter and input head when there is sound;
* the rate. The stages have one each; all at once the peak is their mean over the steps. It is tuned for neither:
  `--rate`, into another folder, says how much hangs on it;
* how far a schedule is. At the end of each stage its rate is 0; all at once only the last row of the table is an end;
* how many records fill the rows: a mixture of long and short ones fills them better, so that the arm at once reads a
  tenth more in as many positions. The last table has the numbers;
* the adapter, where the stages of a run are measured: all at once it starts as 2.1a left it, which had learnt with the
  language model of 1.3. That favours the arm that is trained at once.

Leaves `<run_dir>/conflict.json`, `.md` and `.png`, with `--write` also in `results/` beside this file. Figures are
accuracies, means over kinds of questions, with 95 % bootstrap intervals; differences are in points on the same
questions with the 95 % interval of the pairs. Records are those that were read and could be used; seconds are of
training alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import quickstart
from experiments.benchmarks.turns import format_table
from experiments.studies.arms import (
    START,
    add_common_arguments,
    add_intervals,
    points,
    read_result,
    run_study,
    stage_cost,
    train_shared,
    with_interval,
    write_start,
    write_study,
)
from experiments.studies.modality_conflict.curricula import (
    JOINT,
    PARTS,
    STAGED,
    existing_run,
    joint_config,
    milestones,
    shared_config,
    staged_config,
)
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.evaluation.results import save_result
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.parallel.mesh import make_mesh
from vita_jax.parallel.rules import use_mesh
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import ExperimentConfig, build_model, tokenizer_folder
from vita_jax.training.plan import initial_params, plan_stage
from vita_jax.training.stages import unflatten

# Benchmark -> its groups that are asked, and how they are called.
ASKED = {"quickstart": ("typed", "video_order", "text"), "speech": ("spoken",)}
TITLES = {"typed": "pictures", "video_order": "clips", "text": "text", "spoken": "pictures, spoken"}
ARMS = {"staged": "staged", JOINT: "all at once"}
SHARE = 0.25  # of the quickstart, where nothing else is asked for
PER_KIND = {"small": 120, "smoke": 2}
# From the first of them on nothing about pictures is new to the staged arm; what the stages of sound cost it shows from
# there to the last.
SEEN = STAGED.index("vision_sft")
NAME, STUDY = "conflict", "study.json"
RESULTS = Path(__file__).parent / "results"
Groups = dict[str, dict[str, Any]]


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(config: ExperimentConfig, params: Mapping[str, Any], per_kind: int) -> Groups:
    """The figures of all groups with their intervals; `per_kind` questions of each kind."""
    tokenizer, found = load_tokenizer(tokenizer_folder(config)), {}
    for benchmark, groups in ASKED.items():
        asked = evaluate_params(config, params, tokenizer, benchmark=benchmark, groups=groups, limit=per_kind)
        found |= asked["groups"]
    return add_intervals(found)


def kept(file: Path, per_kind: int, what: str, find: Callable[[], Groups]) -> Groups:
    """Figures from their file, or found and put there."""
    if not file.is_file():
        print(f"asking: {what}", flush=True)
        save_result({"per_kind": per_kind, "groups": find()}, file)
    groups = read_result(file, per_kind)["groups"]
    print(
        f"{what}: {', '.join(f'{TITLES[name]} {with_interval(group)}' for name, group in groups.items())}", flush=True
    )
    return groups


def first_params(config: ExperimentConfig) -> dict[str, Any]:
    """What the one stage of a run starts with."""
    (stage,), mesh = config.stages, make_mesh(config.mesh)
    with use_mesh(mesh):
        model = build_model(config)
        return unflatten(initial_params(config, model, plan_stage(config, model, stage, mesh)))


def measure_all(staged: ExperimentConfig, joint: ExperimentConfig, per_kind: int, folder: Path) -> dict[str, Any]:
    """The figures after every stage of one arm and every milestone of the other, both of which are trained.

    Returns:
      {"start": groups, arm: {"title", "points": [{"step", "behind": title of the stage, "groups"}], "costs": sums of
      `stage_cost`}}.
    """
    stages = [staged.stage(name) for name in STAGED]
    ends, joint_folder = milestones(stages), checkpoint_folder(joint.run_dir, JOINT)
    arms = {
        "staged": (staged, stages, [checkpoint_folder(staged.run_dir, stage.name) for stage in stages]),
        JOINT: (joint, joint.stages, [joint_folder / str(end) for end in ends]),
    }
    first = functools.partial(measure, joint, per_kind=per_kind)
    found: dict[str, Any] = {
        "start": kept(folder / "start.json", per_kind, "start", lambda: first(first_params(joint)))
    }
    for arm, (config, trained, checkpoints) in arms.items():
        rows = []
        for stage, end, checkpoint in zip(stages, ends, checkpoints, strict=True):
            find = functools.partial(measure_saved, config, checkpoint, per_kind)
            groups = kept(folder / f"{arm}_{end}.json", per_kind, f"{ARMS[arm]}, {end} steps", find)
            rows.append({"step": end, "behind": stage.title, "groups": groups})
        costs = [stage_cost(config.run_dir, stage) for stage in trained]
        sums = {key: sum(cost[key] for cost in costs) for key in costs[0]}
        found[arm] = {"title": ARMS[arm], "points": rows, "costs": sums}
    return found


def measure_saved(config: ExperimentConfig, checkpoint: Path, per_kind: int) -> Groups:
    """`measure` of a checkpoint."""
    return measure(config, load_params(checkpoint).params, per_kind)


# ---- the page -------------------------------------------------------------------------------------------------------


def table_of_points(found: Mapping[str, Any]) -> str:
    """A row for the start, one for each arm after each stage, and what the best constant answers reach; Markdown."""

    def row(behind: str, step: int, arm: str, groups: Groups) -> tuple[str, ...]:
        return (behind, f"{step:,}", arm, *(with_interval(groups[name]) for name in TITLES))

    rows = [row("(start)", 0, "both", found["start"])]
    for pair in zip(*(found[arm]["points"] for arm in ARMS), strict=True):
        rows += [
            row(point["behind"], point["step"], title, point["groups"])
            for title, point in zip(ARMS.values(), pair, strict=True)
        ]
    priors = (f"{100 * found['start'][name]['prior']:.1f} %" for name in TITLES)
    rows.append(("(constant answers)", "-", "-", *priors))
    return format_table(("after", "steps", "arm", *TITLES.values()), rows, markdown=True)


def table_of_differences(found: Mapping[str, Any]) -> str:
    """The arm that is trained at once minus the staged one, after each stage; Markdown."""
    rows = []
    for staged, joint in zip(*(found[arm]["points"] for arm in ARMS), strict=True):
        changes = (points(compare_groups(staged["groups"][name], joint["groups"][name])) for name in TITLES)
        rows.append((staged["behind"], f"{staged['step']:,}", *changes))
    return format_table(("all at once - staged, points, after", "steps", *TITLES.values()), rows, markdown=True)


def table_of_changes(found: Mapping[str, Any]) -> str:
    """What each arm gains or loses over the steps that the stages of sound have; Markdown."""
    rows = []
    for arm, title in ARMS.items():
        before, after = found[arm]["points"][SEEN], found[arm]["points"][-1]
        changes = (points(compare_groups(before["groups"][name], after["groups"][name])) for name in TITLES)
        rows.append((title, f"{before['step']:,} to {after['step']:,}", *changes))
    return format_table(("change, points", "steps", *TITLES.values()), rows, markdown=True)


def table_of_costs(found: Mapping[str, Any]) -> str:
    """What the training of each arm took; Markdown."""
    keys = ("steps", "positions", "records", "seconds")
    rows = [(title, *(f"{found[arm]['costs'][key]:,.0f}" for key in keys)) for arm, title in ARMS.items()]
    return format_table(("arm", *keys), rows, markdown=True)


def draw_points(found: Mapping[str, Any]) -> Figure:
    """A panel for each group: accuracy over steps, both arms with their intervals, from the same start."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.1 * len(TITLES), 3.4), layout="constrained")
        panels = figure.subplots(1, len(TITLES), sharey=True, squeeze=False)[0]
        for axis, (group, title) in zip(panels, TITLES.items(), strict=True):
            for arm, colour in zip(ARMS, ("#3d6fc4", "#c4633d"), strict=True):
                measured = [(0, found["start"][group])]
                measured += [(point["step"], point["groups"][group]) for point in found[arm]["points"]]
                steps = [step for step, _ in measured]
                value, low, high = (
                    100 * np.array([figures[key] for _, figures in measured]) for key in ("accuracy", "low", "high")
                )
                axis.plot(steps, value, marker=".", linewidth=1.2, color=colour, label=ARMS[arm])
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set(xlabel="step", ylim=(0, 100))
            axis.set_title(title, fontsize=9, loc="left")
            axis.grid(color="#e3e7ee", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("%")
        panels[0].legend(frameon=False, fontsize=8)
    return figure


# ---- the command ----------------------------------------------------------------------------------------------------


def claim(arguments: argparse.Namespace) -> None:
    """Makes the folder that of this study. Raises UserError if it holds one of another size, run, share or rate."""
    file, asked = (
        Path(arguments.run_dir) / STUDY,
        {key: getattr(arguments, key) for key in ("size", "run", "share", "rate")},
    )
    if not file.is_file():
        save_result(asked, file)
    if (before := json.loads(file.read_text(encoding="utf-8"))) != asked:
        listed = "; ".join(
            f"--{key} {before[key]} there, {asked[key]} now" for key in asked if before[key] != asked[key]
        )
        raise UserError(f"{arguments.run_dir} holds another study ({listed}); use these values, or another --run_dir")


def train(arguments: argparse.Namespace) -> tuple[ExperimentConfig, ExperimentConfig]:
    """Trains what is not there yet; returns the configurations of both arms, the first of which may be a run's."""
    size, run_dir = arguments.size, arguments.run_dir
    share = arguments.share or (1.0 if size == "smoke" else SHARE)
    if arguments.run is None:
        base, curriculum = shared_config(size, share, run_dir), quickstart.get_config(size)
        claim(arguments)
        start = train_shared(base, quickstart.prepare, PARTS)
    else:
        measured = STAGED if arguments.share is None else ()
        base = curriculum = existing_run(arguments.run, (*PARTS.values(), *measured))
        claim(arguments)
        start = write_start(base, Path(run_dir) / START, PARTS)
    staged = base
    if arguments.run is None or arguments.share is not None:
        staged = staged_config(base, curriculum, start, share, run_dir)
        loop.run(staged)
    joint = joint_config(staged, start, arguments.rate, run_dir)
    loop.run(joint)
    return staged, joint


def study(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes."""
    staged, joint = train(arguments)
    per_kind = arguments.per_kind or PER_KIND[arguments.size]
    found = measure_all(staged, joint, per_kind, Path(arguments.run_dir) / "measured")
    tables = [table_of_points(found), table_of_differences(found), table_of_changes(found), table_of_costs(found)]
    print("\n\n".join(tables))
    (stage,), groups = joint.stages, found["start"]
    settings = {
        "size": arguments.size,
        "stages of one arm": "measured in a run" if staged.run_dir == arguments.run else "trained here",
        "rows of a step, all at once": f"{stage.batch_size} of {stage.row_length}",
        "rate, all at once": f"{stage.learning_rate:.3g}",
        "sources, all at once": ", ".join(f"{source.path} {source.weight:.3f}" for source in stage.sources),
        "questions": ", ".join(f"{TITLES[name]} {groups[name]['n']}" for name in TITLES),
    }
    folders = [Path(arguments.run_dir), *([RESULTS] if arguments.write else [])]
    figure, caption = draw_points(found), "accuracies over steps"
    write_study(folders, NAME, "Modality conflict", tables, settings, found, figure, caption)


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    if arguments.share is not None and not 0 < arguments.share <= 1:
        raise UserError(f"--share {arguments.share} must be above 0 and at most 1")
    if arguments.rate is not None and not arguments.rate > 0:
        raise UserError(f"--rate {arguments.rate} must be above 0")
    return run_study(study, arguments)


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.studies.modality_conflict",
        description="The staged curriculum against everything at once.",
        epilog=__doc__,
    )
    add_common_arguments(parser, "runs/modality_conflict")
    parser.add_argument("--run", metavar="RUN", help="a run of the quickstart to start from, up to its stage 2.2")
    parser.add_argument(
        "--share",
        type=float,
        metavar="S",
        help=f"of the quickstart's steps; default {SHARE}, or with --run its own stages; smoke 1",
    )
    parser.add_argument("--rate", type=float, metavar="R", help="peak of the arm at once; default: mean of the stages'")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for bad input, 128 + signal number when stopped."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
