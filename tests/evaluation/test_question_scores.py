"""Scores of users' own questions against values worked out by hand."""

from __future__ import annotations

import json

import pytest

from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import Question, read_questions
from vita_jax.evaluation.measured import format_measured
from vita_jax.evaluation.question_scores import check_questions, count_errors, figures, score_answer


def asked(*truths: str, choices: tuple[str, ...] = (), category: str = "question", name: int = 1) -> Question:
    return Question(name, "?", (), truths, choices, category)


@pytest.mark.parametrize(
    ("scoring", "question", "answer", "score"),
    [
        ("exact", asked("Red", "crimson"), " RED. ", 1),
        ("exact", asked("Red", "crimson"), "crimson", 1),
        ("exact", asked("red"), "a red one", 0),
        ("choice", asked("B", choices=("cat", "dog")), "B", 1),
        ("choice", asked("B", choices=("cat", "dog")), "(B) dog", 1),
        ("choice", asked("dog", choices=("cat", "dog")), "The answer is B.", 1),
        ("choice", asked("dog", choices=("cat", "dog")), "Dog.", 1),
        ("choice", asked("A", choices=("cat", "dog")), "C", 0),  # there is no C
        ("choice", asked("A"), "no idea", 0),
        ("choice", asked("D"), "D. because", 1),  # without choices every letter may be one
        ("choice", asked("A", choices=("B", "cat")), "B", 1),  # an option's text comes first
    ],
)
def test_right_or_wrong(scoring, question, answer, score):
    check_questions([question], scoring)
    assert score_answer(question, answer, None, scoring)["score"] == score


def test_errors_are_counted_by_kind():
    """One word replaced and one put in; one character left out."""
    words = {"substitutions": 1, "deletions": 0, "insertions": 1, "units": 3}
    assert count_errors("A cat -- sat down!", "the cat sat", "wer") == words
    characters = {"substitutions": 0, "deletions": 1, "insertions": 0, "units": 4}
    assert count_errors("今 天气。", "今天天气", "cer") == characters
    assert count_errors("", "a b", "wer") == {"substitutions": 0, "deletions": 2, "insertions": 0, "units": 2}
    # A gap between words is a character: "ab c" has four.
    assert count_errors("abc", "ab c", "cer") == {"substitutions": 0, "deletions": 1, "insertions": 0, "units": 4}


def test_an_error_rate_is_of_all_texts_together():
    """2 of 3 words and 0 of 5 are wrong: 2/8, whatever the mean of the rates is; drawn alone, 2/3 and 0."""
    questions = [asked("a b c", category="x"), asked("a b c d e", category="y", name=2)]
    scores = [score_answer(q, text, None, "wer") for q, text in zip(questions, ("a", "a b c d e"), strict=True)]
    found = figures("wer", questions, scores)
    assert (found["value"], found["n"], found["better"]) == (0.25, 2, "lower")
    assert (found["low"], found["high"]) == (0.0, pytest.approx(2 / 3))
    one = {"value": 2 / 3, "low": 2 / 3, "high": 2 / 3, "n": 1}
    assert found["by_category"] == {"x": one, "y": {"value": 0.0, "low": 0.0, "high": 0.0, "n": 1}}
    assert found["errors"] == {"substitutions": 0, "deletions": 2, "insertions": 0, "units": 8}


def test_queries_and_noise_as_a_matrix():
    """Four queries, of which one is taken for noise and one for neither; two noises, both known."""
    truths, states = ("query",) * 4 + ("noise",) * 2, ("audio", "text", None, "noise", "noise", "noise")
    questions = [asked(truth, name=number) for number, truth in enumerate(truths)]
    check_questions(questions, "state")
    found = figures(
        "state", questions, [score_answer(q, "", s, "state") for q, s in zip(questions, states, strict=True)]
    )
    assert found["value"] == pytest.approx(4 / 6)
    matrix = {"classes": ["query", "noise"], "taken_for": ["query", "noise", "none"], "counts": [[2, 1, 1], [0, 2, 0]]}
    assert found["confusion"] == matrix
    assert found["recall"] == {"query": 0.5, "noise": 1.0} and found["precision"] == {"query": 1.0, "noise": 2 / 3}
    told = format_measured({**found, "title": "sounds", "seconds": 1.0}).splitlines()
    assert told[-4].split() == ["is", "\\", "taken", "for", "query", "noise", "none", "recall", "precision"]
    assert told[-2].split() == ["query", "2", "1", "1", "50.0", "%", "100.0", "%"]


@pytest.mark.parametrize(
    ("scoring", "question", "message"),
    [
        ("exact", asked(), "question 1 has no `answer`, which --scoring exact compares with"),
        ("choice", asked("bird", choices=("cat", "dog")), "neither a letter of a choice nor the text of one"),
        ("wer", asked("a", "b"), "must be one text"),
        ("cer", asked("..."), "with a letter or digit in it"),
        ("state", asked("speech"), "must be one of query, noise"),
        ("state", asked("query", "noise"), "must be one of query, noise"),
    ],
)
def test_what_cannot_be_scored_is_named(scoring, question, message):
    with pytest.raises(UserError, match=message):
        check_questions([question], scoring)


def test_questions_are_read_with_all_their_files(tmp_path):
    lines = [
        {
            "question_id": 1,
            "text": "Which?",
            "image": ["a.png", "b.png"],
            "audio": "c.wav",
            "answer": "a",
            "choices": ["a"],
        },
        {"question_id": "x", "audio": "d.wav", "answer": ["b", "c"], "category": "spoken"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_questions(path)
    assert first.media == (("image", "a.png"), ("image", "b.png"), ("audio", "c.wav"))
    assert (first.truths, first.choices, second.truths, second.question) == (("a",), ("a",), ("b", "c"), "")
    for wrong, message in (
        ({"question_id": 1}, "question 1: text='' must be a text; only with `audio` may it be empty"),
        ({"question_id": 1, "text": "?", "image": [1]}, r"image=\[1\] must be a text or a list of texts"),
        ({"question_id": 1, "text": "?", "answer": ""}, "answer='' must be a text"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            read_questions(path)
