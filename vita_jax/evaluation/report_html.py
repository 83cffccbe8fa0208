"""The look of the report and the pieces of HTML that its sections are made of; all text is escaped here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

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
.uneven { align-items: start } .stack { display: grid; gap: 16px }
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
.item audio, .heard audio { width: 100%; height: 32px; display: block; margin: 6px 0 }
.item .heard { padding: 10px 14px 0; overflow-wrap: anywhere } .heard img { width: 100%; border-radius: 4px }
table.counts { width: auto } table.counts td { text-align: center; min-width: 84px }
table.counts td:first-child { min-width: 0 }
footer { margin-top: 48px; color: var(--soft); font-size: 13px }
"""


def escaped(value: object) -> str:
    """The value as HTML shows it."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def image_tag(png: bytes, description: str) -> str:
    """A PNG within the page."""
    return f'<img alt="{escaped(description)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def picture_tag(picture: Image.Image, side: int) -> str:
    """The picture, made smaller if its longer side exceeds `side`."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="png")
    return image_tag(data.getvalue(), "held-out picture")
