"""Figures that papers published, and a model's own beside them, as a Markdown table and as a picture.

`published.json` has them: {"tables": [{"name", "title", "source", "better": "higher" or "lower", "columns": {key:
title}, "rows": [{"model", "llm", key: figure}]}]}, in per cent unless a title says otherwise.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vita_jax.errors import UserError
from vita_jax.storage import write_whole

FILE = Path(__file__).with_name("published.json")
WIDTH_INCHES, ROW_INCHES, DPI = 8.0, 0.3, 120
OWN_COLOUR, OTHER_COLOUR = "#c2410c", "#94a3b8"


@dataclass(frozen=True)
class Own:
    """A model's own figure, in the units of its column.

    Attributes:
      model: whose.
      low, high: of its interval; None where there is none.
      note: what has to be known to compare it, such as that only a part was asked; "" for nothing.
    """

    model: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@functools.cache
def tables() -> tuple[Mapping[str, Any], ...]:
    """The tables, as the top of this file describes them."""
    return tuple(json.loads(FILE.read_text(encoding="utf-8"))["tables"])


def columns_of(name: str) -> Mapping[str, str]:
    """Titles of the columns of a table, by its name."""
    return next(table["columns"] for table in tables() if table["name"] == name)


def table_of(column: str) -> Mapping[str, Any]:
    """The table that a column is in. Raises UserError if there is none."""
    for table in tables():
        if column in table["columns"]:
            return table
    known = ", ".join(key for table in tables() for key in table["columns"])
    raise UserError(f"no published figures of {column!r}; there are those of {known}")


def ranked(column: str, own: Own) -> list[tuple[str, str, float, bool]]:
    """(model, its language model, figure, whether it is `own`), the best first; among equals published ones first."""
    table = table_of(column)
    rows = [(row["model"], row.get("llm", ""), row[column], False) for row in table["rows"] if column in row]
    rows.append((own.model, "", own.value, True))
    return sorted(rows, key=lambda row: row[2], reverse=table["better"] == "higher")


def format_comparison(column: str, own: Own) -> str:
    """A Markdown table of everybody who has that figure; the model's own row is bold."""
    table = table_of(column)
    lines = [
        f"# {table['columns'][column]}",
        "",
        f"{table['better'].capitalize()} is better. The other rows are from {table['source']}.",
        "",
        "| model | language model | figure | 95 % interval |",
        "| --- | --- | ---: | ---: |",
    ]
    interval = "" if own.low is None else f"{own.low:.1f} .. {own.high:.1f}"
    for model, llm, figure, is_own in ranked(column, own):
        cells = (f"**{model}**", llm, f"**{figure:.1f}**", interval) if is_own else (model, llm, f"{figure:.1f}", "")
        lines.append(f"| {' | '.join(cells)} |")
    if own.note:
        lines += ["", own.note]
    return "\n".join(lines) + "\n"


def draw_comparison(figures: Mapping[str, Own]) -> Figure:
    """The same as bars, the best on top, one panel below the other for every column."""
    columns = {column: ranked(column, own)[::-1] for column, own in figures.items()}
    heights = [1.2 + ROW_INCHES * len(rows) for rows in columns.values()]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (column, rows) in zip(panels, columns.items(), strict=True):
        table, own = table_of(column), figures[column]
        bars = axes.barh(
            range(len(rows)), [row[2] for row in rows], color=[OWN_COLOUR if row[3] else OTHER_COLOUR for row in rows]
        )
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        if own.low is not None:
            place = next(number for number, row in enumerate(rows) if row[3])
            reach = [[max(own.value - own.low, 0.0)], [max(own.high - own.value, 0.0)]]
            axes.errorbar([own.value], [place], xerr=reach, fmt="none", ecolor="black", capsize=3)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{table['columns'][column]} ({table['better']} is better)")
    return figure


def write_comparison(figures: Mapping[str, Own], stem: Path) -> list[Path]:
    """Writes STEM.md and STEM.png, and returns them.

    Args:
      figures: a model's own, by the columns that they are compared with.

    Raises:
      UserError: a file cannot be written.
    """
    text = "\n".join(format_comparison(column, own) for column, own in figures.items())
    return [save_text(text, stem), save_figure(draw_comparison(figures), stem)]


def save_text(text: str, stem: Path) -> Path:
    """Writes STEM.md. Raises UserError if that cannot be done."""
    return _save(text, stem.with_name(stem.name + ".md"))


def save_figure(figure: Figure, stem: Path) -> Path:
    """Writes STEM.png. Raises UserError if that cannot be done."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return _save(content.getvalue(), stem.with_name(stem.name + ".png"))


def _save(content: str | bytes, file: Path) -> Path:
    try:
        write_whole(file, content)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; choose another file") from error
    return file
