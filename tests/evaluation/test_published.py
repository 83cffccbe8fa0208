"""Published figures, and a model's own among them."""

from __future__ import annotations

import pytest
from PIL import Image

from vita_jax.errors import UserError
from vita_jax.evaluation.library import LMMS_SETS, figure_of, find_set
from vita_jax.evaluation.published import Own, format_comparison, ranked, table_of, tables, write_comparison
from vita_jax.evaluation.sets import SETS


def test_every_row_has_only_columns_of_its_table():
    for table in tables():
        for row in table["rows"]:
            assert set(row) - {"model", "llm"} <= set(table["columns"]) and row["model"], row
        assert all(any(column in row for row in table["rows"]) for column in table["columns"])
    columns = [chosen.column for chosen in (*SETS.values(), *LMMS_SETS.values()) if chosen.column is not None]
    assert len(columns) == len(set(columns))
    for column in columns:
        table_of(column)
    with pytest.raises(UserError, match="no published figures of 'mmeee'"):
        table_of("mmeee")


def test_the_own_row_stands_where_it_belongs(tmp_path):
    """Of AISHELL-1 papers printed 2.8 (Freeze-Omni) and 2.2 (VITA-1.5); lower is better."""
    own = Own("my run", 2.5, 2.31, 2.69, "Only 10 questions were asked.")
    assert [(row[0], row[2]) for row in ranked("aishell1_cer", own)] == [
        ("VITA-1.5", 2.2),
        ("my run", 2.5),
        ("Freeze-Omni", 2.8),
    ]
    told = format_comparison("aishell1_cer", own).splitlines()
    assert told[0] == "# AISHELL-1, CER" and told[2].startswith("Lower is better.")
    assert told[7] == "| **my run** |  | **2.5** | 2.3 .. 2.7 |" and told[-1] == "Only 10 questions were asked."
    table, picture = write_comparison("aishell1_cer", own, tmp_path / "new" / "final.aishell1")
    assert table.read_text().splitlines() == told
    assert Image.open(picture).size[0] == 960
    # Higher is better, without an interval.
    assert ranked("mme", Own("m", 2500.0))[0][0] == "m"


def test_a_figure_is_made_of_the_metrics_that_papers_add_up():
    mme = {"mme": {"alias": "mme", "mme_cognition_score,none": 300.0, "mme_perception_score,none": 1500.5}}
    assert figure_of(LMMS_SETS["mme"], mme) == 1800.5
    hallusion = {"hallusion_bench_image": {"aAcc,none": 60.0, "qAcc,none": 30.0, "fAcc,none": 33.0}}
    assert figure_of(LMMS_SETS["hallusionbench"], hallusion) == 41.0
    assert figure_of(LMMS_SETS["mmstar"], {"mmstar": {"average,none": 0.591, "math,none": 0.4}}) == pytest.approx(59.1)
    # A group without a figure of its own: the mean over its tasks; with one, that.
    group = {
        "mvbench": {"alias": "mvbench"},
        "a": {"mvbench_accuracy,none": 50.0},
        "b": {"mvbench_accuracy,none": 60.0},
    }
    assert figure_of(LMMS_SETS["mvbench"], group) == 55.0
    mmlu = {"mmlu": {"acc,none": 0.6, "acc_stderr,none": 0.1}, "mmlu_stem": {"acc,none": 0.2}}
    assert figure_of(LMMS_SETS["mmlu"], mmlu) == 60.0
    assert figure_of(LMMS_SETS["mme"], {"mme": {"mme_cognition_score,none": "N/A"}}) is None


def test_names_are_found_or_the_nearest_is_named():
    assert find_set("quickstart") is None and find_set("aishell1") is None
    assert find_set("mme").task == "mme" and find_set("lmms:my_task").task == "my_task"
    with pytest.raises(UserError, match="unknown benchmark 'mmstr'; the nearest is 'mmstar'"):
        find_set("mmstr")
