"""`python -m vita_jax.chat --checkpoint DIR`: show a model pictures or videos and ask it about them, or speak to it."""

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
Without --text it asks for questions until /quit or the end of input; --image, --video and --audio then belong to the
first one. Sound alone is a spoken question: it is answered at once.

examples:
  python -m vita_jax.chat
  python -m vita_jax.chat --checkpoint runs/quickstart --image digits.png --text "What is the largest digit?"
  python -m vita_jax.chat --video clip.mp4 --text "In which order do the digits appear?"
  python -m vita_jax.chat --checkpoint runs/quickstart --image first.png second.png
  python -m vita_jax.chat --image digits.png --audio question.wav
  python -m vita_jax.chat --audio sentence.wav --text "Write down what is said."
"""

COMMANDS = (
    "/image FILE  /video FILE  (for the next question)   /audio FILE  (ask aloud)   /reset  (new conversation)   /quit"
)
KINDS = ("image", "video", "audio")
# Printed where the model says nothing because it takes the sound not to be meant for it.
NOT_MEANT = "(not meant for me)"


HELP = {
    "image": "image to ask about",
    "video": "video to ask about",
    "audio": "sound file: the question, or with --text what it is about",
}


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m vita_jax.chat", description="Talks with a trained model.", epilog=EXAMPLES)
    parser.add_argument(
        "--checkpoint", metavar="DIR", default="runs/quickstart", help="a run or a checkpoint; default runs/quickstart"
    )
    parser.add_argument("--text", help="ask this one question, print the answer and stop")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="FILE", nargs="+", action="extend", default=[], help=HELP[kind])
    return parser


def chat(arguments: argparse.Namespace) -> int:
    """Loads the model, then answers the one question, or questions until the end of input."""
    # Imported here so that --help and a mistyped argument answer at once.
    from vita_jax.data.examples import media_from_file
    from vita_jax.inference.session import Session
    from vita_jax.parallel.mesh import enable_compilation_cache

    for kind in KINDS:
        for path in getattr(arguments, kind):
            media_from_file(path, kind)
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("--text is empty; write a question")
    enable_compilation_cache()
    session = Session.load(arguments.checkpoint)
    attached = Attached(arguments.image, arguments.video)
    if arguments.text is not None:
        answer(session, arguments.text, attached, arguments.audio)
    elif arguments.audio:
        answer(session, "", attached, arguments.audio)
    else:
        converse(session, attached)
    return 0


@dataclasses.dataclass
class Attached:
    """Files that go with the next question."""

    images: list[str] = dataclasses.field(default_factory=list)
    videos: list[str] = dataclasses.field(default_factory=list)


def answer(session: Session, question: str, attached: Attached, audio: Sequence[str] = ()) -> None:
    """Prints the answer as it is produced; an empty question is asked by the sound."""
    for text in session.ask(question, attached.images, attached.videos, audio):
        print(text, end="", flush=True)
    print(NOT_MEANT if audio and session.last_state == "noise" else "")


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


def ask_with(session: Session, question: str, attached: Attached, audio: Sequence[str] = ()) -> None:
    """`answer`, after which the attached files are used up, whatever happens."""
    given = Attached(list(attached.images), list(attached.videos))
    attached.images.clear()
    attached.videos.clear()
    answer(session, question, given, audio)


def respond(session: Session, line: str, attached: Attached) -> Attached:
    """Does what one line asks for. Returns the files that the next question brings along.

    Raises:
      UserError: an unknown command, or a file that cannot be used; a question with a bad file drops its files.
    """
    from vita_jax.data.examples import media_from_file, media_tiles

    if not line:
        return attached
    if not line.startswith("/"):
        ask_with(session, line, attached)
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
    elif command == "/audio":
        if not path:
            raise UserError(f"{command} needs a file: {command} FILE")
        ask_with(session, "", attached, [path])
        attached = Attached()
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
