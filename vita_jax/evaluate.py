"""`python -m vita_jax.evaluate --checkpoint DIR`: every figure of a benchmark, on data the model has not seen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

if TYPE_CHECKING:
    from vita_jax.training.experiment import ExperimentConfig

EXAMPLES = """\
DIR is a run (its last finished stage is taken), a stage's folder, or one checkpoint.
For a run the result is also kept as DIR/evaluation/final.json (final.speech.json for the benchmark speech, with some
of what was said in DIR/evaluation/audio), unless --limit is given.

benchmarks:
  quickstart  typed questions about pictures and clips, and questions without
  speech      spoken questions, refusals, transcripts, input head, recogniser, the voice read back, real-time factors

examples:
  python -m vita_jax.evaluate --checkpoint runs/quickstart
  python -m vita_jax.evaluate --checkpoint runs/quickstart --benchmark speech
  python -m vita_jax.evaluate --checkpoint runs/quickstart --benchmark speech --groups voice_copy voice_answers
  python -m vita_jax.evaluate --checkpoint runs/quickstart --limit 20
  python -m vita_jax.evaluate --checkpoint runs/quickstart/stages/vision_sft --output result.json

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
    from vita_jax.parallel.process import prepare_process
    from vita_jax.training.checkpoint import CONFIG, load_params
    from vita_jax.training.families import family_of

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be at least 1")
    get_benchmark(arguments.benchmark)
    prepare_process()
    loaded = load_params(arguments.checkpoint)
    # A run may have been moved since; where it is now is what counts.
    config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
    print(f"checkpoint {loaded.path} (stage {loaded.stage}, step {loaded.step})", flush=True)
    is_run = (Path(arguments.checkpoint) / CONFIG).is_file()
    if family_of(config.model).in_context:
        return evaluate_by_shots(arguments, config, loaded.params, is_run)
    for name in ("shots", "choice", "data"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is for a Flamingo; this is a {family_of(config.model).title}")
    is_kept = is_run and arguments.limit is None and arguments.groups is None
    result = evaluate_params(
        config,
        loaded.params,
        load_tokenizer(loaded.run_dir / "tokenizer"),
        benchmark=arguments.benchmark,
        groups=arguments.groups,
        limit=arguments.limit,
        progress=show_progress if sys.stderr.isatty() else None,
        keep_sounds=is_kept,
    )
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


def evaluate_by_shots(arguments: argparse.Namespace, config: ExperimentConfig, params: Any, is_run: bool) -> int:
    """Measures a Flamingo, prints, saves."""
    import dataclasses

    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.evaluation.few_shot import (
        LINES,
        RESULT,
        evaluate_few_shot,
        format_few_shot,
        subject_of,
        write_lines,
    )
    from vita_jax.evaluation.results import save_result

    changes = {"shots": tuple(arguments.shots)} if arguments.shots else {}
    changes |= {"choice": arguments.choice} if arguments.choice else {}
    folder = None if arguments.data is None else Path(arguments.data)
    tokenizer = load_tokenizer(Path(config.run_dir) / "tokenizer")
    result, lines = evaluate_few_shot(
        subject_of(config, params, tokenizer, folder),
        dataclasses.replace(config.few_shot, **changes),
        tasks=arguments.groups,
        limit=arguments.limit,
        progress=show_progress if sys.stderr.isatty() else None,
    )
    print(format_few_shot(result))
    if is_run and folder is None and arguments.limit is None and arguments.groups is None:
        kept = Path(config.run_dir) / "evaluation"
        save_result(result, kept / RESULT)
        write_lines(lines, kept / LINES)
        print(f"\nwritten: {kept / RESULT}, {kept / LINES}")
    if arguments.output is not None:
        save_result(result, Path(arguments.output))
        write_lines(lines, Path(arguments.output).with_suffix(".jsonl"))
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
    sys.exit(main())
