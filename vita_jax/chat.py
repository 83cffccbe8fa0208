"""`python -m vita_jax.chat --checkpoint DIR`: show a model pictures or videos and ask it about them, or speak to it.

`--speak FILE` has it answer aloud. `--duplex` lets both speak at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vita_jax.command_line import ArgumentParser, add_int8, run_command
from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import restart_with_huge_pages

if TYPE_CHECKING:
    import numpy as np

    from vita_jax.inference.duplex_events import Event
    from vita_jax.inference.flamingo_session import FlamingoSession
    from vita_jax.inference.session import Session
    from vita_jax.inference.talk import Voice

EXAMPLES = """\
Without --text it asks for questions until /quit or the end of input; --image, --video, --audio and --speak then belong
to the first one. Sound alone is a spoken question: it is answered at once.

With --duplex it listens to the microphone all the time, also while it speaks, ignores what is not meant for it and
stops when it is asked something else; that needs the package sounddevice, and headphones. Files given by --audio are
heard in place of the microphone, one after another.

examples:
  python -m vita_jax.chat
  python -m vita_jax.chat --checkpoint runs/quickstart --image digits.png --text "What is the largest digit?"
  python -m vita_jax.chat --video clip.mp4 --text "In which order do the digits appear?"
  python -m vita_jax.chat --checkpoint runs/quickstart --image first.png second.png
  python -m vita_jax.chat --image digits.png --audio question.wav
  python -m vita_jax.chat --audio sentence.wav --text "Write down what is said."
  python -m vita_jax.chat --image digits.png --audio question.wav --speak reply.wav
  python -m vita_jax.chat --image digits.png --duplex
  python -m vita_jax.chat --image digits.png --duplex --audio first.wav second.wav --speak replies.wav
  python -m vita_jax.chat --checkpoint runs/vita_1_0 --text "What is a tensor?" --speak reply.wav --voice espeak
  python -m vita_jax.chat --checkpoint runs/quickstart_flamingo --image digits.png --text "What is the largest digit?"
"""

COMMANDS = (
    "/image FILE  /video FILE  (for the next question)   /audio FILE  (ask aloud)   "
    "/speak FILE  (the next answer as sound)   /reset  (new conversation)   /quit"
)
KINDS = ("image", "video", "audio")
VOICES = ("model", "espeak")
ESPEAK_VOICES = {"en": "en-us", "zh": "cmn"}
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
    parser.add_argument("--speak", metavar="FILE.wav", help="write the answer to this file as sound, too")
    parser.add_argument(
        "--voice",
        choices=VOICES,
        default=VOICES[0],
        help="what speaks: the model itself, or espeak-ng for models without a voice",
    )
    parser.add_argument("--duplex", action="store_true", help="both may speak at any time, see above")
    add_int8(parser)
    return parser


def chat(arguments: argparse.Namespace) -> int:
    """Loads the model, then answers the one question, or questions until the end of input."""
    # Imported here so that --help and a mistyped argument answer at once.
    from vita_jax.data.examples import media_from_file
    from vita_jax.parallel.process import prepare_process

    if arguments.speak is not None:
        check_sound_file(arguments.speak, "--speak")
    for kind in KINDS:
        for path in getattr(arguments, kind):
            media_from_file(path, kind)
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("--text is empty; write a question")
    if arguments.duplex:
        check_duplex(arguments)
    prepare_process()
    session = open_session(arguments)
    if arguments.duplex:
        converse_duplex(session, arguments)
        return 0
    if arguments.voice == "espeak":
        session.external = espeak_voice
    if arguments.speak is not None:
        check_voice(session)  # a model without a voice is refused before it answers
    attached = Attached(arguments.image, arguments.video, arguments.speak)
    if arguments.text is not None:
        answer(session, arguments.text, attached, arguments.audio)
    elif arguments.audio:
        answer(session, "", attached, arguments.audio)
    else:
        converse(session, attached)
    return 0


def open_session(arguments: argparse.Namespace) -> Session | FlamingoSession:
    """The model as somebody to talk to. Raises UserError as `Session.load`, and for what its family does not do."""
    from vita_jax.inference.flamingo_session import FlamingoSession
    from vita_jax.inference.quantization import int8_parts
    from vita_jax.inference.session import Session
    from vita_jax.training.checkpoint import load_params
    from vita_jax.training.families import family_of

    int8 = int8_parts(arguments.int8)
    loaded = load_params(arguments.checkpoint, change=int8.change)
    if family_of(loaded.config.model).in_context and not arguments.duplex:
        int8.check(loaded.config)
        return FlamingoSession.of(loaded)
    session = Session.of(loaded, num_rows=2 if arguments.duplex else 1, quantization=int8)
    if arguments.int8:
        print(session.memory)
    return session


def check_duplex(arguments: argparse.Namespace) -> None:
    """Raises UserError for arguments that say nothing to a duplex conversation, or without anything to listen to."""
    from vita_jax.inference.live import LIBRARY, has_sound_card

    for name, given in (("--text", arguments.text is not None), ("--video", bool(arguments.video))):
        if given:
            raise UserError(f"{name} does not go with --duplex; ask aloud, and show pictures by --image")
    if arguments.audio:
        return
    if arguments.speak is not None:
        raise UserError("--speak writes the answers to sound files; with --duplex give the questions by --audio, too")
    if not has_sound_card():
        raise UserError(
            f"--duplex listens to the microphone by the package {LIBRARY!r}, which is not installed: `pip install "
            f"{LIBRARY}`, or give sound files by --audio"
        )


def converse_duplex(session: Session, arguments: argparse.Namespace) -> None:
    """A conversation in which both may speak at any time, through the sound card or from files."""
    import time

    from vita_jax.data.audio import read_audio
    from vita_jax.inference.duplex import Duplex
    from vita_jax.inference.live import talk_from_files, talk_live
    from vita_jax.inference.scene_run import SimulatedClock

    if arguments.voice == "espeak":
        session.external = espeak_voice
    speaks = session.external is not None or (session.has("speech") and session.has("codec"))
    if arguments.speak is not None:
        check_voice(session)
    waves = [read_audio(path, session.config.audio) for path in arguments.audio]
    clock = SimulatedClock() if waves else time.monotonic
    duplex = Duplex.of(session, speak=speaks, clock=clock)
    for path in arguments.image:
        duplex.show(path)
    teller = Teller()
    if waves:
        talk_from_files(duplex, clock, waves, teller)
    else:
        print("listening; Ctrl-C ends")
        talk_live(duplex, teller)
    if arguments.speak is not None:
        write_replies(teller, arguments.speak)


class Teller:
    """Prints a duplex conversation line by line and keeps what was said aloud."""

    def __init__(self) -> None:
        self.samples: list[np.ndarray] = []
        self.rate = 0
        self._in_line = False

    def __call__(self, event: Event) -> None:
        from vita_jax.inference import duplex_events as events

        match event:
            case events.Ignored(state="noise"):
                self._line(NOT_MEANT)
            case events.Ignored(reason=reason) if reason:
                self._line(f"({reason})")
            case events.ResponseStarted():
                self._line("> ", end="")
            case events.TextDelta(text=text):
                print(text, end="", flush=True)
            case events.ResponseSent():
                self._line()
            case events.AudioDelta(samples=samples, sampling_rate=rate):
                self.samples.append(samples)
                self.rate = rate
            case events.ResponseDone(status=events.CANCELLED, heard=heard):
                self._line(f"(stopped; heard {heard.strip()!r})")

    def _line(self, text: str = "", end: str = "\n") -> None:
        if self._in_line:
            print()
        if text:
            print(text, end=end, flush=True)
        self._in_line = bool(text) and not end


def write_replies(teller: Teller, path: str) -> None:
    """Writes all that was said aloud to one WAV file and says so."""
    import numpy as np

    from vita_jax.inference.speak import write_wav

    if not teller.samples:
        print(f"nothing is said: {path} is not written")
        return
    samples = np.concatenate(teller.samples)
    write_wav(path, samples, teller.rate)
    print(f"spoken: {path} ({len(samples) / teller.rate:.1f} s)")


def espeak_voice(language: str) -> Voice:
    """espeak-ng as the voice of a model that has none. Raises UserError if it is not installed."""
    from data_pipelines.speech.synthesizer import Synthesizer
    from vita_jax.inference.talk import ExternalVoice

    synthesizer, name = Synthesizer(), ESPEAK_VOICES[language]
    return ExternalVoice(lambda text: synthesizer.speak(text, name))


def check_voice(session: Session) -> None:
    """Raises UserError if nothing can speak."""
    if session.external is None:
        session.speaker("en")
    else:
        session.external("en")


def check_sound_file(path: str, what: str) -> None:
    """Raises UserError, before any work is done, for a file that an answer cannot be written to."""
    file = Path(path)
    if file.suffix.lower() != ".wav":
        raise UserError(f"{what} {path}: answers are written as WAV; give the file a name that ends with .wav")
    if file.is_dir():
        raise UserError(f"{what} {path} cannot be written: it is a folder; name a file")
    if not file.absolute().parent.is_dir():
        raise UserError(
            f"{what} {path} cannot be written: there is no folder {file.parent}; make it, or choose another"
        )
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UserError(f"{what} {path} cannot be written: no permission; choose another file")


@dataclasses.dataclass
class Attached:
    """Files that go with the next question, and the file that its answer is spoken to."""

    images: list[str] = dataclasses.field(default_factory=list)
    videos: list[str] = dataclasses.field(default_factory=list)
    speak: str | None = None


def answer(session: Session, question: str, attached: Attached, audio: Sequence[str] = ()) -> None:
    """Prints the answer as it is produced, and speaks it if that is wanted; an empty question is asked by the sound."""
    pieces = []
    for text in session.ask(question, attached.images, attached.videos, audio):
        print(text, end="", flush=True)
        pieces.append(text)
    refused = bool(audio) and session.last_state == "noise"
    print(NOT_MEANT if refused else "")
    if attached.speak is None:
        return
    if refused:
        print(f"nothing is said: {attached.speak} is not written")
    else:
        reply = "".join(pieces)
        speak(session, reply, language_of_question(session, question, audio, reply), attached.speak)


def speak(session: Session, reply: str, language: str, path: str) -> None:
    """Writes the reply to a WAV file in the model's own voice and says so; where there is nothing to say, says that."""
    from vita_jax.inference.speak import write_wav

    samples, rate = session.say(reply, language)
    if not len(samples):
        reason = "the answer is empty" if not reply.strip() else "the voice made no sound of this answer"
        print(f"{reason}: {path} is not written")
        return
    write_wav(path, samples, rate)
    print(f"spoken: {path} ({len(samples) / rate:.1f} s)")


def language_of_question(session: Session, question: str, audio: Sequence[str], reply: str) -> str:
    """The language an answer is spoken in: that of the typed question; of a spoken one, what the model's recogniser
    hears; without a recogniser, or where it hears nothing, that of the answer.
    """
    from vita_jax.data.audio import read_audio
    from vita_jax.data.ctc_vocabulary import load_ctc_vocabulary
    from vita_jax.data.spoken_words import language_of
    from vita_jax.inference.transcription import transcribe

    if question.strip():
        return language_of(question)
    vocabulary = session.ctc_vocabulary_file
    if vocabulary is None:
        return language_of(reply)
    waves = [read_audio(path, session.config.audio) for path in audio]
    heard = "".join(transcribe(session.model, session.params, load_ctc_vocabulary(vocabulary), waves))
    return language_of(heard or reply)


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
    given = Attached(list(attached.images), list(attached.videos), attached.speak)
    attached.images.clear()
    attached.videos.clear()
    attached.speak = None
    answer(session, question, given, audio)


def respond(session: Session, line: str, attached: Attached) -> Attached:
    """Does what one line asks for. Returns the files that the next question brings along.

    Raises:
      UserError: an unknown command, a file that cannot be used, or a model without a voice; a question with a bad file
        drops its files.
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
    elif command == "/speak":
        if not path:
            raise UserError("/speak needs a file: /speak FILE.wav")
        check_sound_file(path, "/speak")
        check_voice(session)
        attached.speak = path
        print(f"{path}: the next answer is written to it as sound")
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
    restart_with_huge_pages()
    sys.exit(main())
