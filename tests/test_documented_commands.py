"""Every command that documents, heads of programs and launchers show is one that the programs take. Every one of the
documents is run by a test of the suite, or says beside it why none does.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import tomllib
import typing
from pathlib import Path
from unittest import mock

import pytest

from tests.command_runs import Run, runs
from tests.documented import DOCUMENTS, LAUNCHERS, PROGRAMS, ROOMS, ROOT, Shown, commands_of, marks, snippets_of
from tests.test_launch import DRY_RUNS, SETUPS
from vita_jax import config as config_lib
from vita_jax.command_line import ArgumentParser
from vita_jax.config import parse_config_args
from vita_jax.errors import UserError
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.quantization import QuantizationConfig
from vita_jax.inference.session import Session

# Their first word says what they do.
WITH_ACTIONS = ("vita_jax.convert", "vita_jax.judge", "data_pipelines.build")
DRY = {f"launch/{script}" for script, *_ in DRY_RUNS}


# ---- they are taken -------------------------------------------------------------------------------------------------


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


def check_launcher(script: str, words: list[str]) -> None:
    """Those with a dry run do it; of the others the usage names the options, and pyproject.toml the extras."""
    if script in DRY and "--help" not in words:
        shown = subprocess.run(["bash", script, "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
        assert (shown.returncode, shown.stderr) == (0, ""), shown.stderr
    usage = subprocess.check_output(["bash", script, "--help"], cwd=ROOT, text=True)
    for option in words:
        name = option.partition("=")[0]
        if name.startswith("--config."):
            assert "--config." in usage or "TRAINING ARGUMENT" in usage, option
        elif name.startswith("--") and script not in DRY:
            assert name in usage, option
        elif script == "launch/setup.sh":
            assert name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if any(word.startswith("--config=") for word in words):
        check_config("", [word for word in words if word.startswith("--config")])


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises what the program would raise for the words themselves; nothing is run but dry runs and `python -c`."""
    if words[0].startswith("launch/"):
        check_launcher(words[0], words[1:])
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[0] == "python" and words[2].split(".")[0] in ROOMS:
        module = importlib.import_module(words[2])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{words[2]}.__main__")
        if hasattr(module, "run_with_config"):
            monkeypatch.setattr(module, "run_with_config", lambda command, usage, argv: check_config(usage, argv))
        else:
            monkeypatch.setattr(module, "run_command", check_arguments)
        assert module.main(words[3:]) == 0


@pytest.mark.parametrize(
    "path",
    [path for path in [*DOCUMENTS, *PROGRAMS, *LAUNCHERS] if any(commands_of(path))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_commands_are_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for shown in commands_of(path):
        if "--help" in shown.words:
            continue
        try:
            check(list(shown.words), monkeypatch)
        except (UserError, AssertionError, ValueError) as error:
            if shown.inline and re.search(r"are required|is missing|nothing behind", str(error)):
                continue  # a sentence may name a command by its first words
            pytest.fail(f"{shown.place}: {shlex.join(shown.words)}: {error}")


def test_commands_are_found() -> None:
    """None is overlooked because of how it is written."""
    found = {path.name: [shown.words for shown in commands_of(path)] for path in [*DOCUMENTS, *LAUNCHERS]}
    assert len(found["README.md"]) >= 25 and ("launch/test.sh",) in found["README.md"]
    assert ("python", "-m", "vita_jax.chat", "--image", "FILE", "--duplex") in found["README.md"]
    long = next(words for words in found["README.md"] if words[2:3] == ("vita_jax.duplex",))
    assert long[-2:] == ("--checkpoint", "experiments/quickstart/weights")
    assert ("launch/setup.sh", "tpu") in found["install.md"] and ("pip", "install", "-e", ".") in found["install.md"]
    assert ("launch/slurm.sbatch", "--config=FILE") == found["launching.md"][5][:2]
    assert any(words[:3] == ("python", "-m", "lmms_eval") for words in found["evaluation.md"])
    assert ("python", "-m", "data_pipelines.build", "stats", "DIR", "--page", "stats.html") in found["data_card.md"]
    assert len(found["quickstart.sh"]) == 5 and found["tpu_pod.sh"][0][-1].endswith("gs://BUCKET/vision_understanding")


def test_a_command_that_is_not_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--imagine"):
        check(["python", "-m", "vita_jax.chat", "--imagine", "x.png"], monkeypatch)
    with pytest.raises(UserError, match="stepps"):
        words = ["--config=experiments/vita_1_5/stage_1_1.py", "--config.stages.vision_alignment.stepps=3"]
        check(["python", "-m", "vita_jax.train", *words], monkeypatch)
    with pytest.raises(UserError, match="--fast"):
        check(["python", "-m", "vita_jax.plan", "--config=experiments/quickstart.py", "--fast=1"], monkeypatch)
    with pytest.raises(UserError, match="stepps"):
        words = ["--config=experiments/vita_1_5/stage_1_3.py", "--config.stages.vision_sft.stepps=3"]
        check(["launch/tpu_pod.sh", "start", "--name", "x", "--zone", "z", "--", *words], monkeypatch)
    with pytest.raises(AssertionError, match="--spott"):
        check(["launch/tpu_pod.sh", "delete", "--name", "x", "--zone", "z", "--spott"], monkeypatch)
    for words in (["launch/test.sh", "--slow"], ["launch/setup.sh", "gpus"]):
        with pytest.raises(AssertionError, match=words[1]):
            check(words, monkeypatch)


# ---- they are run ---------------------------------------------------------------------------------------------------


def is_named(option: str, value: str, found: list[Run]) -> bool:
    """Whether a run has the option; to train also with the file of `--config`, to convert with the `--model`."""
    words = {word for run in found for word in run.words}
    if option == "--config" and value != "FILE" and found[0].module == "vita_jax.train":
        files = {word.removeprefix("--config=") for word in words if word.endswith(".py")}
        return any(value == file or value.endswith(f"/{file}") for file in files)
    if option == "--model" and found[0].module == "vita_jax.convert" and value not in words:
        return False
    made = "--" in words and option.removeprefix("--") in words  # f"--{name}"
    return made or any(word == option or word.startswith(f"{option}=") for word in words)


def lacks(shown: Shown, all_runs: tuple[Run, ...]) -> str | None:
    """What no test runs of a command; None for one that some test does run."""
    module, words = shown.module, list(shown.words)
    if words[0] in DRY:
        actions = {key[1] for key in DRY_RUNS if f"launch/{key[0]}" == words[0]}
        acts = any(action in ("start", "image", "flink", "run") for action in actions)
        return f"no dry run of {words[1]}" if acts and len(words) > 1 and words[1] not in actions else None
    if words[0] == "launch/setup.sh":
        return None if tuple(words[1:]) in SETUPS else "no test runs it with these extras"
    if words[:2] == ["python", "-c"] or words[0] == "launch/test.sh":
        return None  # The first by test_the_commands_are_taken, the second runs this.
    found = [run for run in all_runs if run.module == module]
    if module in WITH_ACTIONS and len(words) > 3:
        found = [run for run in found if words[3] in run.words]
    if not found:
        return "no test runs it"
    for word, following in zip(words[3:], [*words[4:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option.startswith("--") and not option.startswith("--config."):
            if not is_named(option, value if equals else following, found):
                return f"no test runs it with {word}"
    return None


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    told, used, kinds = [], set(), marks()
    for path in DOCUMENTS:
        for shown in commands_of(path):
            mark = {english for english, other in kinds.items() if english in shown.comment or other in shown.comment}
            used |= mark
            lacking = lacks(shown, runs())
            if lacking and not mark:
                told.append(f"{shown.place}: {shlex.join(shown.words)}: {lacking}; mark it as CONTRIBUTING.md says")
    used |= {mark for mark in kinds for path in DOCUMENTS for _, text in snippets_of(path) if mark in text}
    assert not told, "\n".join(told)
    assert set(kinds) == used


def test_a_command_that_no_test_runs_is_told() -> None:
    def shown(words: str) -> Shown:
        return Shown("x.md:1", ("python", "-m", *words.split()))

    assert lacks(shown("vita_jax.convert inspect VITA"), runs()) is None
    assert lacks(shown("vita_jax.convert melt VITA"), runs()) == "no test runs it"
    assert lacks(shown("vita_jax.convert import --model gpt"), runs()) == "no test runs it with --model"
    assert lacks(shown("vita_jax.chat --imagine x"), runs()) == "no test runs it with --imagine"
    assert lacks(shown("vita_jax.train --config=experiments/quickstart.py"), runs()) is None
    wanted = "no test runs it with --config=experiments/vita_1_5/stage_1_3.py"
    assert lacks(shown("vita_jax.train --config=experiments/vita_1_5/stage_1_3.py"), runs()) == wanted
    assert lacks(Shown("x.md:1", ("launch/xpk.sh", "fly")), runs()) == "no dry run of fly"
    assert lacks(Shown("x.md:1", ("gcloud", "storage")), runs()) == "no test runs it"


# ---- Python ---------------------------------------------------------------------------------------------------------


def stand_in(of: type, depth: int = 3) -> mock.NonCallableMagicMock:
    """An object with the fields of a class, and its methods with their signatures. What they return stands in, too."""
    made = mock.create_autospec(of, instance=True)
    for field in dataclasses.fields(of) if dataclasses.is_dataclass(of) else ():
        setattr(made, field.name, None)
    for name, method in vars(of).items():
        if depth and not name.startswith("_") and inspect.isfunction(method):
            returned = typing.get_type_hints(method).get("return")
            parts = typing.get_args(returned)
            ours = [kind for kind in parts or (returned,) if getattr(kind, "__module__", "").startswith("vita_jax")]
            if ours and inspect.isclass(ours[0]):
                given = stand_in(ours[0], depth - 1)
                getattr(made, name).return_value = [given] if parts else given
    return made


def opener(of: type, name: str) -> mock.MagicMock:
    """A class whose constructor `name` gives a stand-in."""
    made = mock.create_autospec(of)
    getattr(made, name).return_value = stand_in(of)
    return made


SNIPPETS = dict(found for path in DOCUMENTS for found in snippets_of(path))


@pytest.mark.parametrize("place", SNIPPETS)
def test_python_of_the_documents_runs(place: str) -> None:
    """On what has the interfaces of the package, so that every name and argument is one that there is."""
    program = compile(SNIPPETS[place], place, "exec")
    if not any(mark in SNIPPETS[place] for mark in marks()):
        exec(
            program,
            {
                "Session": opener(Session, "load"),
                "Duplex": opener(Duplex, "of"),
                "QuantizationConfig": QuantizationConfig,
                "DIR": "runs/quickstart",
                "microphone": [[0.0]],
                "block": [0.0],
                "play": print,
            },
        )
