"""Which commands the tests really run, read from their source: calls of `main([...])`, and processes with `-m`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.documented import ROOMS, ROOT

# They show commands, and run none.
NOT_TESTS = ("test_documented_commands.py", "documented.py", "command_runs.py")


@dataclasses.dataclass(frozen=True)
class Run:
    """A call that has to succeed.

    Attributes:
      module: of the command.
      words: every string that can be among its arguments.
    """

    module: str
    words: frozenset[str]


def strings(tree: ast.AST) -> set[str]:
    """All literals, those in f-strings included."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def names(tree: ast.AST) -> set[str]:
    """All names that are used."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@functools.cache
def literals(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Both; the same definition is asked for by many calls."""
    return strings(tree), names(tree)


def imported(tree: ast.Module) -> dict[str, str]:
    """Name in this file -> dotted name of what was imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            found.update((alias.asname, alias.name) for alias in node.names if alias.asname)
    return found


def definitions(tree: ast.Module) -> dict[str, list[ast.AST]]:
    """Name -> everything in the file that gives it a value: assignments, loops, functions, parametrised arguments."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.For | ast.comprehension):
            targets = [node.target]
        elif isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and mark.args:
                    for name in strings(mark.args[0]):
                        for part in name.split(","):
                            found.setdefault(part.strip(), []).append(mark)
        for target in targets:
            value = node.iter if isinstance(node, ast.For | ast.comprehension) else node.value
            for name in names(target) if value is not None else ():
                found.setdefault(name, []).append(value)
    return found


def words_of(arguments: list[ast.AST], defined: dict[str, list[ast.AST]]) -> frozenset[str]:
    """The strings of the arguments, and of what the names in them stand for in this file."""
    words: set[str] = set()
    seen: set[str] = set()
    waiting = list(arguments)
    while waiting:
        found, used = literals(waiting.pop())
        words |= found
        for name in used - seen:
            seen.add(name)
            waiting += defined.get(name, [])
    return frozenset(words)


def fails(call: ast.Call, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the test wants another status than 0."""
    parent = parents[call]
    if isinstance(parent, ast.Compare) and isinstance(parent.comparators[0], ast.Constant):
        return parent.comparators[0].value != 0
    return any(keyword.arg == "status" for keyword in call.keywords)


def module_of(call: ast.Call, known: dict[str, str]) -> str | None:
    """The command that a call runs in this process or another one."""
    function = call.func
    # A study's `main` checks its arguments and calls `study` with them.
    mains = ("main", "study")
    if isinstance(function, ast.Attribute) and function.attr in mains and isinstance(function.value, ast.Name):
        return known.get(function.value.id, "").removesuffix(".__main__") or None
    if isinstance(function, ast.Name) and known.get(function.id, "").endswith(".main"):
        return known[function.id].removesuffix(".main")
    first = call.args[0] if call.args else None
    if isinstance(function, ast.Name) and function.id == "command" and isinstance(first, ast.Constant):
        return first.value
    if isinstance(first, ast.List) and len(first.elts) > 2:
        flag, module = first.elts[1:3]
        if isinstance(flag, ast.Constant) and flag.value == "-m" and isinstance(module, ast.Constant):
            return module.value
    return None


def runs_of(path: Path) -> Iterator[Run]:
    """Those of one file of tests."""
    text = path.read_text(encoding="utf-8")
    if not re.search(r"main\(|command\(|\"-m\"", text):
        return
    tree = ast.parse(text)
    known, defined = imported(tree), definitions(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and not fails(call, parents):
            module = module_of(call, known)
            words = words_of(call.args, defined)
            if module and module.split(".")[0] in ROOMS and words != {"--help"}:
                yield Run(module, words)


@functools.cache
def runs() -> tuple[Run, ...]:
    """Those of the whole suite."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in NOT_TESTS]
    return tuple(run for path in files for run in runs_of(path))
