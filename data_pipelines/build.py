"""`python -m data_pipelines.build`: raw data to records for training, checked; and what is in them."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError
from vita_jax.storage import is_remote, on_disk

if TYPE_CHECKING:
    from data_pipelines.parts import Runner
    from data_pipelines.sources import RecordsFile
    from data_pipelines.tfds_source import TfdsSource

EXAMPLES = """\
examples:
  python -m data_pipelines.build records --json my.json --root my_media --output runs/my_data
  python -m data_pipelines.build records --json my.json --folders roots.json --output runs/my_data --shards 8
      roots.json: {"coco": "/data/coco", "clips": "clips"}   (relative roots start at the folder of roots.json)
  python -m data_pipelines.build records --json my.jsonl --root my_media --output runs/my_data --shards 64 \\
      --runner-option direct_running_mode=multi_processing --runner-option direct_num_workers=16
  python -m data_pipelines.build records --json my.jsonl --root /nfs/media --output /nfs/my_data --shards 512 \\
      --runner FlinkRunner --runner-option flink_master=host:8081 --runner-option parallelism=128
  python -m data_pipelines.build records --tfds coco_captions --data-dir tfds --output runs/captions
  python -m data_pipelines.build records --tfds tfds/mnist/3.0.1 --image image --answer label \\
      --question "Which digit is this?" --output runs/digits
  python -m data_pipelines.build records --json chats.jsonl --layout messages --output runs/chats
  python -m data_pipelines.build records --json pages.jsonl --root pictures --layout mmc4 --output runs/pages
  python -m data_pipelines.build records --json captions.jsonl --root pictures --layout pairs --output runs/captions
  python -m data_pipelines.build recordings --layout librispeech --from LibriSpeech/train-clean-100 --output runs/clean
  python -m data_pipelines.build recordings --tfds librispeech --split train_clean100 --output runs/clean
  python -m data_pipelines.build recordings --layout manifest --from list.jsonl --root sounds --output runs/mine
  python -m data_pipelines.build speak --json my.json --root my_media --fraction 0.5 --output spoken
  python -m data_pipelines.build records --json spoken/records.json --folders spoken/roots.json --output runs/my_data
  python -m data_pipelines.build join --json my.json --root my_media --tokenizer tokenizer --output joined.json
  python -m data_pipelines.build validate my.json --root my_media
  python -m data_pipelines.build stats runs/my_data --tokenizer runs/quickstart/tokenizer --page stats.html
  python -m data_pipelines.build stats runs/quickstart/data/raw/asr

my.json is a list of records like
  {"id": "1", "image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}
A document for Flamingo (--layout documents):
  {"id": "2", "document": ["Two animals.", {"image": "cat.png"}, "This is a cat.", {"video": "dog.mp4"}, "A dog runs."]}
"""
SHOWN_REJECTS = 20
CORPORA = ("manifest", "librispeech", "aishell")
RECORD_LAYOUTS = ("vita", "messages", "sharegpt", "alpaca")
DOCUMENT_LAYOUTS = ("documents", "tagged", "pairs", "mmc4")  # for Flamingo
# Options of `records` that belong to one kind of source, and what they are where they are not given.
OF_FILES = {"root": None, "folders": None, "layout": "vita", "ignore_fields": ""}
OF_SPOKEN_TFDS = {"split": "train", "data_dir": None, "audio": None, "answer": ""}
OF_TFDS = {**OF_SPOKEN_TFDS, "image": None, "question": ""}
# The same for `recordings`.
OF_LISTS = {"root": None, "layout": None}


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m data_pipelines.build", description=__doc__, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, description: str) -> ArgumentParser:
        return actions.add_parser(name, description=description, help=description, epilog=EXAMPLES)

    build = add("records", "Check a JSON file of conversations with its media, and write it for training.")
    given = build.add_mutually_exclusive_group(required=True)
    given.add_argument("--json", metavar="FILE", help="records, UTF-8: a list, or .jsonl, one a line")
    given.add_argument("--tfds", metavar="NAME", help="of TensorFlow Datasets: a name, or a prepared folder")
    build.add_argument("--image", metavar="FEATURE", help="of a tfds data set: the picture")
    build.add_argument("--question", default="", metavar="TEXT", help="asked of every element of a tfds data set")
    build.add_argument("--output", required=True, metavar="FOLDER", help="made, or replaced if it is an earlier build")
    build.add_argument("--shards", type=int, default=1, metavar="N", help="number of files (default 1)")
    build.set_defaults(run=build_folder)

    heard = add("recordings", "Check transcribed recordings, and write their manifest; files stay where they are.")
    given = heard.add_mutually_exclusive_group(required=True)
    given.add_argument("--from", dest="source", metavar="PATH", help="the manifest, or the top folder")
    given.add_argument("--tfds", metavar="NAME", help="of TensorFlow Datasets: a name, or a prepared folder")
    heard.add_argument("--layout", choices=CORPORA, help=f"of what is there: {', '.join(CORPORA)}")
    heard.add_argument("--root", metavar="FOLDER", help="where a manifest's paths start; default its own folder")
    heard.add_argument("--output", required=True, metavar="FOLDER", help="gets manifest.jsonl and rejects.jsonl")
    heard.set_defaults(run=build_recordings)

    speak = add("speak", "Speak a part of the written questions, and add sounds that are not for the model.")
    speak.add_argument("--json", required=True, metavar="FILE", help="list of records, UTF-8")
    speak.add_argument("--output", required=True, metavar="FOLDER", help="gets records.json, roots.json, media")
    speak.add_argument("--fraction", type=float, default=0.5, metavar="X", help="of the questions (default 0.5)")
    speak.add_argument("--negatives", type=float, default=0.0, metavar="X", help="sounds for each record (default 0)")
    speak.add_argument("--refusal", default="", metavar="TEXT", help="the answer to them")
    speak.add_argument("--statements", metavar="FILE", help="a line each: what people say in them, to others")
    speak.add_argument("--seed", type=int, default=0, metavar="N", help="of voices and choices (default 0)")
    speak.add_argument(
        "--synthesizer", metavar="MODULE:NAME", help="what makes a SpeechSynthesizer of yours; default espeak-ng"
    )
    speak.set_defaults(run=speak_questions)

    join = add("join", "Join short conversations to long ones, as the original packed its data.")
    join.add_argument("--json", required=True, metavar="FILE", help="records, UTF-8: a list, or .jsonl, one a line")
    join.add_argument("--output", required=True, metavar="FILE", help="the joined records; media stay where they are")
    join.add_argument("--tokenizer", required=True, metavar="FOLDER", help="counts tokens")
    join.add_argument("--max-tokens", type=int, default=6000, metavar="N", help="of a joined record (default 6000)")
    join.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (default 0)")
    join.set_defaults(run=join_records_file, layout="vita")

    check = add("validate", "Check a JSON file of conversations with its media, and write nothing.")
    check.add_argument("json", metavar="FILE", help="records, UTF-8: a list, or .jsonl, one a line")
    check.set_defaults(run=validate_file)
    for one in (build, check, speak, join):
        one.add_argument("--root", metavar="FOLDER", help="where media paths start; not needed for text")
        one.add_argument("--folders", metavar="FILE", help="JSON object {set: root folder} for records that name a set")
        one.add_argument("--ignore-fields", default="", metavar="A,B", help="fields outside of the format to skip")
    for one in (build, check, speak):
        layouts = RECORD_LAYOUTS if one is speak else (*RECORD_LAYOUTS, *DOCUMENT_LAYOUTS)
        one.add_argument("--layout", choices=layouts, default="vita", help=f"of the file: {', '.join(layouts)}")
    for one in (build, heard):
        one.add_argument("--split", default="train", help="of a tfds data set (default train)")
        one.add_argument("--data-dir", metavar="FOLDER", help="where tfds data sets lie")
        one.add_argument("--audio", metavar="FEATURE", help="of a tfds data set: the sound")
        one.add_argument("--answer", default="", metavar="FEATURE", help="of a tfds data set: what answers, or is said")
    for one in (build, check, heard, join):
        add_budget(one)
    for one in (build, heard, speak):
        add_runner(one)

    show = add("stats", "Durations, tokens, tiles and scripts of built records, or of a manifest of recordings.")
    show.add_argument("folder", metavar="FOLDER", help="written by `records`, or with a manifest.jsonl")
    show.add_argument("--tokenizer", metavar="FOLDER", help="counts tokens; without it only characters are counted")
    show.add_argument("--image-size", type=int, default=448, metavar="N", help="side of a tile (default 448)")
    show.add_argument("--max-tiles", type=int, default=12, metavar="N", help="of a picture (default 12)")
    show.add_argument("--limit", type=int, metavar="N", help="records to read, evenly spaced; default all")
    show.add_argument("--page", metavar="FILE", help="an HTML page with plots")
    show.set_defaults(run=show_stats)
    return parser


def add_budget(parser: argparse.ArgumentParser) -> None:
    """--max-bad-fraction."""
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, metavar="X", help="rejects allowed (default 0.01)"
    )


def add_runner(parser: argparse.ArgumentParser) -> None:
    """Who does the work, see `parts.Runner`."""
    parser.add_argument("--runner", default="DirectRunner", metavar="NAME", help="of Beam (default DirectRunner)")
    parser.add_argument(
        "--runner-option", action="append", default=[], metavar="KEY=VALUE", help="of the runner; may be repeated"
    )


def runner_of(arguments: argparse.Namespace) -> Runner:
    """What `add_runner` added."""
    from data_pipelines.parts import Runner

    return Runner(arguments.runner, tuple(arguments.runner_option))


class Line:
    """A line of progress on stderr, rewritten in place where that is a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Replaces the line."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _source(arguments: argparse.Namespace) -> RecordsFile:
    # Imported here, as below, so that --help and a mistyped argument answer at once.
    from data_pipelines.sources import RecordsFile
    from vita_jax.data.records import read_folders

    folders = read_folders(arguments.folders) if arguments.folders else None
    ignored = tuple(field for field in arguments.ignore_fields.split(",") if field)
    return RecordsFile(arguments.json, arguments.root, folders, ignored, arguments.layout)


def _tfds_source(arguments: argparse.Namespace) -> TfdsSource:
    from data_pipelines.tfds_source import TfdsSource

    return TfdsSource(arguments.tfds, **{name: getattr(arguments, name) for name in OF_TFDS})


def _refuse(arguments: argparse.Namespace, options: Mapping[str, str | None], given: str) -> None:
    """Raises UserError for an option of the kind of source that is not given."""
    for name, default in options.items():
        if getattr(arguments, name) != default:
            raise UserError(f"--{name.replace('_', '-')} says nothing beside {given}; leave it out")


def build_folder(arguments: argparse.Namespace) -> int:
    """`records`."""
    from data_pipelines.records import build_records
    from data_pipelines.rejects import REJECTS_NAME

    _refuse(arguments, *((OF_TFDS, "--json") if arguments.json else (OF_FILES, "--tfds")))
    with Line() as line:
        manifest = build_records(
            _source(arguments) if arguments.json else _tfds_source(arguments),
            arguments.output,
            max_bad_fraction=arguments.max_bad_fraction,
            shards=arguments.shards,
            runner=runner_of(arguments),
            progress=line.show,
            command=shlex.join(["python", "-m", "data_pipelines.build", *arguments.line]),
        )
    rejected = ", ".join(f"{reason}: {number}" for reason, number in manifest.rejects.items())
    more = f"; rejected {rejected} (see {arguments.output}/{REJECTS_NAME})" if rejected else ""
    print(f"{arguments.output}: {_counts(manifest.counts)}{more}")
    return 0


def build_recordings(arguments: argparse.Namespace) -> int:
    """`recordings`."""
    from data_pipelines.recordings import build_manifest

    corpus = _corpus(arguments)
    with Line() as line:
        options = {
            "max_bad_fraction": arguments.max_bad_fraction,
            "runner": runner_of(arguments),
            "progress": line.show,
        }
        found = build_manifest(corpus, arguments.output, **options)
    languages = ", ".join(f"{number} {language}" for language, number in found.languages.items())
    rejected = ", ".join(f"{reason}: {number}" for reason, number in found.rejects.items()) or "none"
    hours = f"{found.seconds / 3600:.2f} h"
    print(f"{arguments.output}: {found.count} recordings, {hours} ({languages}); rejected {rejected}")
    return 0


def _corpus(arguments: argparse.Namespace) -> Iterable[Any] | TfdsSource:
    """Where the recordings are."""
    if arguments.tfds is not None:
        from data_pipelines.tfds_source import TfdsSource

        _refuse(arguments, OF_LISTS, "--tfds")
        # What is asked says nothing to a recogniser, but a data set that is not known has to have it.
        fields = {name: getattr(arguments, name) for name in OF_SPOKEN_TFDS}
        return TfdsSource(arguments.tfds, **fields, question="Write down what you hear.")
    _refuse(arguments, OF_SPOKEN_TFDS, "--from")
    if arguments.layout is None:
        raise UserError(f"--from needs --layout: one of {', '.join(CORPORA)}")
    from data_pipelines.speech.manifests import read_corpus

    return read_corpus(arguments.source, arguments.layout, arguments.root)


def speak_questions(arguments: argparse.Namespace) -> int:
    """`speak`."""
    from data_pipelines.speech.synthesizer import Synthesizer
    from data_pipelines.spoken import SpeakOptions, speak_records

    options = SpeakOptions(
        arguments.fraction,
        arguments.negatives,
        arguments.refusal,
        _lines_of(arguments.statements) if arguments.statements else (),
        arguments.seed,
    )
    with Line() as line:
        counts = speak_records(
            _source(arguments),
            arguments.output,
            options,
            synthesizer=_named(arguments.synthesizer) if arguments.synthesizer else Synthesizer,
            runner=runner_of(arguments),
            progress=line.show,
        )
    print(f"{arguments.output}: {_counts(counts)}")
    return 0


def _named(place: str) -> Any:
    """What MODULE:NAME stands for."""
    module, colon, name = place.partition(":")
    if not module or not colon or not name:
        raise UserError(f"--synthesizer {place!r} must be MODULE:NAME, as in my_voices:Speaker")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--synthesizer {place}: {error}") from error


def _lines_of(path: str) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--statements {path} cannot be read: {error}") from None
    if not lines:
        raise UserError(f"--statements {path} has no lines")
    return lines


def join_records_file(arguments: argparse.Namespace) -> int:
    """`join`."""
    from data_pipelines.joined import join_file
    from vita_jax.data.tokenizer import load_tokenizer

    with Line() as line:
        counts = join_file(
            _source(arguments),
            arguments.output,
            load_tokenizer(arguments.tokenizer),
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
            max_bad_fraction=arguments.max_bad_fraction,
            progress=line.show,
        )
    print(f"{arguments.output}: {_counts(counts)}")
    return 0


def validate_file(arguments: argparse.Namespace) -> int:
    """`validate`; 2 if more records are rejected than a build would allow."""
    from data_pipelines.records import validate_records
    from data_pipelines.rejects import check_budget_bounds, within_budget

    check_budget_bounds(arguments.max_bad_fraction)

    with Line() as line:
        found = validate_records(_source(arguments), progress=line.show)
    for reject in found.rejects[:SHOWN_REJECTS]:
        print(json.dumps(reject, ensure_ascii=False))
    if len(found.rejects) > SHOWN_REJECTS:
        print(f"... and {len(found.rejects) - SHOWN_REJECTS} more")
    rejected = ", ".join(f"{reason}: {number}" for reason, number in found.categories.items()) or "none"
    print(f"{arguments.json}: {_counts(found.counts)}; rejected {rejected}")
    return 0 if within_budget(len(found.rejects), found.total, arguments.max_bad_fraction) else 2


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items())


def show_stats(arguments: argparse.Namespace) -> int:
    """`stats`."""
    from data_pipelines.stats import format_stats, gather, write_page
    from vita_jax.data.images import ImageConfig
    from vita_jax.data.tokenizer import load_tokenizer

    with Line() as line:
        stats = gather(
            arguments.folder,
            image=ImageConfig(image_size=arguments.image_size, max_tiles=arguments.max_tiles),
            tokenizer=load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None,
            limit=arguments.limit,
            progress=_now_and_then(line),
        )
    print(format_stats(stats))
    if arguments.page:
        write_page(stats, arguments.page, f"Data of {arguments.folder}")
        print(f"\npage: {arguments.page}")
    return 0


def _now_and_then(line: Line, every: int = 500) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            line.show(f"{done} of {total} records")

    return show


def build(arguments: argparse.Namespace) -> int:
    """Runs the chosen action."""
    for name, value in sorted(vars(arguments).items()):
        if isinstance(value, str) and is_remote(value):
            on_disk(value, f"what --{name.replace('_', '-')} names")
    return arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    line = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    parser.set_defaults(line=line)
    return run_command(build, parser, line)


if __name__ == "__main__":
    sys.exit(main())
