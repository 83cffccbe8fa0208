"""`<run_dir>/report.html`: what a run reached, in one file that needs nothing else.

Figures against floor and goal, loss curves, accuracy after every stage and in parts, held-out pictures and clips with
question, answer and truth, parameters and time. Everything is read from the files of the run.
"""

from __future__ import annotations

import base64
import dataclasses
import html
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
from vita_jax.evaluation.runner import FINAL, benchmark_folder, percent, read_evaluation, stage_accuracies, verdict
from vita_jax.parallel.rules import unbox
from vita_jax.training.checkpoint import CONFIG
from vita_jax.training.experiment import ExperimentConfig, build_model
from vita_jax.training.metrics import format_duration, read_metrics
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.stages import flatten, parameter_counts

REPORT = "report.html"
# How many pictures, clips and text questions of each group are shown.
SHOWN = {"typed": 9, "typed_unseen_writers": 3, "video_order": 3, "text": 3}
SHOWN_OTHERWISE = 3
MOST_FRAMES = 8
PICTURE_SIDE = 360
FRAME_SIDE = 96

STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --paper: #fff; --ground: #f5f6f9; --accent: #2f5fd0;
  --good: #18794e; --good-soft: #e6f6ee; --bad: #b42318; --bad-soft: #fdecea; --mid: #8a5a00; --mid-soft: #fff4dc }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px } h2 { font-size: 19px; margin: 40px 0 12px }
p { margin: 0 0 12px } .soft { color: var(--soft) }
.row { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(245px, 1fr)) }
.panel { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  overflow-x: auto }
.panel img { max-width: 100%; display: block } .figure { font-size: 32px; font-weight: 650; line-height: 1.2 }
.tag { display: inline-block; border-radius: 999px; padding: 1px 10px; font-size: 13px; font-weight: 600;
  white-space: nowrap }
.good { background: var(--good-soft); color: var(--good) } .bad { background: var(--bad-soft); color: var(--bad) }
.mid { background: var(--mid-soft); color: var(--mid) }
.bar { position: relative; height: 8px; border-radius: 4px; background: var(--line); margin: 10px 0 6px }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent) }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { font-weight: 600; color: var(--soft); font-size: 13px; white-space: normal; vertical-align: bottom }
tr:last-child td { border-bottom: 0 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.tables { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(245px, 1fr)); align-items: start }
/* two panels that keep the width of their tables */
.pair { display: flex; flex-wrap: wrap; gap: 16px; align-items: start } .pair .panel { flex: 1 1 auto; max-width: 100% }
h3 { font-size: 15px; margin: 0 0 6px } .parts table { table-layout: fixed; margin-bottom: 10px }
.item { background: var(--paper); border: 1px solid var(--line); border-top: 4px solid var(--good);
  border-radius: 10px; overflow: hidden; display: flex; flex-direction: column }
.item.wrong { border-top-color: var(--bad) } .item.wide { grid-column: 1 / -1; flex-direction: row }
@media (max-width: 720px) { .item.wide { flex-direction: column } }
.item .shot { background: #eceff4; display: flex; gap: 4px; padding: 10px; justify-content: center; flex-wrap: wrap }
.item .shot img { max-width: 100%; height: 150px; object-fit: contain } 
.item.wide .shot img { height: 80px }
.item .said { padding: 10px 14px 14px; min-width: 0 } .item dl { margin: 6px 0 0; display: grid;
  grid-template-columns: max-content 1fr; gap: 2px 12px } .item dt { color: var(--soft) }
.item dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
footer { margin-top: 48px; color: var(--soft); font-size: 13px }
"""


def write_report(run_dir: str | Path) -> Path:
    """Writes the report of a run, of whatever it has done so far. Returns its path.

    Raises:
      UserError: `run_dir` is no run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir} is not a run: it has no {CONFIG}")
    config = config_lib.load_json(ExperimentConfig, run_dir / CONFIG)
    config = dataclasses.replace(config, run_dir=str(run_dir))
    result = _final_result(config, run_dir)
    records = list(read_metrics(run_dir))
    parts = [_header(config, result, records)]
    if result is not None:
        parts.append(_scores(result["groups"]))
    parts += [_losses(config, records), _stages(run_dir, config)]
    if result is not None:
        parts += [_details(result["groups"]), _gallery(config, result)]
    parts.append(_sizes(config, records))
    title = _text(f"{config.name} ({config.size})")
    body = "\n".join(part for part in parts if part)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written from the files in {_text(run_dir)}.</footer>\n</main>\n</body>\n</html>\n"
    )
    path = run_dir / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def _final_result(config: ExperimentConfig, run_dir: Path) -> dict[str, Any] | None:
    """The result at the end of the run, or after its last evaluated stage."""
    names = [FINAL, *(stage.name for stage in reversed(config.stages))]
    return next((found for name in names if (found := read_evaluation(run_dir, name)) is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def _header(config: ExperimentConfig, result: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(record["seconds"] for record in records if record["event"] == "stage")
    facts = [f"size {config.size}", f"{len(config.stages)} stages", f"{format_duration(seconds)} of training"]
    if result is not None:
        asked = f"{result['num_items']:,} questions answered in {format_duration(result['seconds'])}"
        if result["limit"] is not None:
            asked += f" (a part of the benchmark: at most {result['limit']} of each kind)"
        facts.append(asked)
    else:
        facts.append("not evaluated yet")
    return f"<h1>{_text(config.name)}</h1>\n<p class=soft>{_text(' · '.join(facts))}</p>"


def _scores(groups: Mapping[str, Any]) -> str:
    cards = []
    for group in groups.values():
        marks = "".join(
            f'<b style="left:{100 * group[name]:.1f}%" title="{name} {percent(group[name])}"></b>'
            for name in ("floor", "goal")
            if group[name] is not None
        )
        notes = [f"{group['n']:,} questions", f"answer prior {percent(group['prior'])}"]
        notes += [f"{name} {percent(group[name])}" for name in ("floor", "goal") if group[name] is not None]
        colour = "good" if group["goal_reached"] else "mid" if group["floor_reached"] else "bad"
        tag = f"<span class='tag {colour}'>{_text(verdict(group))}</span>" if group["floor"] is not None else ""
        cards.append(
            f"<div class=panel><div class=soft>{_text(group['title'])}</div>"
            f"<div class=figure>{percent(group['accuracy'])}</div>"
            f'<div class=bar><i style="width:{100 * group["accuracy"]:.1f}%"></i>{marks}</div>'
            f"<p class=soft>{_text(' · '.join(notes))}</p>{tag}</div>"
        )
    note = "<p class=soft>Accuracy on held-out data, mean over kinds of question. Marks on the bars: floor, goal.</p>"
    return f"<h2>Result</h2>\n{note}\n<div class=row>{''.join(cards)}</div>"


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
    image = _image_tag(data.getvalue(), "loss by step, one panel per stage")
    return f"<h2>Loss by stage</h2>\n<div class=panel>{image}</div>"


def _stages(run_dir: Path, config: ExperimentConfig) -> str:
    stages = stage_accuracies(run_dir, config)
    if not stages:
        return ""
    titles = {name: group["title"] for _, groups in reversed(stages) for name, group in groups.items()}
    rows = [
        [title, *(percent(groups[name]["accuracy"]) if name in groups else "-" for name in titles)]
        for title, groups in stages
    ]
    table = _table(["stage", *titles.values()], rows)
    return f"<h2>Accuracy after each stage</h2>\n<div class=panel>{table}</div>"


def _details(groups: Mapping[str, Any]) -> str:
    panels = []
    for group in groups.values():
        parts = []
        for label, key in (("kind", "by_kind"), ("language", "by_language"), ("digits", "by_num_digits")):
            if group[key]:
                rows = [[name, percent(part["accuracy"]), f"{part['n']:,}"] for name, part in group[key].items()]
                parts.append(_table([label, "accuracy", "n"], rows))
        panels.append(f"<div class='panel parts'><h3>{_text(group['title'])}</h3>{''.join(parts)}</div>")
    return f"<h2>In parts</h2>\n<div class=tables>{''.join(panels)}</div>"


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
    return f"<h2>Held-out questions</h2>\n{note}\n<div class=row>{''.join(cards)}</div>"


def _card(config: ExperimentConfig, root: Path, example: Mapping[str, Any]) -> str:
    pictures: list[Image.Image] = []
    if example["image"] is not None:
        pictures = [open_image(root / example["image"])]
    elif example["video"] is not None:
        frames = read_video(root / example["video"], config.image, rule=config.video_rule)
        taken = np.unique(np.linspace(0, len(frames) - 1, MOST_FRAMES).round().astype(int))
        pictures = [Image.fromarray(frames[index]) for index in taken]
    side = FRAME_SIDE if example["video"] is not None else PICTURE_SIDE
    tags = "".join(_picture_tag(picture, side) for picture in pictures)
    shot = f"<div class=shot>{tags}</div>" if tags else ""
    outcome, colour = ("right", "good") if example["right"] else ("wrong", "bad")
    mark = "✓" if example["right"] else "✗"
    wide = " wide" if example["video"] is not None else ""
    # An empty answer has to be visible, too.
    answer = _text(example["answer"]) or "<span class=soft>(nothing)</span>"
    return (
        f"<div class='item {outcome}{wide}'>{shot}<div class=said>"
        f"<span class='tag {colour}'>{mark} {outcome}</span> "
        f"<span class=soft>{_text(example['kind'])} · {_text(example['language'])}</span>"
        f"<dl><dt>question</dt><dd>{_text(example['question'])}</dd><dt>answer</dt><dd><strong>{answer}</strong></dd>"
        f"<dt>truth</dt><dd>{_text(example['truth'])}</dd></dl></div></div>"
    )


def _sizes(config: ExperimentConfig, records: Iterable[Mapping[str, Any]]) -> str:
    """Parameters by component, and what every stage trained for how long."""
    shapes = _parameter_shapes(config)
    counts = {name: frozen for name, (_, frozen) in parameter_counts(shapes, ()).items()}
    total = sum(counts.values())
    rows = [[name, f"{count:,}", percent(count / total)] for name, count in counts.items()]
    components = _table(["component", "parameters", "share"], [*rows, ["total", f"{total:,}", ""]])
    finished = [record for record in records if record["event"] == "stage"]
    rows = [
        [r["title"], f"{r['step']:,}", f"{r['trainable']:,}", f"{r['frozen']:,}", format_duration(r["seconds"])]
        for r in finished
    ]
    rows.append(["total", "", "", "", format_duration(sum(record["seconds"] for record in finished))])
    stages = _table(["stage", "steps", "trainable", "frozen", "time"], rows)
    return (
        "<h2>Parameters and time</h2>\n<div class=pair>"
        f"<div class=panel>{components}</div><div class=panel>{stages}</div></div>"
    )


def _parameter_shapes(config: ExperimentConfig) -> dict[str, Any]:
    """Path -> shape of the model's parameters, nothing allocated."""
    model = build_model(config)
    objective = OBJECTIVES["language_modeling"]
    return flatten(unbox(jax.eval_shape(lambda key: init_params(model, objective, key), jax.random.key(0))))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of HTML
# ---------------------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _image_tag(png: bytes, description: str) -> str:
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _picture_tag(picture: Image.Image, side: int) -> str:
    """The picture, made smaller if its longer side exceeds `side`."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="png")
    return _image_tag(data.getvalue(), "held-out picture")
