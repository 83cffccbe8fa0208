"""Scores of a judge: what is parsed, and how it is summed up."""

from __future__ import annotations

import math

import pytest

from vita_jax.evaluation.llava_bench import OVERALL, UNPARSED, CategoryScore, judge_message, parse_scores, summarise


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 7\nGood.", (8.0, 7.0)),
        ("9,6", (9.0, 6.0)),
        ("8.5 9", (8.5, 9.0)),
        ("9, 6", UNPARSED),
        ("8  7", UNPARSED),
        ("a b", UNPARSED),
        ("", UNPARSED),
        ("\n8 8", UNPARSED),
    ],
)
def test_two_numbers_in_the_first_line(review, scores):
    assert parse_scores(review) == scores


def test_figures_are_ratios_of_means_and_count_what_failed():
    scores = [("conv", (8.0, 4.0)), ("conv", (10.0, 5.0)), ("detail", (9.0, 9.0)), ("detail", UNPARSED)]
    assert summarise(scores) == {
        OVERALL: CategoryScore(65.4, 65.0, 42.5),
        "conv": CategoryScore(50.0, 90.0, 45.0),
        "detail": CategoryScore(100.0, 40.0, 40.0),
    }
    assert math.isnan(summarise([("conv", (0.0, 1.0))])["conv"].relative)


def test_the_judge_reads_the_reference_first():
    message = judge_message("a boat", "What is it?", "A boat.", "A car.", "Grade.")
    assert message.startswith("[Context]\na boat\n\n[Question]\nWhat is it?\n\n[Assistant 1]\nA boat.\n\n[End of Assi")
    assert message.endswith("[Assistant 2]\nA car.\n\n[End of Assistant 2]\n\n[System]\nGrade.\n\n")
