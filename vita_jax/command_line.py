"""What the commands share: arguments whose mistakes are one clear line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TextIO

from vita_jax.config import ConfigArgs, parse_config_args
from vita_jax.errors import AGAIN, TryAgain, UserError


class ArgumentParser(argparse.ArgumentParser):
    """Shows its description and examples as they were written, takes no abbreviations, and raises `UserError`."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad arguments."""
        raise UserError(f"{message}; see --help")


def add_int8(parser: argparse.ArgumentParser) -> None:
    """Adds --int8 to a command that opens a model for inference; see `vita_jax.inference.quantization`."""
    parser.add_argument(
        "--int8",
        choices=("weights", "cache"),
        nargs="+",
        default=[],
        help="keep the language model's weights, its key/value cache or both in int8 (docs/talking.md)",
    )


def json_file(text: str) -> str:
    """The type of an argument that names a result, whose lines, table and picture go beside it by other endings."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text}: its name must end with .json; other files go beside it")
    return text


class ProgressLine:
    """Done, total and the time that is left, on one line of a terminal that is rewritten in place."""

    def __init__(self, verb: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb, self._stream, self._clock = verb, stream, clock
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Shows it; what was done before the first call says nothing about the speed."""
        now = self._clock()
        self._first = self._first or (done, now)
        before, started = self._first
        left = ""
        if done > before:
            seconds = (total - done) * (now - started) / (done - before)
            left = f", {seconds / 60:.0f} min left" if seconds >= 120 else f", {seconds:.0f} s left"
        end = "\r\x1b[2K" if done == total else ""
        print(f"\r\x1b[2K{self._verb} {done} of {total}{left}{end}", end="", file=self._stream, flush=True)


def progress_line(verb: str) -> ProgressLine | None:
    """One on the standard error; None where that is no terminal."""
    return ProgressLine(verb, sys.stderr) if sys.stderr.isatty() else None


def exit_status(action: Callable[[], int]) -> int:
    """Runs `action`; returns what it returns, 2 for bad input, `errors.AGAIN` for what may go well another time (one
    line on stderr for both), 130 when interrupted, 141 when nobody reads the output any more.
    """
    try:
        status = action()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TryAgain as error:
        print(f"error: {error}", file=sys.stderr)
        return AGAIN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads the output has seen enough, as in `... | head`; Python would fail again at its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run_with_config(command: Callable[[ConfigArgs], int], usage: str, argv: Sequence[str] | None) -> int:
    """Runs a command whose arguments are fields of a configuration; returns the exit status, see `exit_status`.

    Args:
      command: gets what the command line says.
      usage: printed for --help.
      argv: None = those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(usage)
        return 0
    return exit_status(lambda: command(parse_config_args(argv)))


def options_of(rest: Sequence[str], defaults: Mapping[str, str]) -> dict[str, str]:
    """The options `--name=value` of a command that takes a configuration.

    Args:
      rest: arguments that are no fields of it.
      defaults: all options and their values where they are not given.

    Raises:
      UserError: another option, or one without its value.
    """
    options = dict(defaults)
    for argument in rest:
        flag, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or flag not in options or not equals or not value:
            raise UserError(f"unknown or incomplete argument {argument!r}; see --help")
        options[flag] = value
    return options


def whole_number(options: Mapping[str, str], name: str, least: int) -> int:
    """An option's value. Raises UserError if it is no whole number of at least `least`."""
    if not options[name].isdecimal() or int(options[name]) < least:
        raise UserError(f"--{name}={options[name]} must be a whole number of at least {least}")
    return int(options[name])


def run_command(
    command: Callable[[argparse.Namespace], int], parser: ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parses and runs; returns the exit status, see `exit_status`."""
    return exit_status(lambda: command(parser.parse_args(argv)))
