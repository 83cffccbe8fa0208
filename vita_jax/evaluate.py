"""`python -m vita_jax.evaluate --checkpoint DIR`: every figure of a benchmark, on data the model has not seen."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vita_jax.command_line import ArgumentParser, add_int8, json_file, progress_line, run_command
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import SCORINGS
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.storage import is_remote, on_disk, place

if TYPE_CHECKING:
    from vita_jax.evaluation.answer_lines import Question, Scoring
    from vita_jax.evaluation.asking import AskOptions, KeptAnswers
    from vita_jax.evaluation.library import LmmsSet
    from vita_jax.evaluation.subject import Subject
    from vita_jax.training.checkpoint import LoadedModel
    from vita_jax.training.experiment import ExperimentConfig

# Of an answer to a question of a file.
MAX_NEW_TOKENS = 256
# Sounds that a model writes down at a time.
SPOKEN_AT_ONCE = 16

EXAMPLES = """\
DIR is a run (its last finished stage is taken), a stage's folder, or one checkpoint.
For a run the result is also kept as DIR/evaluation/final.json (final.NAME.json for another benchmark; of speech with
some of what was said in DIR/evaluation/audio), for quickstart and speech unless --limit, --groups or --int8 is given.

benchmarks of a run, on its data:
  quickstart   typed questions about pictures and clips, and questions without
  speech       spoken questions, refusals, transcripts, input head, recogniser, the voice read back, real-time factors
benchmarks that are read from --data FOLDER:
  aishell1     the folder data_aishell: character error rate
  query_noise  folders query and noise with sounds: which of them the model takes to be meant for it
  copies       any folder of sounds, copied through the codec: mel distance, STOI, PESQ, and --mos
  speech       manifest.jsonl with texts that are said and read back, for models without a run's data; real-time factors
benchmarks of lmms-eval, which has an environment of its own (launch/setup.sh --eval), read from where that looks:
  mme mmbench mmbench_cn mmstar mmmu mathvista hallusionbench ai2d ocrbench mmvet scienceqa vqav2 textvqa okvqa vizwiz
  coco_captions flickr30k video_mme video_mme_subtitles mvbench tempcompass librispeech_{dev,test}_{clean,other}
  wenetspeech_{net,meeting} mmlu gsm8k ceval, and lmms:TASK for any other, also of your own in the folder --data
Answers are kept as they are made: the same command goes on after a stop. docs/evaluation.md explains every number.

examples:
  python -m vita_jax.evaluate --checkpoint runs/quickstart
  python -m vita_jax.evaluate --checkpoint runs/quickstart --benchmark speech
  python -m vita_jax.evaluate --checkpoint runs/quickstart --benchmark speech --groups voice_copy voice_answers
  python -m vita_jax.evaluate --checkpoint runs/quickstart --limit 20
  python -m vita_jax.evaluate --checkpoint runs/quickstart/stages/vision_sft --output result.json
  python -m vita_jax.evaluate --checkpoint runs/vita_1_5 --benchmark mme --mesh fsdp=4
  python -m vita_jax.evaluate --checkpoint runs/vita_1_5 --benchmark aishell1 --data data_aishell
  python -m vita_jax.evaluate --checkpoint runs/mine --questions questions.jsonl --root files --answers answers.jsonl
      asks what the file asks, {"question_id": 1, "image": "a.jpg", "text": "What is this?"} a line
  python -m vita_jax.evaluate --checkpoint runs/mine --questions q.jsonl --answers a.jsonl --scoring choice
      and compares with {"answer": "B", "choices": ["cat", "dog"]} of each line: exact, choice, wer, cer or state
      (answers of "query" or "noise"); without --scoring `python -m vita_jax.judge` can grade them

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
    parser.add_argument("--benchmark", metavar="NAME", help="one of the above; default quickstart")
    parser.add_argument("--data", metavar="DIR", help="what a benchmark is read from, see above")
    parser.add_argument("--groups", metavar="NAME", nargs="+", help="measure only these groups of it; not kept")
    parser.add_argument("--limit", metavar="N", type=int, help="ask at most N questions of each kind of each group")
    parser.add_argument(
        "--output", type=json_file, metavar="FILE.json", help="write the result as JSON to this file, too"
    )
    parser.add_argument("--questions", metavar="FILE", help="ask these in place of a benchmark, a JSON object a line")
    parser.add_argument("--root", metavar="FOLDER", help="where the files of --questions start (default its folder)")
    parser.add_argument("--answers", metavar="FILE", help="gets the answers to --questions, a JSON object a line")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help=f"of these answers (default {MAX_NEW_TOKENS})")
    parser.add_argument("--scoring", choices=SCORINGS, help="how --answers are compared with what is true, see above")
    parser.add_argument(
        "--mesh", metavar="AXIS=N", nargs="+", default=[], help="how devices share the work: fsdp=4 ..."
    )
    parser.add_argument(
        "--mos", metavar="MODULE:FUNCTION", help="of copies: judges them, too; (samples, rate) -> number"
    )
    add_int8(parser)
    parser.add_argument("--shots", metavar="N", nargs="+", type=int, help="of a Flamingo: demonstrations of a prompt")
    parser.add_argument("--choice", choices=("random", "similar"), help="of a Flamingo: which demonstrations")
    return parser


def evaluate(arguments: argparse.Namespace) -> int:
    """Finds out what is to be measured, and has it done."""
    # Imported here so that --help and a mistyped argument answer at once.
    from vita_jax.evaluation.benchmarks.speech import SPEECH
    from vita_jax.evaluation.library import COPIES, find_set
    from vita_jax.evaluation.sets import SETS

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be at least 1")
    if arguments.questions is not None or arguments.answers is not None:
        return answer_questions(arguments)
    for name in ("root", "scoring", "max_new_tokens"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} belongs to --questions; benchmarks know their own")
    if arguments.mos is not None and arguments.benchmark != COPIES:
        raise UserError("--mos belongs to --benchmark copies")
    chosen = None if arguments.benchmark is None else find_set(arguments.benchmark)
    if chosen is not None:
        return evaluate_with_lmms_eval(arguments, chosen)
    if arguments.benchmark in SETS:
        return evaluate_set(arguments)
    if arguments.benchmark == COPIES:
        return evaluate_copies(arguments)
    if arguments.benchmark == SPEECH.name and arguments.data is not None:
        return evaluate_spoken_texts(arguments)
    if arguments.mesh:
        raise UserError("--mesh is for questions, and for benchmarks that are no part of a run; leave it out")
    return evaluate_run(arguments)


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Measures a model on the data of its run: loads, asks, prints, saves."""
    import dataclasses

    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.evaluation.comparison import changes_again
    from vita_jax.evaluation.opening import identity
    from vita_jax.evaluation.results import (
        FINAL,
        FIRST,
        evaluation_path,
        format_result,
        format_stages,
        provenance,
        save_stage_evaluation,
        save_with_lines,
    )
    from vita_jax.evaluation.runner import evaluate_params
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.parallel.process import prepare_process
    from vita_jax.training.checkpoint import CONFIG, load_params
    from vita_jax.training.families import family_of

    output = None if arguments.output is None else place(arguments.output)
    int8 = int8_parts(arguments.int8)
    prepare_process()
    loaded = load_params(arguments.checkpoint, change=int8.change)
    # A run may have been moved since; where it is now is what counts.
    config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
    print(f"checkpoint {loaded.path} (stage {loaded.stage}, step {loaded.step})", flush=True)
    is_run = (place(arguments.checkpoint) / CONFIG).is_file()
    if family_of(config.model).in_context:
        int8.check(config)
        if arguments.benchmark is not None:
            raise UserError(
                f"--benchmark {arguments.benchmark}: a Flamingo is measured by its few-shot tasks; leave it out"
            )
        return evaluate_by_shots(arguments, config, loaded, is_run, output)
    for name in ("shots", "choice", "data"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is for a Flamingo; this is a {family_of(config.model).title}")
    is_kept = is_run and arguments.limit is None and arguments.groups is None and not arguments.int8
    home = evaluation_path(loaded.run_dir, FINAL, arguments.benchmark or FIRST) if is_kept else output
    result = evaluate_params(
        config,
        loaded.params,
        load_tokenizer(loaded.run_dir / "tokenizer"),
        benchmark=arguments.benchmark or FIRST,
        groups=arguments.groups,
        limit=arguments.limit,
        progress=progress_line("answered"),
        keep_sounds=is_kept,
        cache_dtype=int8.cache_dtype,
        kept=_kept_beside(home, config.name),
        identity=identity(loaded, arguments.int8),
    )
    result |= provenance(config)
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
    if output is not None:
        save_with_lines(result, output)
        print(f"written: {output}")
    return 0


def _kept_beside(result: Path | None, model_name: str) -> KeptAnswers | None:
    """The answers that are kept beside a result; None where nothing is written, or in a bucket, where no file grows.

    Args:
      result: its file.
      model_name: whose; of a run that of its config, which it keeps wherever it is moved.

    Raises:
      UserError: as `KeptAnswers`.
    """
    from vita_jax.evaluation.asking import KeptAnswers, answers_file

    return (
        None if result is None or is_remote(result) else KeptAnswers(answers_file(result.with_suffix("")), model_name)
    )


def answer_questions(arguments: argparse.Namespace) -> int:
    """Asks what a file asks, writes down the answers, and scores them if that is wanted."""
    from vita_jax.data.json_lines import write_json_lines
    from vita_jax.evaluation.answer_lines import read_questions
    from vita_jax.evaluation.asking import KeptAnswers, answers_file, ask_questions, check_answers, check_files

    if arguments.questions is None or arguments.answers is None:
        raise UserError("--questions and --answers go together: what is asked, and where the answers go")
    for name in ("benchmark", "mos", "groups", "output", "shots", "choice", "data"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} belongs to benchmarks; leave it out with --questions")
    answers = on_disk(arguments.answers, "the file of --answers")
    if arguments.scoring is not None and answers.suffix != ".jsonl":
        raise UserError(f"--answers {answers}: with --scoring its name must end with .jsonl, beside a .json")
    file = on_disk(arguments.questions, "the file of --questions")
    questions = read_questions(file)[: arguments.limit]
    root = file.parent if arguments.root is None else on_disk(arguments.root, "the folder of --root")
    check_files(questions, root)
    check_answers(answers, arguments.checkpoint)
    longest = MAX_NEW_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens
    stem = answers.with_suffix("")
    if arguments.scoring is not None:
        return _measure(arguments, file.stem, questions, root, arguments.scoring, stem, longest)
    kept = KeptAnswers(answers_file(stem), arguments.checkpoint)
    subject, options = _open(arguments, len(questions), longest)
    lines = ask_questions(subject, questions, root, kept, options, progress_line("answered"))
    write_json_lines(answers, lines)
    print(f"written: {answers} ({len(lines)} answers)")
    return 0


def evaluate_set(arguments: argparse.Namespace) -> int:
    """Measures a published set that is read from a folder."""
    from vita_jax.evaluation.sets import SETS, evenly

    chosen = SETS[arguments.benchmark]
    for name in ("groups", "shots", "choice"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is not for the benchmark {arguments.benchmark}")
    if arguments.data is None:
        raise UserError(f"--benchmark {arguments.benchmark} reads a folder: --data FOLDER (docs/evaluation.md)")
    stem = _stem(arguments)
    questions, root = chosen.read(on_disk(arguments.data, "the folder of --data"))
    if arguments.limit is not None:
        questions = evenly(questions, arguments.limit)
    longest = chosen.max_new_tokens
    return _measure(arguments, chosen.title, questions, root, chosen.scoring, stem, longest, chosen.column)


def evaluate_copies(arguments: argparse.Namespace) -> int:
    """Measures the copies that a model's codec makes of a folder of sounds."""
    from vita_jax.evaluation.asking import KeptAnswers, answers_file
    from vita_jax.evaluation.copies import format_copies, load_mos, measure_copies
    from vita_jax.evaluation.measured import write_measured
    from vita_jax.evaluation.results import provenance

    for name in ("groups", "shots", "choice", "limit"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is not for the benchmark copies")
    if arguments.data is None or arguments.int8 or arguments.mesh:
        raise UserError("--benchmark copies reads a folder, on one device and in floats: --data FOLDER and no more")
    stem, mos = _stem(arguments), None if arguments.mos is None else load_mos(arguments.mos)
    folder = on_disk(arguments.data, "the folder of --data")
    kept = KeptAnswers(answers_file(stem), arguments.checkpoint)
    subject, options = _open(arguments, 1, 1)
    identity = f"{options.identity} {arguments.mos}"
    result, lines = measure_copies(subject, folder, kept, identity, mos, progress_line("copied"))
    result = {"benchmark": arguments.benchmark, "model": arguments.checkpoint, **result, **provenance(subject.config)}
    print(format_copies(result))
    print(f"\nwritten: {', '.join(map(str, write_measured(stem, result, lines, None)))}")
    return 0


def evaluate_spoken_texts(arguments: argparse.Namespace) -> int:
    """Measures what a model says of texts in a folder, and how long everything that sounds takes."""
    from vita_jax.evaluation.asking import KeptAnswers, answers_file
    from vita_jax.evaluation.measured import write_measured
    from vita_jax.evaluation.spoken_texts import NAME, format_spoken_texts, measure_spoken_texts

    for name in ("groups", "shots", "choice"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is not for texts of a folder (--data)")
    if arguments.int8 or arguments.mesh:
        raise UserError("texts of a folder (--data) are said on one device and in floats; leave out --int8 and --mesh")
    folder = on_disk(arguments.data, "the folder of --data")
    arguments.benchmark = NAME
    stem = _stem(arguments)
    kept = KeptAnswers(answers_file(stem), arguments.checkpoint)
    subject, options = _open(arguments, SPOKEN_AT_ONCE, MAX_NEW_TOKENS)
    sounds = stem.with_name(stem.name + ".sounds")
    progress = progress_line("said")
    result, lines = measure_spoken_texts(subject, folder, sounds, kept, options, arguments.limit, progress)
    result = {"benchmark": NAME, **result, "limit": arguments.limit}
    print(format_spoken_texts(result))
    print(f"\nwritten: {', '.join(map(str, [*write_measured(stem, result, lines, None), sounds]))}")
    return 0


def evaluate_with_lmms_eval(arguments: argparse.Namespace, chosen: LmmsSet) -> int:
    """Measures a set that lmms-eval has, by its command line."""
    from vita_jax.evaluation.library import ANY_TASK
    from vita_jax.evaluation.lmms.command import format_lmms, run_lmms_eval
    from vita_jax.evaluation.measured import write_measured

    for name in ("groups", "shots", "choice"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is not for benchmarks of lmms-eval")
    if arguments.data is not None:
        if not arguments.benchmark.startswith(ANY_TASK):
            raise UserError(
                f"--data {arguments.data}: {arguments.benchmark} is read from where lmms-eval looks for it (HF_HOME), "
                f"not from a folder; for a copy of yours put a task file there that includes lmms-eval's with another "
                f"dataset_path (docs/evaluation.md), and give {ANY_TASK}TASK as the benchmark"
            )
        if not on_disk(arguments.data, "a folder with tasks").is_dir():
            raise UserError(f"--data {arguments.data} is no folder; it has the task files of {arguments.benchmark}")
    stem = _stem(arguments)
    result, lines = run_lmms_eval(
        chosen,
        arguments.checkpoint,
        stem,
        include_path=arguments.data,
        limit=arguments.limit,
        int8=arguments.int8,
        mesh=arguments.mesh,
    )
    result = {"benchmark": arguments.benchmark, **result}
    print(format_lmms(result))
    written = write_measured(stem, result, lines, chosen.column)
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _stem(arguments: argparse.Namespace) -> Path:
    """Where the files of a result go, without a suffix. Raises UserError where nobody knows."""
    from vita_jax.evaluation.results import FINAL, evaluation_path
    from vita_jax.training.checkpoint import CONFIG

    if arguments.output is not None:
        return on_disk(arguments.output, "the result of this benchmark").with_suffix("")
    if not (place(arguments.checkpoint) / CONFIG).is_file():
        raise UserError(f"{arguments.checkpoint} is no run that keeps its results; say where by --output FILE.json")
    if is_remote(arguments.checkpoint):
        raise UserError(
            f"{arguments.checkpoint} is in a bucket, where answers cannot be kept as they are made; say where on a "
            "disk results go by --output FILE.json"
        )
    parts = [re.sub(r"[^\w-]", "_", arguments.benchmark), *(f"int8_{part}" for part in sorted(arguments.int8))]
    parts += [] if arguments.limit is None else [f"limit_{arguments.limit}"]
    path = evaluation_path(arguments.checkpoint, FINAL, ".".join(parts))
    return path.with_name(path.name.removesuffix(".json"))


def _open(arguments: argparse.Namespace, num_questions: int, max_new_tokens: int) -> tuple[Subject, AskOptions]:
    """The model, over all devices, and how it is asked."""
    from vita_jax.evaluation.asking import AskOptions
    from vita_jax.evaluation.opening import BATCH_SIZE, identity, mesh_config, open_subject
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.parallel.process import prepare_process

    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    int8, mesh = int8_parts(arguments.int8), mesh_config(arguments.mesh)
    prepare_process()
    size = max(1, min(BATCH_SIZE, num_questions))
    subject, loaded = open_subject(arguments.checkpoint, mesh=mesh, quantization=int8, batch_size=size)
    model = identity(loaded, arguments.int8)
    return subject, AskOptions(max_new_tokens, cache_dtype=int8.cache_dtype, identity=model)


def _measure(
    arguments: argparse.Namespace,
    title: str,
    questions: Sequence[Question],
    root: Path,
    scoring: Scoring,
    stem: Path,
    max_new_tokens: int,
    column: str | None = None,
) -> int:
    """Asks, scores, prints, and writes the files of the result."""
    from vita_jax.evaluation.asking import KeptAnswers, answers_file
    from vita_jax.evaluation.measured import format_measured, measure, write_measured
    from vita_jax.evaluation.question_scores import check_questions

    check_questions(questions, scoring)
    kept = KeptAnswers(answers_file(stem), arguments.checkpoint)
    subject, options = _open(arguments, len(questions), max_new_tokens)
    if scoring == "state" and (subject.context.template.state_symbols is None or not _says_states(subject)):
        raise UserError("this model's answers begin with no state symbol, so that they do not tell queries from noise")
    result, lines = measure(subject, title, questions, root, scoring, kept, options, progress_line("answered"))
    result = {"benchmark": arguments.benchmark or "questions", **result, "limit": arguments.limit}
    print(format_measured(result))
    written = write_measured(stem, result, lines, column)
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _says_states(subject: Subject) -> bool:
    """Whether the model was trained with a state symbol in front of its answers."""
    return getattr(subject.config.prompt, "state_symbols", False)


def evaluate_by_shots(
    arguments: argparse.Namespace, config: ExperimentConfig, loaded: LoadedModel, is_run: bool, output: Path | None
) -> int:
    """Measures a Flamingo, prints, saves."""
    import dataclasses

    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.evaluation.few_shot import RESULT, evaluate_few_shot, format_few_shot, subject_of
    from vita_jax.evaluation.measured import few_shot_figures, write_pictures
    from vita_jax.evaluation.opening import identity
    from vita_jax.evaluation.results import provenance, save_with_lines

    changes = {"shots": tuple(arguments.shots)} if arguments.shots else {}
    changes |= {"choice": arguments.choice} if arguments.choice else {}
    folder = None if arguments.data is None else on_disk(arguments.data, "the folder of --data")
    tokenizer = load_tokenizer(place(config.run_dir) / "tokenizer")
    is_kept = is_run and folder is None and arguments.limit is None and arguments.groups is None
    home = place(config.run_dir) / "evaluation" / RESULT if is_kept else output
    result, lines = evaluate_few_shot(
        subject_of(config, loaded.params, tokenizer, folder),
        dataclasses.replace(config.few_shot, **changes),
        tasks=arguments.groups,
        limit=arguments.limit,
        progress=progress_line("answered"),
        kept=_kept_beside(home, config.name),
        identity=identity(loaded, ()),
    )
    result |= {**provenance(config), "limit": arguments.limit, "lines": lines}
    print(format_few_shot(result))
    own = few_shot_figures(result, config.name)
    for file in dict.fromkeys(path for path in (home, output) if path is not None):
        save_with_lines(result, file)
        pictures = write_pictures(file.with_suffix(""), {"title": "few-shot tasks", **result}, own)
        print(f"written: {', '.join(map(str, (file, file.with_suffix('.jsonl'), *pictures)))}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(evaluate, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
