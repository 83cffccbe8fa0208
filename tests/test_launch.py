"""The shell commands, as far as they answer without setting anything up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"))


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env or None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_valid_shell(script: str) -> None:
    assert run("bash", "-n", script).stderr == ""


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("launch/")])
def test_help_says_how_to_call_it(script: str) -> None:
    shown = run("bash", script, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: {script}")


@pytest.fixture
def empty_checkout(tmp_path: Path) -> Path:
    """A folder with only the set-up script, so that it has no environment."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_bytes((ROOT / "launch" / "setup.sh").read_bytes())
    return tmp_path / "launch" / "setup.sh"


def test_a_machine_without_python_gets_a_clear_error(empty_checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("dirname", "bash"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    refused = run("/bin/bash", str(empty_checkout), PATH=str(tools))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: no Python >= 3.11 found on PATH")


def test_an_unusable_python_is_named(empty_checkout: Path) -> None:
    refused = run("bash", str(empty_checkout), PATH="/usr/bin:/bin", PYTHON="/nowhere/python")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "PYTHON=/nowhere/python does not run" in refused.stderr


def test_an_unknown_option_of_setup_is_an_error(empty_checkout: Path) -> None:
    refused = run("bash", str(empty_checkout), "--dev", PATH="/usr/bin:/bin")
    assert refused.returncode == 1
    assert "unknown option --dev" in refused.stderr


def test_talking_without_kept_weights_says_how_to_get_some(tmp_path: Path) -> None:
    script = tmp_path / "launch" / "quickstart.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "launch" / "quickstart.sh").read_bytes())
    refused = run("bash", str(script), "--talk", "--text", "a")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("error: there are no kept weights in experiments/quickstart/weights; train")


def test_talk_hands_its_options_to_chat(tmp_path: Path) -> None:
    script = tmp_path / "launch" / "quickstart.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "launch" / "quickstart.sh").read_bytes())
    (tmp_path / "launch" / "setup.sh").write_text("exit 0\n")
    (tmp_path / "experiments" / "quickstart" / "weights").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    talked = run("bash", str(script), "--talk", "--text", "How many?", "--speak", "a.wav")
    weights = tmp_path / "experiments" / "quickstart" / "weights"
    assert talked.stdout == f"-m|vita_jax.chat|--checkpoint|{weights}|--text|How many?|--speak|a.wav|"
