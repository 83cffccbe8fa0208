"""The command that has answers graded: tables against values computed by hand, replies that are kept, bad input."""

from __future__ import annotations

import json

import pytest

from tests.data.stub_teacher import stub_teacher
from tests.data.test_scienceqa import write_scienceqa
from vita_jax.data.scienceqa import read_problems
from vita_jax.evaluation.scienceqa import accuracies, complemented, to_be_judged
from vita_jax.judge import main


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def bench_files(folder):
    """Three questions about two pictures."""
    questions = [
        {"question_id": 0, "image": "a.jpg", "category": "conv", "text": "What is it?"},
        {"question_id": 1, "image": "a.jpg", "category": "detail", "text": "Describe it."},
        {"question_id": 2, "image": "b.jpg", "category": "conv", "text": "How many?"},
    ]
    context = [
        {"image": "a.jpg", "caption": "A red boat."},
        {"image": "b.jpg", "captions": ["Two."], "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]},
    ]
    references = [{"question_id": number, "text": f"Reference {number}."} for number in range(3)]
    answers = [{"question_id": number, "text": f"Answer {number}."} for number in range(3)]
    named = {"questions": questions, "context": context, "references": references, "answers": answers}
    return [
        part
        for name, entries in named.items()
        for part in (f"--{name}", write_lines(folder / f"{name}.jsonl", *entries))
    ]


def review(messages):
    """Scores by the number of the answer."""
    text = messages[-1]["content"]
    scores = next(said for number, said in enumerate(("8 4", "9 9", "no idea")) if f"Answer {number}." in text)
    return f"{scores}\nBecause."


def test_llava_bench(tmp_path, capsys):
    """conv: means of (8, -1) and (4, -1): 3.5 and 1.5; detail: 9 and 9; all: 16/3 and 4."""
    with stub_teacher(review) as stub:
        line = ["llava-bench", *bench_files(tmp_path), "--teacher", stub.url, "--model", "m", "--requests", "1"]
        line += ["--replies", str(tmp_path / "reviews.jsonl")]
        assert main(line) == 0
        rows = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines()[1:4]}
        assert rows == {
            "all": ["75.0", "53.3", "40.0"],
            "conv": ["42.9", "35.0", "15.0"],
            "detail": ["100.0", "90.0", "90.0"],
        }
        said = stub.asked[2]["messages"][-1]["content"]
        assert (
            "[Context]\nTwo.\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nHow many?\n\n[Assistant 1]\nReference 2."
            in said
        )
        line += ["--output", str(tmp_path / "bench.json"), "--published", "wild"]
        assert main(line) == 0 and len(stub.asked) == 3  # all replies were kept
        assert "1 of 3 reviews have no two numbers" in capsys.readouterr().out
        figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
        assert (figures["all"]["value"], figures["all"]["low"], figures["all"]["n"]) == (75.0, None, 3)
        assert (figures["detail"]["value"], figures["detail"]["low"], figures["detail"]["high"]) == (
            100.0,
            100.0,
            100.0,
        )
        told = (tmp_path / "bench.md").read_text()
        assert "# LLaVA-Bench (in the wild), all" in told and "| LLaVA |  | 67.3 |  |\n" in told
        assert "| **answers** |  | **75.0** |  |" in told and "Graded by m;" in told
        rows = [json.loads(one) for one in (tmp_path / "bench.jsonl").read_text().splitlines()]
        assert [row["scores"] for row in rows] == [[8, 4], [9, 9], [-1, -1]] and rows[0]["reference"] == "Reference 0."
        write_lines(tmp_path / "answers.jsonl", *({"question_id": n, "text": f"Answer 0. {n}"} for n in range(3)))
        assert main(line) == 0 and len(stub.asked) == 6  # of other answers


def test_a_judge_that_fails_is_asked_again_for_the_rest(tmp_path, capsys):
    said = ["8 8", 400, "7 7", "6 6"]
    with stub_teacher(lambda _: said.pop(0)) as stub:
        line = ["llava-bench", *bench_files(tmp_path), "--teacher", stub.url, "--model", "m", "--requests", "1"]
        line += ["--replies", str(tmp_path / "reviews.jsonl")]
        assert main(line) == 2
        assert "1 of 3 questions have no reply of m, such as 1" in capsys.readouterr().err
        with open(tmp_path / "reviews.jsonl", "a", encoding="utf-8") as file:
            file.write('{"name": "1", "as')  # what a kill leaves
        assert main(line) == 0 and len(stub.asked) == 4
    assert len((tmp_path / "reviews.jsonl").read_text().splitlines()) == 3


def test_scienceqa_by_class(tmp_path, capsys):
    """Right: C, B, B for problems 3, 1, 20."""
    folder = write_scienceqa(tmp_path / "sqa")
    problems = read_problems(folder, "test")
    found = accuracies(problems, {"3": "C", "1": "A", "20": None})
    assert found["all"] == (1 / 3, 3) and found["TXT"] == (0.5, 2) and found["IMG"] == (0.0, 1)
    assert found["G7-12"] == (0.5, 2) and found["NO"] == (0.0, 1) and found["LAN"] == (1.0, 1)
    answers = write_lines(
        tmp_path / "answers.jsonl",
        {"question_id": "3", "text": "The answer is C."},
        {"question_id": 1, "text": "Hm. The answer is A."},
        {"question_id": "20", "text": "A cat, I think."},
    )
    command = ["scienceqa", "--problems", str(folder), "--answers", answers, "--output", str(tmp_path / "mine.json")]
    assert main(command) == 0
    result = json.loads((tmp_path / "mine.json").read_text())
    assert result["value"] == pytest.approx(100 / 3) and (result["low"], result["high"]) == (0, 100)
    assert "| **mine** |  | **33.3** | 0.0 .. 100.0 |" in (tmp_path / "mine.md").read_text()
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert said.splitlines()[1].split() == "answers 0.00 0.00 100.00 50.00 0.00 0.00 0.00 50.00 33.33".split()
    assert "answers: 1 of 3 settle on no option" in said


def test_a_reader_and_a_viewer_together(tmp_path, capsys):
    """The reader is wrong on 3, has no option for 1 and is right on 20; the viewer is right on the first two.

    As a judge the reader changes its mind on 3.
    """
    reader, viewer = {"3": "A", "1": None, "20": "B"}, {"3": "C", "1": "B", "20": None}
    assert complemented(reader, viewer) == {"3": "A", "1": "B", "20": "B"}
    assert to_be_judged(reader, viewer) == ["3", "1", "20"]
    folder = write_scienceqa(tmp_path / "sqa")
    problems = {problem.instruction: problem.id for problem in read_problems(folder, "test")}

    def reply(messages):
        text = messages[-1]["content"]
        name = next(name for asked, name in problems.items() if text.startswith(asked))
        if "[Assistant 2]" in text:
            return {"3": "The answer is C.", "1": "Who knows.", "20": "The answer is B."}[name]
        return {"3": "The answer is A.", "1": "The answer cannot be told.", "20": "The answer is B."}[name]

    texts = {"3": "The answer is C.", "1": "The answer is B.", "20": "No idea."}
    answers = write_lines(tmp_path / "a.jsonl", *({"question_id": k, "text": v} for k, v in texts.items()))
    with stub_teacher(reply) as stub:
        line = ["scienceqa", "--problems", str(folder), "--answers", answers, "--teacher", stub.url, "--model", "m"]
        assert main([*line, "--replies", str(tmp_path / "replies.jsonl")]) == 0
        assert len(stub.asked) == 6
    rows = {row[:20].strip(): row.split()[-1] for row in capsys.readouterr().out.splitlines()}
    assert rows["answers"] == "66.67" and rows["text-only model"] == "33.33"
    assert rows["both, complement"] == "66.67" and rows["both, judge"] == "100.00"


def test_bad_input_is_named(tmp_path, capsys):
    files = bench_files(tmp_path)
    base = ["llava-bench", *files, "--teacher", "http://localhost:1/v1", "--model", "m", "--replies"]
    replies = str(tmp_path / "r.jsonl")
    write_lines(tmp_path / "answers.jsonl", {"question_id": 0, "text": "x"}, {"question_id": 2, "text": "x"})
    assert main([*base, replies]) == 2 and "question 1 has no answer" in capsys.readouterr().err
    write_lines(tmp_path / "answers.jsonl", {"question_id": 0, "text": "x"}, {"question_id": 0, "text": "x"})
    assert main([*base, replies]) == 2 and "answers.jsonl:2: question_id 0 is there twice" in capsys.readouterr().err
    write_lines(tmp_path / "answers.jsonl", {"question_id": 0, "text": ""})
    assert main([*base, replies]) == 2 and "answers.jsonl:1: text=''" in capsys.readouterr().err
    (tmp_path / "answers.jsonl").write_text("")
    assert main([*base, replies]) == 2 and "answers.jsonl is empty" in capsys.readouterr().err
    assert main([*base, str(tmp_path / "none" / "r.jsonl")]) == 2 and "does not exist" in capsys.readouterr().err
    folder = write_scienceqa(tmp_path / "sqa")
    answers = write_lines(tmp_path / "a.jsonl", {"question_id": "3", "text": "C"})
    line = ["scienceqa", "--problems", str(folder), "--answers", answers]
    assert main(line) == 2 and "2 of 3 problems have no answer, for example 1" in capsys.readouterr().err
