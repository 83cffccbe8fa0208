"""`python -m data_pipelines.instruct`: described pictures -> visual instructions, written by a language model.

The recipe of LLaVA (arXiv 2304.08485, section 3): a teacher that only reads is shown captions and boxes in place of a
picture, and writes conversations, descriptions and questions that take reasoning. OUTPUT gets

    records.json     {"id", "image", "conversations"} for `data_pipelines.build records`
    rejects.jsonl    replies that cannot be used, and why
    recipe.json      who was asked, how, and for what

The teacher is any server that speaks OpenAI's chat completions. What has been written is kept in parts of a few dozen
pictures, so the same command goes on after a stop, and asks only for the parts that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipelines.build import Line, add_budget, add_runner, runner_of
from data_pipelines.instruction_prompts import KINDS, PUBLISHED_SHARES
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

EXAMPLES = """\
examples:
  python -m data_pipelines.instruct --pictures pictures.jsonl --root images --output instructions \\
      --teacher http://localhost:8000/v1 --model my-model
  python -m data_pipelines.instruct --coco-captions annotations/captions_train2017.json \\
      --coco-instances annotations/instances_train2017.json --root train2017 --output instructions \\
      --teacher https://example.org/v1 --model large --kinds conversation=1,reasoning=0.5 --requests 32
  python -m data_pipelines.build records --json instructions/records.json --root images --output runs/instructions

pictures.jsonl has lines like
  {"image": "a.jpg", "captions": ["Two dogs on a pier."], "size": [640, 480],
   "boxes": [{"name": "dog", "box": [10, 200, 90, 300]}]}
The teacher's key, if it needs one, is read from the environment variable VITA_JAX_TEACHER_KEY.
"""


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m data_pipelines.instruct", description=__doc__, epilog=EXAMPLES)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--pictures", metavar="FILE", help="described pictures, a JSON object a line")
    given.add_argument("--coco-captions", metavar="FILE", help="captions_*.json of COCO")
    parser.add_argument("--coco-instances", metavar="FILE", help="instances_*.json of COCO, for the boxes")
    parser.add_argument("--root", required=True, metavar="FOLDER", help="where the pictures' paths start")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new, or an earlier one of this command")
    parser.add_argument("--teacher", required=True, metavar="URL", help="where its API begins, http://HOST:PORT/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the teacher's name of the model")
    shares = ",".join(f"{kind}={share:g}" for kind, share in PUBLISHED_SHARES.items())
    parser.add_argument(
        "--kinds", default=shares, metavar="KIND=X,...", help=f"shares of the pictures (default {shares}, as published)"
    )
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X", help="of the replies (default 0.7)")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of a reply (default 1024)")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of which pictures get what (default 0)")
    add_budget(parser)
    add_runner(parser)
    return parser


def parse_kinds(text: str) -> dict[str, float]:
    """`conversation=1,reasoning=0.5` -> shares by kind. Raises UserError for anything else."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        kind, _, share = part.partition("=")
        if kind not in KINDS:
            raise UserError(f"--kinds: {kind!r} is unknown; use some of {', '.join(KINDS)}")
        if kind in shares:
            raise UserError(f"--kinds: {kind} is given twice")
        try:
            shares[kind] = float(share)
        except ValueError:
            raise UserError(f"--kinds: {part!r} must be KIND=SHARE, as in {kind}=0.5") from None
        if not 0 < shares[kind] <= 1:
            raise UserError(f"--kinds: the share of {kind} is {share}; it must be above 0 and at most 1")
    return shares


def _pictures(arguments: argparse.Namespace) -> tuple[list[str], Callable[[], Iterator[dict[str, Any]]]]:
    """Files that describe the pictures, and what reads them."""
    from data_pipelines.pictures import read_coco, read_lines

    if arguments.pictures is not None:
        if arguments.coco_instances is not None:
            raise UserError("--coco-instances goes with --coco-captions; --pictures has boxes of its own")
        return [arguments.pictures], lambda: read_lines(arguments.pictures)
    files = [arguments.coco_captions, arguments.coco_instances]
    return [file for file in files if file is not None], lambda: read_coco(*files)


def instruct(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # Imported here so that --help and a mistyped argument answer at once.
    from data_pipelines.instructions import InstructOptions, write_instructions
    from vita_jax.data.teacher import Teacher, check_client

    check_client()
    teacher = Teacher(arguments.teacher, arguments.model, arguments.temperature, arguments.max_tokens)
    options = InstructOptions(parse_kinds(arguments.kinds), arguments.requests, arguments.seed)
    files, read = _pictures(arguments)
    with Line() as line:
        counts = write_instructions(
            read(),
            files,
            arguments.root,
            arguments.output,
            teacher,
            options,
            max_bad_fraction=arguments.max_bad_fraction,
            runner=runner_of(arguments),
            progress=line.show,
        )
    print(f"{arguments.output}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(instruct, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
