"""Plans of packed rows: what the packer does with sizes alone, and what the command says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data_pipelines.rows import Fill, Size, fill_of, least_budgets, main, measure, report
from tests.data.batches import batches_of
from tests.data.media import talk, write_json
from tests.training.records import prepare_records, records_experiment
from vita_jax.data.examples import Limits
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.training.experiment import tokenizer_folder
from vita_jax.training.loop import record_batches

OWN_DATA = "--config=experiments/own_data.py"


def test_sizes_are_packed_on_all_axes():
    sizes = [Size(5, 1, 0)] * 4
    assert fill_of(sizes, Limits(10, 2), bins=1) == Fill(2, 4, 1.0, 1.0, 0.0)
    assert fill_of(sizes, Limits(10, 1), bins=1) == Fill(4, 4, 0.5, 1.0, 0.0)
    heard = [Size(2, 0, 1)] * 4
    assert fill_of(heard, Limits(8, 0, 2), bins=1) == Fill(2, 4, 0.5, 0.0, 1.0)
    assert fill_of([*sizes, Size(11, 0, 0), Size(1, 3, 0)], Limits(10, 2), bins=1).examples == 4
    assert fill_of([Size(11, 0, 0)], Limits(10, 2), bins=1) == Fill(0, 0, 0.0, 0.0, 0.0)


def test_the_least_budgets_fill_the_target():
    rng = np.random.default_rng(0)
    sizes = [Size(int(rng.integers(4, 20)), int(rng.integers(0, 4)), 0) for _ in range(400)]
    limits, found = least_budgets(sizes, Limits(64, 3), 0.9, bins=8)
    assert found.positions >= 0.9 and found == fill_of(sizes, limits, bins=8)
    below = Limits(64, limits.row_tiles - 1)
    assert fill_of(sizes, below, bins=8).positions < 0.9
    assert least_budgets([Size(40, 0, 0)] * 10, Limits(64, 0), 0.95, bins=8) is None


def test_the_report_says_what_to_change():
    said = "\n".join(report("stage", [Size(30, 4, 0)] * 20, Counter({"too long": 2}), Limits(60, 4), 8, 0.95))
    assert "cannot be used: 2 (too long)" in said
    assert "rows of 60 positions, 4 tiles: 50.0% of the positions used" in said
    assert "the least that fills 95%: 60 positions, 8 tiles: 100.0% of the positions" in said
    said = "\n".join(report("stage", [Size(40, 0, 0)] * 20, Counter(), Limits(60, 0), 8, 0.95))
    assert "no tiles and sounds fill 95% of 60 positions; raise row_length" in said
    said = "\n".join(report("stage", [Size(70, 0, 0)] * 3, Counter(), Limits(60, 0), 8, 0.95))
    assert "3 records need more than a row has" in said


def test_what_is_measured_is_what_training_packs(tmp_path):
    config = records_experiment(tmp_path / "run")
    prepare_records(config)
    tokenizer, stage = load_tokenizer(tokenizer_folder(config)), config.stage("joint")
    sizes, bad = measure(config, stage, tokenizer, 1000)
    assert len(sizes) == 24 + 12 and not bad and {size.tiles for size in sizes} == {0, 1}
    batches = record_batches(config, stage, tokenizer=tokenizer)
    used = np.mean([np.mean(batch["segment_ids"] > 0) for batch in batches_of(batches, 40)])
    batches.close()
    limits = Limits(stage.row_length, stage.row_tiles)
    assert fill_of(sizes * 10, limits, bins=8).positions == pytest.approx(used, abs=0.04)
    with pytest.raises(UserError, match="trains by 'cell_naming', not on packed rows"):
        measure(config, config.stage("naming"), tokenizer, 10)


def test_the_command_measures_the_records_of_an_experiment(tmp_path, capsys):
    records = [{"conversations": talk(f"How many, {number}?", "None.")} for number in range(8)]
    fields = {"json": write_json(tmp_path / "a.json", records), "root": tmp_path}
    line = [OWN_DATA, "--config.size=smoke", f"--config.run_dir={tmp_path / 'run'}", "--stage=own_data", "--records=6"]
    assert main([*line, *(f"--config.data.{name}={value}" for name, value in fields.items())]) == 0
    assert ": 6 records measured\n  positions of a record: mean " in capsys.readouterr().out


def test_wrong_arguments_are_named(capsys):
    for argument, message in (
        ("--records=none", "--records=none must be"),
        ("--target=2", "--target=2 must be"),
        ("--size=3", "unknown or incomplete argument"),
    ):
        assert main(["--config=experiments/quickstart.py", argument]) == 2
        assert message in capsys.readouterr().err
    assert main(["--help"]) == 0 and "examples:" in capsys.readouterr().out


def test_a_stage_with_more_than_it_needs_is_told_what_would_do():
    limits = Limits(600, 100)  # many times what the largest record needs
    said = "\n".join(report("stage", [Size(30, 4, 0)] * 200, Counter(), limits, 8, 0.95))
    assert "rows of 600 positions, 100 tiles: 100.0% of the positions used" in said
    assert "the least that fills 95%: 600 positions, 80 tiles" in said
