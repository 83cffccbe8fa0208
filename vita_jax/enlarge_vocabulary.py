"""`python -m vita_jax.enlarge_vocabulary`: new pieces for a tokenizer, and rows for them in its language model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

if TYPE_CHECKING:
    from vita_jax.data.vocabulary import Enlargement, TokenCount

EXAMPLES = """\
The new pieces are learnt from text (--texts), or taken from a sentencepiece model (--pieces-from), or there are none
beside --symbols. They come behind all old ones, which keep their ids. Each starts as the mean of the old pieces it
was spelt with, in the embedding table and in the output head. DIR is a run, a stage's folder or one checkpoint; the
new folder is a run of its own. A stage trains it further with

  Stage(..., start_from="runs/enlarged"), TokenizerConfig(vocab_size=..., folder="runs/enlarged/tokenizer")

and the model's `language.vocab_size` that is printed. Tokens per character are measured on --measure, or on every
tenth line of --texts, which is then not learnt from. One tensor at a time is in memory.

examples:
  python -m vita_jax.enlarge_vocabulary --checkpoint runs/base --to runs/enlarged --texts chinese.txt --pieces 20000
  python -m vita_jax.enlarge_vocabulary --checkpoint runs/base --to runs/enlarged \\
      --pieces-from chinese.model --measure news_zh.txt news_en.txt --symbols "<1>" "<2>" "<3>"
  python -m vita_jax.enlarge_vocabulary --checkpoint runs/public/llama_7b --to runs/public/llama_7b_flamingo \\
      --symbols "<|endofchunk|>" "<image>" "<PAD>" --multiple-of 1
"""
HELD_OUT_EVERY = 10


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m vita_jax.enlarge_vocabulary",
        description="Adds pieces, Chinese ones unless told otherwise, to the vocabulary of a model.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="the model to enlarge")
    parser.add_argument("--to", metavar="DIR", required=True, help="new folder for the enlarged model")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--texts", metavar="FILE", nargs="+", help="learn pieces from these UTF-8 files, line by line")
    source.add_argument("--pieces-from", metavar="FILE", help="take the pieces of this sentencepiece model")
    parser.add_argument("--pieces", metavar="N", type=int, help="at most N new pieces (needed with --texts)")
    parser.add_argument("--symbols", metavar="S", nargs="+", default=[], help="special tokens to add as well")
    parser.add_argument("--script", default="han", help="what pieces are made of: han (default) or any")
    parser.add_argument("--measure", metavar="FILE", nargs="+", help="UTF-8 files to count tokens per character on")
    parser.add_argument(
        "--initialisation", metavar="HOW", default="pieces", help="of new rows: pieces (default), average or random"
    )
    parser.add_argument("--multiple-of", metavar="N", type=int, default=16, help="round rows up; default 16")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="for random rows; default 0")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for what can be told wrong before anything is read."""
    from vita_jax.data.vocabulary import script_of
    from vita_jax.models.language.vocabulary import INITIALISATIONS, padded_rows
    from vita_jax.training.portable import check_new_folder

    if not (arguments.texts or arguments.pieces_from or arguments.symbols):
        raise UserError("there is nothing to add; give --texts, --pieces-from or --symbols")
    if arguments.pieces is not None and not (arguments.texts or arguments.pieces_from):
        raise UserError("--pieces says how many of --texts or --pieces-from to take; give one of them, too")
    if arguments.pieces is None and arguments.texts:
        raise UserError("--texts needs --pieces N: how many new pieces to learn")
    if arguments.pieces is not None and arguments.pieces < 1:
        raise UserError(f"--pieces {arguments.pieces} must be at least 1")
    if arguments.pieces_from and not arguments.measure:
        raise UserError("--pieces-from needs --measure FILE: text to count tokens per character on")
    if arguments.initialisation not in INITIALISATIONS:
        raise UserError(
            f"--initialisation {arguments.initialisation!r} is unknown; expected one of {', '.join(INITIALISATIONS)}"
        )
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} must not be negative")
    script_of(arguments.script)
    padded_rows(1, arguments.multiple_of)
    check_new_folder(arguments.to)


def read_texts(arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """Lines to learn from, and lines to measure on by name."""
    from vita_jax.data.vocabulary import read_lines

    lines = [line for path in arguments.texts or () for line in read_lines(path)]
    if arguments.measure:
        return lines, {path: read_lines(path) for path in arguments.measure}
    if not arguments.texts:
        return [], {}
    if len(lines) < 2 * HELD_OUT_EVERY:
        raise UserError(
            f"--texts has {len(lines)} lines, too few to keep some back for counting tokens; "
            f"give at least {2 * HELD_OUT_EVERY}, or --measure FILE"
        )
    kept = [line for number, line in enumerate(lines) if number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return kept, {"lines kept back": lines[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]}


def enlarge_vocabulary(arguments: argparse.Namespace) -> int:
    """Learns or takes pieces, enlarges tokenizer and model, writes them, prints what it brought."""
    # Imported here so that --help and a mistyped argument answer at once.
    from vita_jax.data.tokenizer import load_tokenizer
    from vita_jax.data.vocabulary import count_tokens, enlarge, pieces_of_model, train_pieces
    from vita_jax.exchange.enlarging import enlarge_stored
    from vita_jax.exchange.exporting import open_checkpoint
    from vita_jax.models.language.vocabulary import padded_rows
    from vita_jax.training.portable import TOKENIZER

    check_arguments(arguments)
    lines, measured = read_texts(arguments)
    stored = open_checkpoint(arguments.checkpoint, merge_adapters=False)
    print(f"checkpoint {stored.run_dir} (stage {stored.stage}, step {stored.step})", flush=True)
    old = load_tokenizer(stored.run_dir / TOKENIZER)
    if arguments.texts:
        candidates = train_pieces(lines, arguments.pieces, old, arguments.script)
    elif arguments.pieces_from is None:
        candidates = []
    else:
        candidates = pieces_of_model(read_model_file(arguments.pieces_from), arguments.pieces_from, arguments.script)
    grown = enlarge(old, candidates, arguments.symbols, arguments.pieces)
    # Before anything is written, because counting also checks the texts.
    counts = {
        name: tuple(count_tokens(tokenizer, texts) for tokenizer in (old, grown.tokenizer))
        for name, texts in measured.items()
    }
    before = stored.config.model.language.vocab_size
    rows = padded_rows(grown.tokenizer.vocab_size, arguments.multiple_of, at_least=before)
    written = enlarge_stored(
        stored, grown, arguments.to, rows=rows, initialisation=arguments.initialisation, seed=arguments.seed
    )
    print(format_result(grown, counts))
    print(f"model.language.vocab_size: {before} -> {rows} rows\nwritten: {written}")
    return 0


def read_model_file(path: str) -> bytes:
    """Content of a file. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"--pieces-from {path} cannot be read: {error.strerror}") from None


def format_result(grown: Enlargement, counts: dict[str, tuple[TokenCount, TokenCount]]) -> str:
    """What was added, and tokens per character before and after, as text."""
    notes = [f"{grown.known} candidates were there before"]
    if grown.unreachable:
        notes.append(f"{len(grown.unreachable)} left out, such as {grown.unreachable[0]!r}: no two pieces give them")
    size = grown.tokenizer.vocab_size
    lines = [f"tokenizer: {grown.first_id} -> {size} entries ({'; '.join(notes)})"]
    if not counts:
        return lines[0]
    rows = [("text", "characters", "tokens before", "after", "per character before", "after")]
    for name, (before, after) in counts.items():
        sizes = (f"{before.characters:,}", f"{before.tokens:,}", f"{after.tokens:,}")
        rows.append((name, *sizes, f"{before.per_character:.3f}", f"{after.per_character:.3f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(enlarge_vocabulary, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
