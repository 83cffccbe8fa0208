"""`python -m vita_jax.chat --checkpoint DIR`: show a model pictures or videos and ask it about them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

if TYPE_CHECKING:
    from vita_jax.inference.session import Session

EXAMPLES = """\
Without --text it asks for questions until /quit or the end of input; --image and --video then belong to the first one.

examples:
  python -m vita_jax.chat
  python -m vita_jax.chat --checkpoint runs/quickstart --image digits.png --text "What is the largest digit?"
  python -m vita_jax.chat --video clip.mp4 --text "In which order do the digits appear?"
  python -m vita_jax.chat --checkpoint runs/quickstart --image first.png second.png
"""

COMMANDS = "/image FILE  /video FILE  (for the next question)   /reset  (new conversation)   /quit"


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m vita_jax.chat", description="Talks with a trained model.", epilog=EXAMPLES)
    parser.add_argument(
        "--checkpoint", metavar="DIR", default="runs/quickstart", help="a run or a checkpoint; default runs/quickstart"
    )
    parser.add_argument("--text", help="ask this one question, print the answer and stop")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}", metavar="FILE", nargs="+", action="extend", default=[], help=f"{kind} to ask about"
        )
    return parser


def chat(arguments: argparse.Namespace) -> int:
    """Loads the model, then answers the one question, or questions until the end of input."""
    # Imported here so that --help and a mistyped argument answer at once.
    from vita_jax.data.examples import media_from_file
    from vita_jax.inference.session import Session
    from vita_jax.parallel.mesh import enable_compilation_cache

    for kind in ("image", "video"):
        for path in getattr(arguments, kind):
            media_from_file(path, kind)
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("--text is empty; write a question")
    enable_compilation_cache()
    session = Session.load(arguments.checkpoint)
    if arguments.text is not None:
        answer(session, arguments.text, arguments.image, arguments.video)
    else:
        converse(session, Attached(arguments.image, arguments.video))
    return 0


def answer(session: Session, question: str, images: Sequence[str], videos: Sequence[str]) -> None:
    """Prints the answer as it is produced."""
    for text in session.ask(question, images, videos):
        print(text, end="", flush=True)
    print()


@dataclasses.dataclass
class Attached:
    """Files that go with the next question."""

    images: list[str] = dataclasses.field(default_factory=list)
    videos: list[str] = dataclasses.field(default_factory=list)


def converse(session: Session, attached: Attached) -> None:
    """Reads questions and commands from standard input until /quit or its end; a mistake costs one line."""
    prompt = "> " if sys.stdin.isatty() else ""
    print(COMMANDS)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            attached = respond(session, line, attached)
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(answer broken off; /quit to end)")


def respond(session: Session, line: str, attached: Attached) -> Attached:
    """Does what one line asks for. Returns the files that the next question brings along.

    Raises:
      UserError: an unknown command, or a file that cannot be used; a question with a bad file drops its files.
    """
    from vita_jax.data.examples import media_from_file, media_tiles

    if not line:
        return attached
    if not line.startswith("/"):
        images, videos = list(attached.images), list(attached.videos)
        attached.images.clear()
        attached.videos.clear()
        answer(session, line, images, videos)
        return Attached()
    command, _, argument = line.partition(" ")
    path = argument.strip()
    if command in ("/image", "/video"):
        kind = command[1:]
        if not path:
            raise UserError(f"{command} needs a file: {command} FILE")
        media_tiles(media_from_file(path, kind), session.context)
        (attached.images if kind == "image" else attached.videos).append(path)
        print(f"{kind} {path}: ask about it")
    elif command == "/reset":
        session.reset()
        attached = Attached()
        print("new conversation")
    else:
        raise UserError(f"unknown command {command}; {COMMANDS}")
    return attached


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(chat, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
