"""What the commands share: arguments whose mistakes are one clear line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from vita_jax.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Shows its description and examples as they were written, takes no abbreviations, and raises `UserError`."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad arguments."""
        raise UserError(f"{message}; see --help")


def run_command(
    command: Callable[[argparse.Namespace], int], parser: ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parses and runs; returns the exit status: what `command` returns, 2 for bad input, 130 when interrupted."""
    try:
        return command(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
