"""`python -m data_pipelines.scienceqa`: a folder of ScienceQA -> records to train on, or questions to ask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

EXAMPLES = """\
FOLDER has problems.json, pid_splits.json, and the pictures of every split. Records ask for reasoning and then the
answer; questions are for `python -m vita_jax.evaluate --questions`, whose answers `python -m vita_jax.judge scienceqa`
scores.

examples:
  python -m data_pipelines.scienceqa --from ScienceQA --split train --records train.json
  python -m data_pipelines.build records --json train.json --root ScienceQA --output runs/scienceqa
  python -m data_pipelines.scienceqa --from ScienceQA --split test --questions test.jsonl
"""


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m data_pipelines.scienceqa", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--from", dest="source", required=True, metavar="FOLDER", help="of ScienceQA")
    parser.add_argument("--split", default="train", help="train (the default), val, test, minitrain, ...")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--records", metavar="FILE", help="write records here, a JSON list")
    what.add_argument("--questions", metavar="FILE", help="write questions here, a JSON object a line")
    return parser


def convert(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from vita_jax.data.records import PLACEHOLDERS
    from vita_jax.data.scienceqa import Problem, read_problems

    def record(problem: Problem) -> dict[str, Any]:
        mark = f"{PLACEHOLDERS['image']}\n" if problem.image else ""
        turns = [{"from": "human", "value": mark + problem.instruction}, {"from": "gpt", "value": problem.target}]
        return {"id": problem.id, **({"image": problem.image} if problem.image else {}), "conversations": turns}

    def question(problem: Problem) -> dict[str, Any]:
        image = {"image": problem.image} if problem.image else {}
        return {"question_id": problem.id, **image, "text": problem.instruction, "category": problem.subject}

    problems = read_problems(arguments.source, arguments.split)
    output = Path(arguments.records or arguments.questions)
    if arguments.records:
        text = json.dumps([record(problem) for problem in problems], ensure_ascii=False, indent=1)
    else:
        text = "".join(json.dumps(question(problem), ensure_ascii=False) + "\n" for problem in problems)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    pictures = sum(problem.image is not None for problem in problems)
    print(f"{output}: {len(problems)} problems of {arguments.split}, {pictures} with a picture")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(convert, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
