"""`python -m vita_jax.convert`: weights from and to the PyTorch world, and folders that hold a model by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vita_jax.command_line import ArgumentParser, run_command

EXAMPLES = """\
examples:
  python -m vita_jax.convert export --layout vita_jax --from runs/quickstart --to kept --dtype bfloat16
  python -m vita_jax.chat --checkpoint kept --text "1 + 2?"
"""
DTYPES = ("float32", "float16", "bfloat16")


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m vita_jax.convert",
        description="Carries weights between this package and PyTorch, bit for bit.",
        epilog=EXAMPLES,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = actions.add_parser("export", help="a run or checkpoint -> a folder", epilog=EXAMPLES)
    export.add_argument("--from", dest="source", metavar="CHECKPOINT", required=True, help="a run, or one checkpoint")
    export.add_argument("--to", dest="target", metavar="DIR", required=True, help="a new folder")
    export.add_argument("--dtype", choices=DTYPES, help="of matrices; default: as they are")
    export.set_defaults(run=export_checkpoint)
    return parser


def export_checkpoint(arguments: argparse.Namespace) -> int:
    """`export`: writes a folder that needs no run."""
    from vita_jax.training.checkpoint import load_params
    from vita_jax.training.portable import PortableModel, write_portable

    loaded = load_params(arguments.source)
    model = PortableModel(loaded.params, loaded.config, loaded.stage, loaded.step)
    files = write_portable(arguments.target, model, loaded.run_dir, arguments.dtype)
    size = sum((Path(arguments.target) / file).stat().st_size for file in files)
    print(f"{arguments.target}: {len(files)} files, {size / 1e6:.1f} MB; stage {loaded.stage}, step {loaded.step}")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Runs the chosen action."""
    return arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(convert, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
