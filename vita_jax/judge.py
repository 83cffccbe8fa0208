"""`python -m vita_jax.judge`: answers that a language model grades, or competes with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vita_jax.command_line import ArgumentParser, json_file, progress_line, run_command
from vita_jax.errors import UserError

if TYPE_CHECKING:
    from vita_jax.data.scienceqa import Problem
    from vita_jax.data.teacher import Message, Teacher

EXAMPLES = """\
Answers are made by `python -m vita_jax.evaluate --questions FILE --answers FILE`. The judge is any server that speaks
OpenAI's chat completions; its key, if it needs one, is read from the environment variable VITA_JAX_TEACHER_KEY. What it
says is kept line by line in --replies, so that the same command goes on after a stop and asks nothing twice. --output
keeps the figures with their intervals, a line for every question, and a table and a picture with the published figures.

examples:
  python -m vita_jax.judge llava-bench --questions questions.jsonl --context context.jsonl \\
      --references answers_gpt4.jsonl --answers answers.jsonl \\
      --teacher http://localhost:8000/v1 --model my-model --replies reviews.jsonl --output bench.json --published wild
  python -m vita_jax.judge scienceqa --problems ScienceQA --answers answers.jsonl --output scienceqa.json
  python -m vita_jax.judge scienceqa --problems ScienceQA --answers answers.jsonl \\
      --teacher http://localhost:8000/v1 --model my-model --replies replies.jsonl
"""


# Sets of LLaVA-Bench with published figures: its questions in the wild, and those about pictures of COCO.
PUBLISHED = ("wild", "coco")


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m vita_jax.judge", description=__doc__, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="BENCHMARK", required=True)

    bench = "LLaVA-Bench: the judge grades each answer beside a reference."
    bench_parser = actions.add_parser("llava-bench", description=bench, help=bench, epilog=EXAMPLES)
    bench_parser.add_argument("--questions", required=True, metavar="FILE", help="question_id, image, text, category")
    bench_parser.add_argument("--context", required=True, metavar="FILE", help="image, and caption or captions")
    bench_parser.add_argument("--references", required=True, metavar="FILE", help="question_id, text")
    bench_parser.add_argument(
        "--published", choices=PUBLISHED, help="of --output: which set it is; without, nothing is compared"
    )
    bench_parser.set_defaults(run=llava_bench)

    science = "ScienceQA: accuracies; with --teacher, also of a text-only model, and of both together."
    science_parser = actions.add_parser("scienceqa", description=science, help=science, epilog=EXAMPLES)
    science_parser.add_argument("--problems", required=True, metavar="FOLDER", help="of ScienceQA")
    science_parser.add_argument("--split", default="test", help="of the answers (default test)")
    science_parser.set_defaults(run=scienceqa)
    for one, needed in ((bench_parser, True), (science_parser, False)):
        one.add_argument("--answers", required=True, metavar="FILE", help="question_id, text")
        one.add_argument(
            "--output", type=json_file, metavar="FILE.json", help="keeps the figures; other files go beside it"
        )
        one.add_argument("--teacher", required=needed, metavar="URL", help="where its API begins, http://HOST:PORT/v1")
        one.add_argument("--model", required=needed, metavar="NAME", help="the teacher's name of the model")
        one.add_argument("--replies", required=needed, metavar="FILE", help="keeps what it says")
        one.add_argument("--temperature", type=float, default=0.2, metavar="X", help="of its replies (default 0.2)")
        one.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of a reply (default 1024)")
        one.add_argument("--requests", type=int, default=8, metavar="N", help="at a time (default 8)")
    return parser


def _teacher(arguments: argparse.Namespace) -> Teacher:
    from vita_jax.data.teacher import Teacher, check_client

    check_client()
    return Teacher(arguments.teacher, arguments.model, arguments.temperature, arguments.max_tokens)


def _ask_all(arguments: argparse.Namespace, teacher: Teacher, asked: Mapping[str, list[Message]]) -> dict[str, str]:
    from vita_jax.evaluation.judging import replies

    return replies(teacher, asked, arguments.replies, requests=arguments.requests, progress=progress_line("asked"))


def llava_bench(arguments: argparse.Namespace) -> int:
    """`llava-bench`."""
    from vita_jax.evaluation.answer_lines import read_lines
    from vita_jax.evaluation.llava_bench import (
        UNPARSED,
        judge_messages,
        parse_scores,
        read_descriptions,
        summarise,
    )

    if arguments.published is not None and arguments.output is None:
        raise UserError(f"--published {arguments.published} is about --output FILE.json, where the comparison goes")
    questions = read_lines(arguments.questions, "text", "category", "image")
    references, answers = (read_lines(path, "text") for path in (arguments.references, arguments.answers))
    asked = judge_messages(questions, read_descriptions(arguments.context), references, answers)
    reviews = _ask_all(arguments, _teacher(arguments), asked)
    scores = {name: parse_scores(review) for name, review in reviews.items()}
    found = summarise((str(questions[name]["category"]), pair) for name, pair in scores.items())
    print(f"{'category':<24}{'relative %':>12}{'reference':>12}{'answers':>12}")
    for name, score in found.items():
        print(f"{name:<24}{score.relative:>12.1f}{score.reference_x10:>12.1f}{score.candidate_x10:>12.1f}")
    unparsed = sum(pair == UNPARSED for pair in scores.values())
    if unparsed:
        print(f"{unparsed} of {len(scores)} reviews have no two numbers in their first line; they count as -1 and -1")
    if arguments.output is not None:
        from vita_jax.evaluation.judged import write_llava_bench

        asker = {"judge": arguments.model, "temperature": arguments.temperature}
        written = write_llava_bench(
            Path(arguments.output), arguments.published, questions, references, answers, reviews, asker
        )
        print(f"written: {', '.join(map(str, written))}")
    return 0


def scienceqa(arguments: argparse.Namespace) -> int:
    """`scienceqa`."""
    from vita_jax.data.scienceqa import read_problems
    from vita_jax.evaluation.answer_lines import read_lines
    from vita_jax.evaluation.scienceqa import answers_to, letters_of

    problems = read_problems(arguments.problems, arguments.split)
    texts = answers_to(problems, read_lines(arguments.answers, "text"))
    chosen = {"answers": letters_of(problems, texts)}
    given = [name for name in ("teacher", "model", "replies") if getattr(arguments, name) is not None]
    if given and len(given) < 3:
        raise UserError(f"--{given[0]} needs --teacher, --model and --replies")
    if given:
        chosen |= _with_a_reader(arguments, problems, texts, chosen["answers"])
    _print_accuracies(problems, chosen)
    if arguments.output is not None:
        from vita_jax.evaluation.judged import write_scienceqa

        written = write_scienceqa(Path(arguments.output), problems, texts, chosen, arguments.model)
        print(f"written: {', '.join(map(str, written))}")
    return 0


def _with_a_reader(
    arguments: argparse.Namespace,
    problems: Sequence[Problem],
    texts: Mapping[str, str],
    viewer: Mapping[str, str | None],
) -> dict[str, dict[str, str | None]]:
    """What a text-only model chooses, and what both do together."""
    from vita_jax.evaluation import scienceqa as recipe

    teacher = _teacher(arguments)
    told = _ask_all(arguments, teacher, {problem.id: recipe.messages(problem) for problem in problems})
    reader = recipe.letters_of(problems, told)
    differing = set(recipe.to_be_judged(reader, viewer))
    judged = {
        f"{problem.id} judged": recipe.judge_messages(problem, told[problem.id], texts[problem.id])
        for problem in problems
        if problem.id in differing
    }
    verdicts = _ask_all(arguments, teacher, judged)
    final = recipe.letters_of(
        problems, {problem.id: verdicts.get(f"{problem.id} judged", told[problem.id]) for problem in problems}
    )
    return {
        "text-only model": reader,
        "both, complement": recipe.complemented(reader, viewer),
        "both, judge": recipe.complemented(final, viewer),
    }


def _print_accuracies(problems: Sequence[Any], chosen: Mapping[str, Mapping[str, str | None]]) -> None:
    from vita_jax.evaluation.scienceqa import accuracies

    tables = {title: accuracies(problems, letters) for title, letters in chosen.items()}
    names = list(next(iter(tables.values())))
    print(f"{'accuracy %':<20}" + "".join(f"{name:>8}" for name in names))
    for title, table in tables.items():
        print(f"{title:<20}" + "".join(f"{100 * table[name][0]:>8.2f}" for name in names))
    print(f"{'problems':<20}" + "".join(f"{tables['answers'][name][1]:>8}" for name in names))
    for title, letters in chosen.items():
        without = sum(letter is None for letter in letters.values())
        if without:
            print(f"{title}: {without} of {len(letters)} settle on no option, which counts as wrong")


def judge(arguments: argparse.Namespace) -> int:
    """Runs the chosen action. Raises UserError for a place of the replies that does not exist."""
    if arguments.replies is not None and not Path(arguments.replies).absolute().parent.is_dir():
        raise UserError(f"--replies {arguments.replies}: its folder does not exist")
    return arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(judge, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
