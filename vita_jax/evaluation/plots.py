"""Pictures of results without a published figure beside them: bars with intervals, or what was taken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

WIDTH_INCHES, ROW_INCHES = 8.0, 0.35
COLOUR = "#c2410c"


@dataclass(frozen=True)
class Bar:
    """A figure and its interval; low, high: None where there is none."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def bars(title: str, panels: Mapping[str, Sequence[Bar]]) -> Figure:
    """A panel below the other for every unit (the key), with its bars from top to bottom."""
    rows = [len(panel) for panel in panels.values()]
    size = (WIDTH_INCHES, 0.8 + sum(0.7 + ROW_INCHES * count for count in rows))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    for axes, (unit, panel) in zip(
        figure.subplots(len(rows), squeeze=False, height_ratios=[2 + n for n in rows])[:, 0],
        panels.items(),
        strict=True,
    ):
        drawn = axes.barh([bar.name for bar in panel], [bar.value for bar in panel], color=COLOUR)
        axes.bar_label(drawn, fmt="%.3g", padding=8)
        for place, bar in enumerate(panel):
            if bar.low is not None and bar.high is not None:
                reach = [[max(bar.value - bar.low, 0.0)], [max(bar.high - bar.value, 0.0)]]
                axes.errorbar([bar.value], [place], xerr=reach, fmt="none", ecolor="black", capsize=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def matrix(title: str, classes: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """counts[class][column] as numbers on shades of each class's share."""
    figure = Figure(figsize=(2 + 1.2 * len(columns), 2 + 0.8 * len(classes)), layout="constrained")
    axes = figure.add_subplot()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Oranges", vmin=0, vmax=1.3, aspect="auto")
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="taken for", ylabel="is", title=title)
    return figure


def plot_of(result: Mapping[str, Any]) -> Figure | None:
    """The picture of a result: of questions, lmms-eval, copies, scenes or few-shot tasks; None without a figure."""
    title = result.get("title") or result["benchmark"]
    if "confusion" in result:
        confusion = result["confusion"]
        return matrix(title, confusion["classes"], confusion["taken_for"], confusion["counts"])
    if "few_shot" in result:
        panels = {
            f"{name}, accuracy": [_bar(f"{count} shots", one, "accuracy") for count, one in task["shots"].items()]
            for name, task in result["few_shot"].items()
        }
        return bars(title, panels)
    if result.get("figures"):
        return bars(title, {name: [_bar("", one)] for name, one in result["figures"].items()})
    if result.get("value") is None:
        return None
    parts = result.get("by_category", {})
    rates = {"wer": "word error rate", "cer": "character error rate"}
    unit = rates.get(result["scoring"], "accuracy") if "scoring" in result else "figure"
    shown = [_bar("all", result), *(_bar(name, one) for name, one in parts.items() if len(parts) > 1)]
    return bars(title, {unit: shown})


def _bar(name: str, found: Mapping[str, Any], key: str = "value") -> Bar:
    return Bar(name, found[key], found.get("low"), found.get("high"))
