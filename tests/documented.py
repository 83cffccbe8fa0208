"""The commands and Python snippets that documents, docstrings and usages show, and the marks beside them.

A mark is a comment `needs WHAT` (or another one of the table in CONTRIBUTING.md) behind a command, in brackets behind a
command within a sentence, or on a line of its own at the head of a block, whose commands it is then for.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("vita_jax", "data_pipelines", "experiments")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LAUNCHERS = sorted((*ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm.sbatch"))
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:(?:\S*/)?python3? -|bash launch/|launch/\w|sbatch |gcloud |pip install )")
INLINE = re.compile(r"`((?:python -m |bash launch/|launch/\w+\.sh|sbatch )[^`]*[^.`])`(?: \(([^)]*)\))?")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command of a document.

    Attributes:
      place: file and line.
      words: without assignments in front, with `python`, the path of a launcher or the program's name as the first one.
      comment: what stands behind it, and at the head of its block.
      inline: within a sentence, where it may be no more than a name.
    """

    place: str
    words: tuple[str, ...]
    comment: str = ""
    inline: bool = False

    @property
    def module(self) -> str | None:
        """What `python -m` runs; None for other commands."""
        return self.words[2] if self.words[0] == "python" and self.words[1] == "-m" else None


@dataclasses.dataclass(frozen=True)
class Block:
    """Lines of code that stand together: (number, text), dedented, continued lines as one."""

    path: Path
    lines: tuple[tuple[int, str], ...]

    def place(self, number: int) -> str:
        """File and line."""
        return f"{self.path.relative_to(ROOT)}:{number}"


def marks() -> dict[str, str]:
    """The mark in English -> the same in Chinese, from CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| mark |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines()[2:]]
    return {row[0]: row[1] for row in rows if row}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Number of the first line and text: a document; of a program its docstrings and what it prints for --help."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
                yield node.lineno, node.value
    elif path.suffix == ".md":
        yield 1, text
    elif "\nexamples:\n" in text:  # the usage of a launcher, up to the end of its here-document
        before, examples = text.split("\nexamples:\n", 1)
        yield before.count("\n") + 3, textwrap.indent(examples.split("\nTEXT\n")[0], "  ")


def blocks_of(path: Path) -> Iterator[Block]:
    """Lines that begin with four spaces or more, up to an empty or a less indented one."""
    for first, text in texts_of(path):
        lines: list[tuple[int, str]] = []
        for number, line in enumerate([*text.split("\n"), ""], first):
            if lines and lines[-1][1].endswith("\\"):
                lines[-1] = (lines[-1][0], lines[-1][1].rstrip("\\ ") + " " + line.strip())
            elif re.match(r" {4,}\S", line):
                lines.append((number, line))
            elif lines:
                indent = min(len(line) - len(line.lstrip()) for _, line in lines)
                yield Block(path, tuple((number, line[indent:]) for number, line in lines))
                lines = []


def shown_command(place: str, line: str, comment: str) -> Shown:
    """Parses one line."""
    command, _, behind = re.sub(r"\s#\s?", "\0", line, count=1).partition("\0")
    words = [word for word in shlex.split(command) if word != "..."]
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "bash":
        words.pop(0)
    if words[0] == "sbatch":
        words = words[words.index("launch/slurm.sbatch") :]
    if words[0].endswith("python"):
        words[0] = "python"
    return Shown(place, tuple(words), f"{comment} {behind}".strip())


def commands_of(path: Path) -> Iterator[Shown]:
    """Commands in lines of their own; of documents also those within sentences."""
    for block in blocks_of(path):
        head = ""
        for number, line in block.lines:
            if line.startswith("# "):
                head = line[2:]
            elif COMMAND.match(line):
                yield shown_command(block.place(number), line, head)
    if path.suffix == ".md":
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            for command, behind in INLINE.findall(line):
                found = shown_command(f"{path.relative_to(ROOT)}:{number}", command, behind)
                if len(found.words) > 1:  # else it is the name of a script
                    yield dataclasses.replace(found, inline=True)


def snippets_of(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every piece of Python in a document: lines without commands that call or import."""
    for block in blocks_of(path):
        lines = [(number, line) for number, line in block.lines if not COMMAND.match(line)]
        text = "\n".join(line for _, line in lines)
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        if any(isinstance(node, ast.Call | ast.Import | ast.ImportFrom) for node in ast.walk(tree)):
            yield block.place(lines[0][0]), text
