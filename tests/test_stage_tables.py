"""The documents' tables of full-size stages say what the configurations say."""

from __future__ import annotations

import pytest

from experiments import stage_tables
from experiments.plans import read_lines
from experiments.stage_tables import PLANS, ROOT, scientific, with_tables
from vita_jax.config import load_config_file
from vita_jax.errors import UserError


def test_documents_are_what_the_configurations_and_plans_say(capsys) -> None:
    assert stage_tables.main(["--check"]) == 0, capsys.readouterr().out
    text = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    for folder, count in (("vita_1_5", 8), ("vita_1_0", 4)):
        files = sorted((ROOT / "experiments" / folder).glob("stage_*.py"))
        assert len(files) == count
        for path in files:
            (stage,) = load_config_file(path).stages
            name = f"| `{path.stem}` {stage.title.split(' ', 1)[1]} |"
            (row,) = [line for line in text.splitlines() if line.startswith(name)]
            assert f"| {stage.steps:,} |" in row and f"| {scientific(stage.learning_rate)}" in row


def test_a_table_follows_plans_and_keeps_what_a_person_wrote() -> None:
    text = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    lines = read_lines(PLANS)
    row = next(line for line in text.splitlines() if line.startswith("| `stage_1_3` "))
    by_hand = "| `stage_1_3` vision SFT | the same | questions 94 %, captions 6 % | 2e-5, tower 2e-6 | "
    adam = "AdamW 0.9, 0.999, no decay; 1,290 steps; half a cosine | 128 x 6,656 | 43,000 | "
    # 43,000 steps of 4.9, 2.1 and 4.21 s.
    assert row == f"{by_hand}{adam}v5e:8x8 58.5, v6e:4x8 25.1, v5p:4x4x2 50.3 |"
    fewer = {key: line for key, line in lines.items() if not key.endswith("v6e:4x8")}
    assert f"{by_hand}{adam}v5e:8x8 58.5, v6e:4x8 not planned yet, v5p:4x4x2 50.3 |" in with_tables(text, fewer)
    assert f"{by_hand}{adam}not planned yet |" in with_tables(text, {})
    with pytest.raises(UserError, match=r"no line that begins with `stage_1_3` vision SFT; write what it trains"):
        with_tables(text.replace("`stage_1_3` vision SFT", "`stage_1_4` vision SFT"), lines)
    with pytest.raises(UserError, match="there is no time of a step"):
        with_tables(text, {key: line.replace(" ms |", " |") for key, line in lines.items()})
