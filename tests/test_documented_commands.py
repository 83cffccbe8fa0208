"""Every command that the documents and the heads of the programs show is one that the programs take."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vita_jax import config as config_lib
from vita_jax.command_line import ArgumentParser
from vita_jax.config import parse_config_args
from vita_jax.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = sorted(
    path for room in ("vita_jax", "data_pipelines", "experiments") for path in (ROOT / room).rglob("*.py")
)
SHOWN = re.compile(r"^ {4,}(?:\S*=\S* )*(?:\S*/)?(python -m \S.*|launch/\w+\.sh.*)$", re.MULTILINE)


def texts_of(path: Path) -> Iterator[str]:
    """A document; of a program, its docstrings and what it prints for --help."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            yield node.value


def commands_of(path: Path) -> Iterator[list[str]]:
    """The words of every command that stands in a line of its own; those of other programs are left out."""
    for text in texts_of(path):
        for found in SHOWN.finditer(re.sub(r" *\\\n *", " ", text)):
            words = shlex.split(re.sub(r"\s#.*", "", found.group(1)))
            if words[0] != "python" or words[2].split(".")[0] in ("vita_jax", "data_pipelines", "experiments"):
                yield [word for word in words if word != "..."]


def check_config(usage: str, argv: list[str]) -> int:
    """A configuration of that file with these fields; other options are those that the usage names."""
    parsed = parse_config_args(argv)
    for option in parsed.rest:
        if option.partition("=")[0] not in usage:
            raise UserError(f"{option} is not in the usage")
    if parsed.file is None:
        raise UserError("--config=FILE is missing")
    if parsed.file != "FILE":
        config_lib.config_from_module(config_lib.load_module(ROOT / parsed.file), parsed.overrides)
    return 0


def check_arguments(command: object, parser: ArgumentParser, argv: list[str]) -> int:
    """Stands for the command."""
    parser.parse_args(argv)
    return 0


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises what the program would raise for the words themselves; nothing is run."""
    if words[0] != "python":
        usage = subprocess.check_output(["bash", words[0], "--help"], cwd=ROOT, text=True)
        for option in words[1:]:
            name = option.partition("=")[0]
            if name.startswith("--config."):
                assert "--config." in usage, option
            elif name.startswith("--"):
                assert name in usage, option
        return
    package = importlib.util.find_spec(words[2]).submodule_search_locations is not None
    module = importlib.import_module(f"{words[2]}.__main__" if package else words[2])
    if hasattr(module, "run_with_config"):
        monkeypatch.setattr(module, "run_with_config", lambda command, usage, argv: check_config(usage, argv))
    else:
        monkeypatch.setattr(module, "run_command", check_arguments)
    assert module.main(words[3:]) == 0


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS + PROGRAMS if any(commands_of(path))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_commands_are_taken(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(path):
        if "--help" in words:
            continue
        try:
            check(words, monkeypatch)
        except (UserError, AssertionError) as error:
            pytest.fail(f"{path.relative_to(ROOT)}: {shlex.join(words)}: {error}")


def test_commands_are_found():
    """None is overlooked because of how it is written."""
    found = list(commands_of(ROOT / "README.md"))
    assert len(found) >= 25 and ["launch/test.sh"] in found
    assert ["python", "-m", "vita_jax.chat", "--image", "FILE", "--duplex"] in found
    long = next(words for words in found if words[2:3] == ["vita_jax.duplex"])
    assert long[-2:] == ["--checkpoint", "experiments/quickstart/weights"]


def test_a_command_that_is_not_taken_is_told(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--imagine"):
        check(["python", "-m", "vita_jax.chat", "--imagine", "x.png"], monkeypatch)
    with pytest.raises(UserError, match="stepps"):
        words = ["--config=experiments/vita_1_5/stage_1_1.py", "--config.stages.vision_alignment.stepps=3"]
        check(["python", "-m", "vita_jax.train", *words], monkeypatch)
    with pytest.raises(UserError, match="--fast"):
        check(["python", "-m", "vita_jax.plan", "--config=experiments/quickstart.py", "--fast=1"], monkeypatch)
    with pytest.raises(AssertionError, match="--slow"):
        check(["launch/test.sh", "--slow"], monkeypatch)
