"""`<run_dir>/report.html`: what a run reached, in one file that needs nothing else.

Figures against floor and goal, loss curves, accuracy after every stage and in parts, held-out pictures and clips with
question, answer and truth, questions and replies to listen to, parameters and time. Everything is read from the files
of the run: results `evaluation/final.json` and, of a model that hears, `evaluation/final.speech.json`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vita_jax import config as config_lib
from vita_jax.data.images import open_image
from vita_jax.data.video import read_video
from vita_jax.errors import UserError
from vita_jax.evaluation.report_html import STYLE, escaped, image_tag, picture_tag, table
from vita_jax.evaluation.report_sounds import changes_section, confusion_section, player, real_time_section, replies
from vita_jax.evaluation.results import FINAL, percent, read_evaluation, stage_accuracies, verdict
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.parallel.rules import unbox
from vita_jax.storage import place, write_whole
from vita_jax.training.checkpoint import CONFIG
from vita_jax.training.experiment import ExperimentConfig, build_model
from vita_jax.training.metrics import format_duration, read_metrics
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.stages import flatten, parameter_counts

REPORT = "report.html"
# The benchmarks and what their results are called behind the name of the stage.
BENCHMARKS = {"quickstart": "", "speech": ".speech"}
# How many pictures, clips, sounds and text questions of each group are shown.
SHOWN = {"typed": 9, "typed_unseen_writers": 3, "video_order": 3, "text": 3, "spoken": 9}
SHOWN_OTHERWISE = 3
MOST_FRAMES = 8
PICTURE_SIDE = 360
FRAME_SIDE = 96


def write_report(run_dir: str | Path) -> Path:
    """Writes the report of a run, of whatever it has done so far. Returns its path.

    Raises:
      UserError: `run_dir` is no run.
    """
    run_dir = place(run_dir)
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir} is not a run: it has no {CONFIG}")
    config = config_lib.load_json(ExperimentConfig, run_dir / CONFIG)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    results = {name: _final_result(config, run_dir, suffix) for name, suffix in BENCHMARKS.items()}
    found = [result for result in results.values() if result is not None]
    speech = results["speech"] or {}
    records = list(read_metrics(run_dir))
    groups = {name: group for result in found for name, group in result["groups"].items()}
    parts = [_header(config, found, records), _scores(groups)]
    parts += [changes_section(result) for result in found]
    parts += [_losses(config, records), _stages(run_dir, config), _details(groups)]
    parts += [confusion_section(speech), real_time_section(speech)]
    parts += [_gallery(config, result) for result in found]
    if speech:
        parts.append(replies(run_dir, benchmark_folder(config, "speech"), speech))
    parts.append(_sizes(config, records))
    title = escaped(f"{config.name} ({config.size})")
    body = "\n".join(part for part in parts if part)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written from the files in {escaped(run_dir)}.</footer>\n</main>\n</body>\n</html>\n"
    )
    path = run_dir / REPORT
    write_whole(path, page)
    return path


def _final_result(config: ExperimentConfig, run_dir: Path, suffix: str) -> dict[str, Any] | None:
    """A benchmark's result at the end of the run, or after its last evaluated stage."""
    names = [FINAL, *(stage.name for stage in reversed(config.stages))]
    return next((found for name in names if (found := read_evaluation(run_dir, name + suffix)) is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def _header(
    config: ExperimentConfig, results: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> str:
    seconds = sum(record["seconds"] for record in records if record["event"] == "stage")
    facts = [f"size {config.size}", f"{len(config.stages)} stages", f"{format_duration(seconds)} of training"]
    for result in results:
        fact = f"{result['title']}: {result['num_items']:,} questions in {format_duration(result['seconds'])}"
        if result["limit"] is not None:
            fact += f" (a part of the benchmark: at most {result['limit']} of each kind)"
        facts.append(fact)
    if not results:
        facts.append("not evaluated yet")
    return f"<h1>{escaped(config.name)}</h1>\n<p class=soft>{escaped(' · '.join(facts))}</p>"


def _scores(groups: Mapping[str, Any]) -> str:
    cards = []
    for group in groups.values():
        marks = "".join(
            f'<b style="left:{100 * group[name]:.1f}%" title="{name} {percent(group[name])}"></b>'
            for name in ("floor", "goal")
            if group[name] is not None
        )
        notes = [f"{group['n']:,} asked"]
        named = (("answer prior", "prior"), ("floor", "floor"), ("goal", "goal"))
        notes += [f"{label} {percent(group[name])}" for label, name in named if group[name] is not None]
        colour = "good" if group["goal_reached"] else "mid" if group["floor_reached"] else "bad"
        tag = f"<span class='tag {colour}'>{escaped(verdict(group))}</span>" if group["floor"] is not None else ""
        cards.append(
            f"<div class=panel><div class=soft>{escaped(group['title'])}</div>"
            f"<div class=figure>{percent(group['accuracy'])}</div>"
            f'<div class=bar><i style="width:{100 * group["accuracy"]:.1f}%"></i>{marks}</div>'
            f"<p class=soft>{escaped(' · '.join(notes))}</p>{tag}</div>"
        )
    note = "<p class=soft>Accuracy on held-out data, mean over kinds of question. Marks on the bars: floor, goal.</p>"
    return f"<h2>Result</h2>\n{note}\n<div class=row>{''.join(cards)}</div>" if cards else ""


def _losses(config: ExperimentConfig, records: Iterable[Mapping[str, Any]]) -> str:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        if record["event"] == "step":
            steps, losses = curves.setdefault(record["stage"], ([], []))
            steps.append(record["step"])
            losses.append(record["loss"])
    if not curves:
        return ""
    titles = {stage.name: stage.title for stage in config.stages}
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.7 * columns, 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (name, (steps, losses)) in zip(axes, curves.items(), strict=False):
            axis.plot(steps, losses, color="#2f5fd0", linewidth=1.4, marker="." if len(steps) < 3 else "")
            # A title from the configuration is shown as it is, not read as a formula.
            axis.set_title(titles.get(name, name), fontsize=10, loc="left", parse_math=False)
            if min(losses) > 0 and max(losses) > 20 * min(losses):
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.grid(color="#e3e7ee", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("step")
            axis.set_ylabel("loss")
        for axis in axes[len(curves) :]:
            axis.set_visible(False)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150)
    image = image_tag(data.getvalue(), "loss by step, one panel per stage")
    return f"<h2>Loss by stage</h2>\n<div class=panel>{image}</div>"


def _stages(run_dir: Path, config: ExperimentConfig) -> str:
    panels = [_stage_panel(stage_accuracies(run_dir, config)), _stage_panel(_stages_heard(run_dir, config))]
    return f"<h2>Accuracy after each stage</h2>\n<div class=stack>{''.join(panels)}</div>" if any(panels) else ""


def _stages_heard(run_dir: Path, config: ExperimentConfig) -> list[tuple[str, dict[str, Any]]]:
    """(title, groups) of the benchmark "speech" after the stages, as `stage_accuracies` of the first."""
    named = [*((stage.title, stage.name) for stage in config.stages), (FINAL, FINAL)]
    found = [(title, read_evaluation(run_dir, name + BENCHMARKS["speech"])) for title, name in named]
    return [(title, result["groups"]) for title, result in found if result is not None]


def _stage_panel(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if not stages:
        return ""
    titles = {name: group["title"] for _, groups in reversed(stages) for name, group in groups.items()}
    rows = [
        [title, *(percent(groups[name]["accuracy"]) if name in groups else "-" for name in titles)]
        for title, groups in stages
    ]
    return f"<div class=panel>{table(['stage', *titles.values()], rows)}</div>"


def _details(groups: Mapping[str, Any]) -> str:
    panels = []
    for group in groups.values():
        parts = []
        for label, key in (("kind", "by_kind"), ("language", "by_language"), ("digits", "by_num_digits")):
            if group.get(key):
                rows = [[name, percent(part["accuracy"]), f"{part['n']:,}"] for name, part in group[key].items()]
                parts.append(table([label, "accuracy", "n"], rows))
        if parts:
            panels.append(f"<div class='panel parts'><h3>{escaped(group['title'])}</h3>{''.join(parts)}</div>")
    return f"<h2>In parts</h2>\n<div class=tables>{''.join(panels)}</div>" if panels else ""


def _gallery(config: ExperimentConfig, result: Mapping[str, Any]) -> str:
    shown: dict[str, list[Mapping[str, Any]]] = {}
    for example in result["examples"]:
        chosen = shown.setdefault(example["group"], [])
        if len(chosen) < SHOWN.get(example["group"], SHOWN_OTHERWISE):
            chosen.append(example)
    if not any(shown.values()):
        return ""
    root = benchmark_folder(config, result["benchmark"])
    cards = [_card(config, root, example) for examples in shown.values() for example in examples]
    note = "<p class=soft>Taken in turn from every kind and language, not chosen by their answers.</p>"
    title = "Held-out questions" if result["benchmark"] != "speech" else "Held-out sounds"
    return f"<h2>{title}</h2>\n{note}\n<div class=row>{''.join(cards)}</div>"


def _card(config: ExperimentConfig, root: Path, example: Mapping[str, Any]) -> str:
    pictures: list[Image.Image] = []
    if example["image"] is not None:
        pictures = [open_image(root / example["image"])]
    elif example["video"] is not None:
        frames = read_video(root / example["video"], config.image, rule=config.video_rule)
        taken = np.unique(np.linspace(0, len(frames) - 1, MOST_FRAMES).round().astype(int))
        pictures = [Image.fromarray(frames[index]) for index in taken]
    side = FRAME_SIDE if example["video"] is not None else PICTURE_SIDE
    tags = "".join(picture_tag(picture, side) for picture in pictures)
    shot = f"<div class=shot>{tags}</div>" if tags else ""
    if example.get("audio") is not None:
        shot += player(root / example["audio"])
    outcome, colour = ("right", "good") if example["right"] else ("wrong", "bad")
    mark = "✓" if example["right"] else "✗"
    wide = " wide" if example["video"] is not None else ""
    question = escaped(example["question"]) or "<span class=soft>(spoken)</span>"
    # An empty answer has to be visible, too.
    answer = escaped(example["answer"]) or "<span class=soft>(nothing)</span>"
    return (
        f"<div class='item {outcome}{wide}'>{shot}<div class=said>"
        f"<span class='tag {colour}'>{mark} {outcome}</span> "
        f"<span class=soft>{escaped(example['kind'])} · {escaped(example['language'])}</span>"
        f"<dl><dt>question</dt><dd>{question}</dd><dt>answer</dt><dd><strong>{answer}</strong></dd>"
        f"<dt>truth</dt><dd>{escaped(example['truth'])}</dd></dl></div></div>"
    )


def _sizes(config: ExperimentConfig, records: Iterable[Mapping[str, Any]]) -> str:
    """Parameters by component, and what every stage trained for how long."""
    shapes = _parameter_shapes(config)
    counts = {name: frozen for name, (_, frozen) in parameter_counts(shapes, ()).items()}
    total = sum(counts.values())
    rows = [[name, f"{count:,}", percent(count / total)] for name, count in counts.items()]
    components = table(["component", "parameters", "share"], [*rows, ["total", f"{total:,}", ""]])
    finished = [record for record in records if record["event"] == "stage"]
    rows = [
        [r["title"], f"{r['step']:,}", f"{r['trainable']:,}", f"{r['frozen']:,}", format_duration(r["seconds"])]
        for r in finished
    ]
    rows.append(["total", "", "", "", format_duration(sum(record["seconds"] for record in finished))])
    stages = table(["stage", "steps", "trainable", "frozen", "time"], rows)
    return (
        "<h2>Parameters and time</h2>\n<div class=pair>"
        f"<div class=panel>{components}</div><div class=panel>{stages}</div></div>"
    )


def _parameter_shapes(config: ExperimentConfig) -> dict[str, Any]:
    """Path -> shape of the model's parameters, nothing allocated."""
    model = build_model(config)
    objective = OBJECTIVES["language_modeling"]
    return flatten(unbox(jax.eval_shape(lambda key: init_params(model, objective, key), jax.random.key(0))))
