"""The study of new text and the voice: its task, and one short arm with the kept weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.studies.text_tuning import __main__ as study


def test_the_task_is_held_out_by_its_digits():
    training, held_out = (study.new_task(300, flag, np.random.default_rng(1)) for flag in (False, True))
    for asked, divides in ((training, False), (held_out, True)):
        for question, answer in asked:
            digits = question.replace("：", ": ").split(": ")[1]
            assert digits[::-1] == answer and (sum(map(int, digits)) % 7 == 0) == divides
    assert {question for question, _ in training}.isdisjoint(question for question, _ in held_out)


@pytest.mark.slow
def test_adapters_leave_the_voice_as_it_was(tmp_path, capsys):
    output = tmp_path / "results"
    arguments = ["--arms", "adapters", "--steps", "2", "--questions", "8", "--output", str(output)]
    assert study.main(arguments) == 0
    figures = json.loads(output.with_suffix(".json").read_text())["figures"]
    assert list(figures) == ["before", "adapters"] and all(len(found) == 6 for found in figures.values())
    assert figures["before"]["new task"] < 0.2 and figures["before"]["typed"] > 0.75
    assert figures["before"]["voice_answers"] > 0.4 and figures["before"]["misread"] < 0.5
    assert output.with_suffix(".png").stat().st_size > 5000
    assert "| adapters |" in output.with_suffix(".md").read_text() and "answers read back" in capsys.readouterr().out


def test_an_unknown_arm_is_one_line(capsys):
    assert study.main(["--arms", "everything"]) == 2
    assert "--arms 'everything' is unknown" in capsys.readouterr().err
