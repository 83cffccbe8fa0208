"""`python -m vita_jax.evaluate --checkpoint DIR`: every figure of a benchmark, on data the model has not seen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vita_jax.command_line import ArgumentParser, add_int8, run_command
from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.storage import place

if TYPE_CHECKING:
    from vita_jax.training.experiment import ExperimentConfig

EXAMPLES = """\
DIR is a run (its last finished stage is taken), a stage's folder, or one checkpoint.
For a run the result is also kept as DIR/evaluation/final.json (final.speech.json for the benchmark speech, with some
of what was said in DIR/evaluation/audio), unless --limit, --groups or --int8 is given.

benchmarks:
  quickstart  typed questions about pictures and clips, and questions without
  speech      spoken questions, refusals, transcripts, input head, recogniser, the voice read back, real-time factors

examples:
  python -m vita_jax.evaluate --checkpoint runs/quickstart
  python -m vita_jax.evaluate --checkpoint runs/quickstart --benchmark speech
  python -m vita_jax.evaluate --checkpoint runs/quickstart --benchmark speech --groups voice_copy voice_answers
  python -m vita_jax.evaluate --checkpoint runs/quickstart --limit 20
  python -m vita_jax.evaluate --checkpoint runs/quickstart/stages/vision_sft --output result.json
  python -m vita_jax.evaluate --checkpoint runs/mine --questions questions.jsonl --root images --answers answers.jsonl
      asks what the file asks, {"question_id": 1, "image": "a.jpg", "text": "What is this?"} a line, and scores nothing;
      `python -m vita_jax.judge` does

A Flamingo is measured by its few-shot tasks: DIR/data/few_shot, or --data. For a run, figures and a line for every
query are kept as DIR/evaluation/few_shot.json and few_shot.jsonl.
  python -m vita_jax.evaluate --checkpoint runs/quickstart_flamingo --shots 0 4 8
  python -m vita_jax.evaluate --checkpoint runs/flamingo_9b --data my_tasks --choice similar --groups captions
"""


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m vita_jax.evaluate",
        description="Asks a model the questions of a benchmark, listens to it, and prints what comes of it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a run, or one checkpoint of it")
    parser.add_argument("--benchmark", metavar="NAME", default="quickstart", help="quickstart (the default) or speech")
    parser.add_argument("--groups", metavar="NAME", nargs="+", help="measure only these groups of it; not kept")
    parser.add_argument("--limit", metavar="N", type=int, help="ask at most N questions of each kind of each group")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON to this file, too")
    parser.add_argument("--questions", metavar="FILE", help="ask these in place of a benchmark, a JSON object a line")
    parser.add_argument("--root", metavar="FOLDER", help="where the pictures of --questions start (default its folder)")
    parser.add_argument("--answers", metavar="FILE", help="gets the answers to --questions, a JSON object a line")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="of these answers (default 256)")
    add_int8(parser)
    parser.add_argument("--shots", metavar="N", nargs="+", type=int, help="of a Flamingo: demonstrations of a prompt")
    parser.add_argument("--choice", choices=("random", "similar"), help="of a Flamingo: which demonstrations")
    parser.add_argument("--data", metavar="DIR", help="of a Flamingo: queries.jsonl, support.jsonl and their media")
    return parser


def evaluate(arguments: argparse.Namespace) -> int:
    """Loads, asks, prints, saves."""
    # Imported here so that --help and a mistyped argument answer at once.
    import dataclasses

    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.evaluation.benchmarks import get_benchmark
    from vita_jax.evaluation.comparison import changes_again
    from vita_jax.evaluation.results import FINAL, format_result, format_stages, save_result, save_stage_evaluation
    from vita_jax.evaluation.runner import evaluate_params
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.parallel.process import prepare_process
    from vita_jax.training.checkpoint import CONFIG, load_params
    from vita_jax.training.families import family_of

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be at least 1")
    if arguments.questions is not None or arguments.answers is not None:
        return answer_questions(arguments)
    if arguments.root is not None:
        raise UserError("--root is where the pictures of --questions start; benchmarks know their own folders")
    get_benchmark(arguments.benchmark)
    int8 = int8_parts(arguments.int8)
    prepare_process()
    loaded = load_params(arguments.checkpoint, change=int8.change)
    # A run may have been moved since; where it is now is what counts.
    config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
    print(f"checkpoint {loaded.path} (stage {loaded.stage}, step {loaded.step})", flush=True)
    is_run = (place(arguments.checkpoint) / CONFIG).is_file()
    if family_of(config.model).in_context:
        int8.check(config)
        return evaluate_by_shots(arguments, config, loaded.params, is_run)
    for name in ("shots", "choice", "data"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is for a Flamingo; this is a {family_of(config.model).title}")
    is_kept = is_run and arguments.limit is None and arguments.groups is None and not arguments.int8
    result = evaluate_params(
        config,
        loaded.params,
        load_tokenizer(loaded.run_dir / "tokenizer"),
        benchmark=arguments.benchmark,
        groups=arguments.groups,
        limit=arguments.limit,
        progress=show_progress if sys.stderr.isatty() else None,
        keep_sounds=is_kept,
        cache_dtype=int8.cache_dtype,
    )
    if arguments.int8:
        result["int8"] = sorted(arguments.int8)
    if is_kept:
        result |= changes_again(loaded.run_dir, result)
    print(format_result(result))
    written = save_stage_evaluation(config, FINAL, result) if is_kept else None
    stages = format_stages(loaded.run_dir, config) if is_run else ""
    if stages:
        print(f"\n{stages}")
    if written is not None:
        print(f"\nwritten: {written}")
    if arguments.output is not None:
        save_result(result, Path(arguments.output))
        print(f"written: {arguments.output}")
    return 0


def answer_questions(arguments: argparse.Namespace) -> int:
    """Asks what a file asks, and writes down the answers."""
    from vita_jax.data.json_lines import write_json_lines
    from vita_jax.data.prompts import split_state_symbol
    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.evaluation.answer_lines import answer_lines, question_items, read_lines
    from vita_jax.evaluation.answering import answer_items
    from vita_jax.evaluation.subject import Subject
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.parallel.process import prepare_process
    from vita_jax.training.checkpoint import load_params
    from vita_jax.training.families import family_of

    if arguments.questions is None or arguments.answers is None:
        raise UserError("--questions and --answers go together: what is asked, and where the answers go")
    for name in ("groups", "output", "shots", "choice", "data"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} belongs to benchmarks; leave it out with --questions")
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens} must be at least 1")
    questions = read_lines(arguments.questions, "text")
    items, int8 = question_items(questions), int8_parts(arguments.int8)
    prepare_process()
    loaded = load_params(arguments.checkpoint, change=int8.change)
    family = family_of(loaded.config.model)
    if family.in_context:
        raise UserError(f"--questions asks models that hold conversations; {arguments.checkpoint} is a {family.title}")
    subject = Subject(loaded.config, loaded.params, load_tokenizer(loaded.run_dir / "tokenizer"))
    said = answer_items(
        subject.model,
        subject.params,
        subject.context,
        items if arguments.limit is None else items[: arguments.limit],
        arguments.root or Path(arguments.questions).parent,
        batch_size=min(subject.batch_size, len(items)),
        max_new_tokens=arguments.max_new_tokens,
        progress=show_progress if sys.stderr.isatty() else None,
        cache_dtype=int8.cache_dtype,
    )
    texts = [split_state_symbol(answer.strip(), subject.context.template)[1] for answer in said]
    asked = dict(list(questions.items())[: len(texts)])
    write_json_lines(arguments.answers, answer_lines(asked, texts, arguments.checkpoint))
    print(f"written: {arguments.answers} ({len(texts)} answers)")
    return 0


def evaluate_by_shots(arguments: argparse.Namespace, config: ExperimentConfig, params: Any, is_run: bool) -> int:
    """Measures a Flamingo, prints, saves."""
    import dataclasses

    from vita_jax.data.json_lines import write_json_lines
    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.evaluation.few_shot import (
        LINES,
        RESULT,
        evaluate_few_shot,
        format_few_shot,
        subject_of,
    )
    from vita_jax.evaluation.results import save_result

    changes = {"shots": tuple(arguments.shots)} if arguments.shots else {}
    changes |= {"choice": arguments.choice} if arguments.choice else {}
    folder = None if arguments.data is None else Path(arguments.data)
    tokenizer = load_tokenizer(place(config.run_dir) / "tokenizer")
    result, lines = evaluate_few_shot(
        subject_of(config, params, tokenizer, folder),
        dataclasses.replace(config.few_shot, **changes),
        tasks=arguments.groups,
        limit=arguments.limit,
        progress=show_progress if sys.stderr.isatty() else None,
    )
    print(format_few_shot(result))
    if is_run and folder is None and arguments.limit is None and arguments.groups is None:
        kept = place(config.run_dir) / "evaluation"
        save_result(result, kept / RESULT)
        write_json_lines(kept / LINES, lines)
        print(f"\nwritten: {kept / RESULT}, {kept / LINES}")
    if arguments.output is not None:
        save_result(result, Path(arguments.output))
        write_json_lines(Path(arguments.output).with_suffix(".jsonl"), lines)
        print(f"written: {arguments.output}")
    return 0


def show_progress(done: int, total: int) -> None:
    """One line, rewritten in place."""
    end = "\r\x1b[2K" if done == total else ""
    print(f"\r\x1b[2Kanswered {done} of {total}{end}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(evaluate, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
