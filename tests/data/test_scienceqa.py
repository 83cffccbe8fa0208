"""ScienceQA: what is asked, what is to be said, and which option an answer settles on."""

from __future__ import annotations

import json

import pytest

from data_pipelines.build import main as build
from data_pipelines.scienceqa import main
from tests.data.media import write_json, write_png
from vita_jax.data.records import RecordError, load_manifest
from vita_jax.data.scienceqa import chosen_letter, read_problems
from vita_jax.errors import UserError

PROBLEM = {
    "question": "Which is a mammal?",
    "choices": ["trout", "cat", "robin"],
    "answer": 1,
    "hint": "Mammals have hair.",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade7",
    "subject": "natural science",
    "lecture": "Mammals feed milk.",
    "solution": "A cat has hair.",
    "split": "test",
}


def write_scienceqa(folder, **changes):
    """Three problems of the test split: with picture and hint, with neither, and without an explanation."""
    bare = {"hint": "", "image": None, "grade": "grade2", "subject": "social science"}
    terse = {
        "question": "Which one flies?",
        "image": None,
        "lecture": "",
        "solution": "",
        "answer": 2,
        "subject": "language science",
    }
    write_png(folder / "test" / "1" / "image.png")
    problems = {"1": PROBLEM | changes, "20": PROBLEM | bare, "3": PROBLEM | terse}
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "test": ["3", "1", "20"]})
    return folder


def test_problems_in_words(tmp_path):
    terse, full, bare = read_problems(write_scienceqa(tmp_path), "test")
    assert full.instruction == (
        "Question: Which is a mammal?\nContext: Mammals have hair.\nOptions: (A) trout (B) cat (C) robin"
    )
    assert full.target == "Mammals feed milk.\nA cat has hair.\nThe answer is B."
    assert bare.instruction == "Question: Which is a mammal?\nOptions: (A) trout (B) cat (C) robin"
    assert terse.target == "The answer is C."
    assert full.classes == ("NAT", "TXT", "IMG", "G7-12")
    assert bare.classes == ("SOC", "NO", "G1-6") and terse.classes == ("LAN", "TXT", "G7-12")
    assert (full.image, bare.image) == ("test/1/image.png", None)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("It has hair.\nThe answer is B.", "B"),
        ("The answer is A. No, wait. The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("B", "B"),
        ("(C) robin", "C"),
        ("A. trout", "A"),
        ("A cat has hair.", None),
        ("The answer is a cat.", None),
        ("The answer is D.", None),
        ("The answer cannot be told.", None),
        ("", None),
    ],
)
def test_the_option_of_an_answer(answer, letter):
    assert chosen_letter(answer, 3) == letter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ["one"]}, "choices: must be 2 to 10"),
        ({"answer": 3}, "answer: 3 is not the place"),
        ({"grade": "grade13"}, "grade: 'grade13'"),
        ({"subject": "art"}, "subject: 'art'"),
        ({"hint": None}, "hint: None must be a text"),
        ({"question": " "}, "question: is empty"),
    ],
)
def test_problems_are_checked(tmp_path, changes, message):
    with pytest.raises(RecordError, match=f"problem 1: {message}"):
        read_problems(write_scienceqa(tmp_path, **changes), "test")


def test_splits_are_checked(tmp_path):
    write_scienceqa(tmp_path)
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        read_problems(tmp_path, "val")
    write_json(tmp_path / "pid_splits.json", {"test": ["9"]})
    with pytest.raises(UserError, match="names problem '9', which problems.json does not have"):
        read_problems(tmp_path, "test")


@pytest.mark.slow
def test_records_and_questions(tmp_path, capsys):
    folder = write_scienceqa(tmp_path / "sqa")
    line = ["--from", str(folder), "--split", "test"]
    assert main([*line, "--records", str(tmp_path / "records.json")]) == 0
    assert "3 problems of test, 1 with a picture" in capsys.readouterr().out
    made = ["records", "--json", str(tmp_path / "records.json"), "--root", str(folder)]
    assert build([*made, "--output", str(tmp_path / "built")]) == 0
    assert load_manifest(tmp_path / "built").counts["images"] == 1
    assert main([*line, "--questions", str(tmp_path / "questions.jsonl")]) == 0
    questions = [json.loads(entry) for entry in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [question["question_id"] for question in questions] == ["3", "1", "20"]
    assert questions[1]["image"] == "test/1/image.png" and "image" not in questions[0]
