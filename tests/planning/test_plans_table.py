"""The document of plans: which lines are planned, which are kept."""

from __future__ import annotations

import pytest

from experiments import plans
from vita_jax.config import load_config_file
from vita_jax.errors import UserError


@pytest.fixture
def planned(monkeypatch) -> list[tuple[str, str]]:
    """What `plan_line` is asked for; its lines count."""
    asked = []

    def line(entry: plans.Planned, slice: str) -> str:
        asked.append((entry.path.stem, slice))
        overrides = {"scale": entry.options[0].partition("=")[2]} if entry.options else {}
        title = load_config_file(entry.path, overrides).stages[0].title
        return f"| {title} | {slice} | number {len(asked)} |"

    monkeypatch.setattr(plans, "plan_line", line)
    return asked


def test_missing_lines_are_planned_and_the_others_kept(planned, tmp_path, capsys):
    output = f"--output={tmp_path / 'plans.md'}"
    assert plans.main(["stage_1_1", "v1_5_stage_2", output]) == 0
    # Three slices of VITA-1.5's stage; three of LLaVA's for each of two scales.
    assert len(planned) == len(set(planned)) + 3 == 9
    first = plans.read_lines(tmp_path / "plans.md")
    assert plans.main(["stage_1_1", "stage_1_2", "v1_5_stage_2", "--missing", output]) == 0
    assert {stem for stem, _ in planned[9:]} == {"stage_1_2"} and len(planned) == 12
    lines = plans.read_lines(tmp_path / "plans.md")
    assert len(lines) == 12 and lines.items() >= first.items()
    assert plans.main(["stage_1_1", output]) == 0
    lines = plans.read_lines(tmp_path / "plans.md")
    assert "number 13" in "".join(lines.values()) and "number 1 |" not in "".join(lines.values())
    assert capsys.readouterr().out.count("| VITA-1.5 ") == 3 + 3 + 3


def test_a_stage_that_cannot_be_planned_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def line(entry: plans.Planned, slice: str) -> str:
        if slice == "v5e:8x8":
            raise UserError(f"{entry.path.name} on {slice}: no room")
        return f"| 1.1 | {slice} | a number |"

    monkeypatch.setattr(plans, "plan_line", line)
    output = tmp_path / "plans.md"
    assert plans.main(["stage_1_1", f"--output={output}"]) == 1
    assert {key.rpartition(" | ")[2] for key in plans.read_lines(output)} == {"v6e:4x8", "v5p:4x4x2"}
    assert capsys.readouterr().err.splitlines() == ["error: stage_1_1.py on v5e:8x8: no room"]


def test_what_a_failed_plan_said_last_is_the_error(monkeypatch):
    said = plans.subprocess.CompletedProcess([], 2, stdout="", stderr="some\nerror: no such slice\nlog of a library\n")
    monkeypatch.setattr(plans.subprocess, "run", lambda *_, **__: said)
    entry = next(iter(plans.stage_files()))
    with pytest.raises(UserError, match="stage_1_1.py on v5e:8x8: status 2: no such slice"):
        plans.plan_line(entry, "v5e:8x8")


def test_an_unknown_stage_is_named(planned, tmp_path, capsys):
    assert plans.main(["stage_1_1", "stage_9", f"--output={tmp_path / 'plans.md'}"]) == 2
    assert "error: there is no stage 'stage_9'; stages: stage_1_1, " in capsys.readouterr().err and not planned
