"""The rooms of the package and who may use whom, read from the imports of every file."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> what it may import besides itself: other rooms, or modules of the package. A room is a folder or a file.
BASE = {"vita_jax.errors", "vita_jax.__version__"}
FILES = {"vita_jax.storage"}
FUNCTIONS = BASE | {"vita_jax.ops"}
MODULES = FUNCTIONS | {"vita_jax.nn", "vita_jax.conversion"}
MODELS = MODULES | {"vita_jax.models"}
SERVICES = MODELS | FILES | {"vita_jax.data", "vita_jax.parallel", "vita_jax.config", "vita_jax.command_line"}
ALLOWED = {
    "vita_jax.__version__": set(),
    "vita_jax.errors": set(),
    "vita_jax.storage": BASE,
    "vita_jax.config": BASE | FILES,
    "vita_jax.command_line": BASE | {"vita_jax.config"},
    "vita_jax.ops": BASE,
    "vita_jax.nn": FUNCTIONS,
    "vita_jax.conversion": BASE,
    "vita_jax.models": MODULES,
    "vita_jax.parallel": BASE,
    "vita_jax.data": FUNCTIONS | FILES,  # features of a waveform are a plain function
    "vita_jax.inference": SERVICES | {"vita_jax.training"},  # `session` opens a training run
    "vita_jax.training": SERVICES,
    "vita_jax.planning": SERVICES | {"vita_jax.training"},  # compiles its step
    "vita_jax.exchange": SERVICES | {"vita_jax.training"},  # writes and reads its checkpoints
    "vita_jax.evaluation": SERVICES | {"vita_jax.inference", "vita_jax.training"},
    "vita_jax.serving": SERVICES | {"vita_jax.inference"},
    "data_pipelines": FUNCTIONS | FILES | {"vita_jax.data", "vita_jax.command_line"},
}
# They may import every room.
COMMANDS = {
    "data_pipelines.show",
    "data_pipelines.rows",
    "data_pipelines.codes",
    "data_pipelines.instruct",
    "data_pipelines.scienceqa",
    "train",
    "evaluate",
    "judge",
    "chat",
    "serve",
    "duplex",
    "convert",
    "plan",
    "latency",
    "enlarge_vocabulary",
}

# Functions of arrays and configs: they know no files, flags, logging, tokenizers.
PURE = ("vita_jax.ops", "vita_jax.nn", "vita_jax.models")
NOT_IN_PURE = {"absl", "logging", "argparse", "grain", "orbax", "sentencepiece", "tokenizers", "PIL", "av", "pathlib"}
NOT_BELOW_COMMANDS = {"absl.app", "absl.flags", "absl.logging", "logging", "argparse"}
# Libraries that are run by what they log or by flags of theirs: Beam is kept from warning of parts that are not needed,
# Orbax from logging what it raises, Grain reads a flag before it starts workers.
FOR_LIBRARIES = {
    ("data_pipelines/parts.py", "logging"),
    ("vita_jax/training/checkpoint.py", "logging"),
    ("vita_jax/data/lanes.py", "absl.flags"),
}
ENTRY_POINTS = {"data_pipelines/build.py", "data_pipelines/quickstart/build.py", "vita_jax/command_line.py"}

# Places that exist on one machine only.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|Users|root|mnt)/\w+|\.\./" + "shared")
TEXT = {".py", ".sh", ".md", ".toml", ".txt", ".svg", ".yaml", ".yml", ".json", ""}


def source_files() -> list[Path]:
    return sorted(p for top in ("vita_jax", "data_pipelines") for p in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    """A file by its place, such as `vita_jax/ops/rope.py`."""
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, also inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def nearest_room(module: str) -> str | None:
    """The innermost room of ALLOWED that a dotted name is in."""
    return max((room for room in ALLOWED if within(module, room)), key=len, default=None)


def room_of(path: Path) -> str | None:
    """The room that a file is in; None for commands and the package's own `__init__`."""
    module = name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if module == "vita_jax" or module.removeprefix("vita_jax.") in COMMANDS:
        return None
    room = nearest_room(module)
    if room is None:
        pytest.fail(f"{name_of(path)} is in no room: add it to ALLOWED or COMMANDS")
    return room


def test_rooms_use_only_what_is_below_them() -> None:
    wrong = []
    for path in source_files():
        room = room_of(path)
        for line, module in imports_of(path):
            if module.split(".")[0] not in ("vita_jax", "data_pipelines") or room is None:
                continue
            if nearest_room(module) not in ALLOWED[room] | {room}:
                wrong.append(f"{name_of(path)}:{line}: {room} must not import {module}")
    assert not wrong, "\n".join(wrong)


def test_models_know_no_files_flags_or_logging() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in source_files()
        if room_of(path) in PURE
        for line, module in imports_of(path)
        if module.split(".")[0] in NOT_IN_PURE
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_below_the_commands_has_flags_or_logging() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in source_files()
        if room_of(path) is not None and name_of(path) not in ENTRY_POINTS
        for line, module in imports_of(path)
        if any(within(module, name) for name in NOT_BELOW_COMMANDS) and (name_of(path), module) not in FOR_LIBRARIES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_mentions_places_of_one_machine() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix not in TEXT or not path.is_file() or name.startswith("tests/golden/"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)
