"""Published figures, and a model's own among them."""

from __future__ import annotations

import pytest
from PIL import Image

from vita_jax.errors import UserError
from vita_jax.evaluation.library import LMMS_SETS, figure_of, find_set
from vita_jax.evaluation.measured import few_shot_figures
from vita_jax.evaluation.plots import plot_of
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
    table, picture = write_comparison({"aishell1_cer": own}, tmp_path / "new" / "final.aishell1")
    assert table.read_text().splitlines() == told
    assert Image.open(picture).size[0] == 960
    # Several figures, a panel each.
    both = {"aishell1_cer": own, "first_audio_ms": Own("my run", 90.0)}
    table, picture = write_comparison(both, tmp_path / "both")
    assert (
        table.read_text().count("| **my run** |") == 2 and "| VITA-Audio (first chunk) |  | 53.0 |" in table.read_text()
    )
    assert Image.open(picture).size[1] > Image.open(tmp_path / "new" / "final.aishell1.png").size[1]
    # Higher is better, without an interval.
    assert ranked("mme", Own("m", 2500.0))[0][0] == "m"


def test_few_shot_figures_go_to_the_columns_of_their_name():
    """Flamingo-9B has 49.3 on OK-VQA with 4 shots; 8 shots and tasks of one's own are not published."""
    found = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    result = {
        "few_shot": {"okvqa": {"shots": {"4": found, "8": found}}, "digits": {"shots": {"0": found}}},
        "limit": None,
    }
    figures = few_shot_figures(result, "mine")
    assert list(figures) == ["okvqa_4_shots"] and (figures["okvqa_4_shots"].low, figures["okvqa_4_shots"].high) == (
        40,
        60,
    )
    assert [row[0] for row in ranked("okvqa_4_shots", figures["okvqa_4_shots"])][:3] == [
        "Flamingo-80B", "mine", "Flamingo-9B"
    ]  # fmt: skip


def test_what_is_not_published_is_drawn_alone():
    """Bars are as long as the figures and their black lines span the intervals; a matrix shows every count."""
    part = {"value": 0.25, "low": 0.0, "high": 0.5, "n": 4}
    result = {"title": "mine", "scoring": "exact", **part, "by_category": {"x": part, "y": {**part, "value": 0.5}}}
    (axes,) = plot_of(result).axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.25, 0.5] and axes.get_xlabel() == "accuracy"
    assert [tuple(line.get_segments()[0][:, 0]) for line in axes.collections] == [(0.0, 0.5)] * 3
    confusion = {
        "classes": ["query", "noise"],
        "taken_for": ["query", "noise", "none"],
        "counts": [[3, 0, 1], [0, 5, 0]],
    }
    (axes,) = plot_of({**result, "confusion": confusion}).axes
    assert [text.get_text() for text in axes.texts] == ["3", "0", "1", "0", "5", "0"]
    panels = plot_of({"benchmark": "copies", "figures": {"stoi": part, "pesq": {**part, "value": 2.0}}}).axes
    assert [(axes.get_xlabel(), axes.patches[0].get_width()) for axes in panels] == [("stoi", 0.25), ("pesq", 2.0)]
    assert plot_of({"benchmark": "vqav2", "value": None}) is None


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
