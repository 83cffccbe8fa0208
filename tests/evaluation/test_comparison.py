"""Paired comparisons and the confusion matrix, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from vita_jax.data.templates import get_template
from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks import get_benchmark
from vita_jax.evaluation.benchmarks.benchmark import Group
from vita_jax.evaluation.comparison import changes_again, changes_since, compare_groups
from vita_jax.evaluation.figures import Outcome, group_figures, score
from vita_jax.evaluation.hearing import confusion
from vita_jax.evaluation.items import Item
from vita_jax.evaluation.results import evaluation_path, format_result, save_result


def group(**kinds: str) -> dict:
    """A group whose items of each kind were right ("1") or not ("0"); ids are kind and place."""
    outcomes = [
        Outcome(f"{kind}{i}", kind, "en", mark == "1") for kind, marks in kinds.items() for i, mark in enumerate(marks)
    ]
    return group_figures(Group("typed", "typed questions"), outcomes)


def test_difference_and_interval_by_hand():
    # Kind a: changes (-1, 0, 0, 0), mean -1/4, variance 1/4. Kind b: (0, +1), mean 1/2, variance 1/2.
    change = compare_groups(group(a="1111", b="10"), group(a="0111", b="11"))
    assert change["difference"] == pytest.approx(100 * (-0.25 + 0.5) / 2)
    half = 100 * 1.959964 * math.sqrt(0.25 / 4 + 0.5 / 2) / 2
    assert (change["low"], change["high"]) == pytest.approx((12.5 - half, 12.5 + half))
    assert (change["lost"], change["won"], change["n"]) == (1, 1, 6)
    assert (change["before"], change["after"]) == pytest.approx((0.75, 0.875))
    assert change["floor_reached"] and change["goal_reached"]


def test_only_common_items_are_compared():
    change = compare_groups(group(a="1100"), group(a="11", b="1"))
    assert (change["n"], change["difference"], change["low"], change["high"]) == (2, 0, 0, 0)
    # One pair alone says nothing of its spread.
    alone = compare_groups(group(a="1"), group(a="1"))
    assert alone["high"] == pytest.approx(195.9964)
    with pytest.raises(UserError, match="no question in common"):
        compare_groups(group(a="1"), group(b="1"))


def test_a_point_may_be_lost():
    before, after = group(a="1" * 200), group(a="0" * 2 + "1" * 198)
    change = compare_groups(before, after)
    assert change["difference"] == pytest.approx(-1) and change["floor_reached"] and not change["goal_reached"]
    assert not compare_groups(before, group(a="0" * 3 + "1" * 197))["floor_reached"]


def test_changes_of_a_run(tmp_path):
    def result(marks: str, name: str) -> dict:
        groups = {name: group(a=marks)}
        return {"benchmark": "quickstart", "num_items": 4, "seconds": 1.0, "limit": None, "groups": groups}

    before, after = result("1110", "typed"), result("1100", "typed")
    changes = changes_since(before, after, ("typed", "text"), "vision_sft")
    assert list(changes) == ["typed"] and changes["typed"]["since"] == "vision_sft"
    printed = format_result({**after, "changes": changes})
    assert "typed questions, since vision_sft" in printed and "-25.0" in printed and printed.endswith("lost")
    assert changes_again(tmp_path, after) == {}
    save_result(before, evaluation_path(tmp_path, "vision_sft"))
    save_result({**after, "changes": changes}, evaluation_path(tmp_path, "final"))
    assert changes_again(tmp_path, after) == {"changes": changes}
    assert changes_again(tmp_path, result("1111", "typed"))["changes"]["typed"]["difference"] == pytest.approx(25)


def test_confusion_counts_truth_by_row():
    truths = ["speech", "speech", "noise", "text"]
    assert confusion(truths, ["speech", "noise", "noise", "speech"]) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_character_errors_are_counted_beside_exact_clips():
    outcomes = [
        Outcome("1", "new_voice", "en", True, errors=(0, 4)),
        Outcome("2", "new_voice", "zh", False, errors=(3, 6)),
        Outcome("3", "both_new", "zh", False, errors=(9, 5)),
    ]
    figures = group_figures(Group("recognition_full", "r", 0.3, 0.9, "recogniser"), outcomes)
    assert figures["by_kind"]["new_voice"] == {"accuracy": pytest.approx(0.7), "n": 2, "exact": 1}
    assert figures["by_kind"]["both_new"]["accuracy"] == 0  # more errors than characters
    assert figures["accuracy"] == pytest.approx(0.35) and figures["exact"] == 1
    assert figures["floor_reached"] and not figures["goal_reached"]
    assert figures["outcomes"] == {"new_voice": {"1": True, "2": False}, "both_new": {"3": False}}


def test_accepted_is_what_was_not_refused():
    items = [Item(str(i), "spoken", "count", "en", "", "1", audio="a.wav") for i in range(4)]
    result = score(get_benchmark("speech"), items, ["☞1", "☟no", "1", "☞2"], get_template("qwen2p5_instruct"))
    assert list(result["groups"]) == ["spoken", "accepted"]
    assert result["groups"]["accepted"]["accuracy"] == 0.75 and result["groups"]["spoken"]["refused"] == 0.25
    assert result["groups"]["accepted"]["outcomes"] == {"count": {"0": True, "1": False, "2": True, "3": True}}
    assert len(result["examples"]) == 4
