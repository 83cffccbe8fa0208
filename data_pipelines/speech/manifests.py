"""Lists of recordings with their texts, as users have them: JSON lines, LibriSpeech and AISHELL folders.

Each reader yields, in a fixed order, an `Utterance` for every line, or a `RecordError` that says what is wrong with it;
it opens no recording. `read_corpus` picks the reader.

    manifest     a JSON object a line: audio (path below a root), text; optionally language, duration (seconds), id
    LibriSpeech  <part>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt: "<utterance> TEXT"; <utterance>.flac beside
    AISHELL      transcript/*.txt: "<utterance> 文 字"; wav/<part>/<speaker>/<utterance>.wav
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vita_jax.data.records import RecordError
from vita_jax.data.spoken_words import language_of
from vita_jax.errors import UserError

LAYOUTS = ("manifest", "librispeech", "aishell")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
LONGEST_SECONDS = 365 * 24 * 3600
_KNOWN = ("audio", "text", "language", "duration", "id")


@dataclass(frozen=True)
class Utterance:
    """A recording and what is said in it.

    Attributes:
      place: file and line of the list, for messages.
      path: of the recording, which may be missing.
      text: transcript, without spaces around it.
      language: "en", "zh", or whatever the list says.
      id: whatever the list says, else the recording's name without its ending.
      duration: seconds, None if the list does not say.
    """

    place: str
    path: Path
    text: str
    language: str
    id: str
    duration: float | None = None


def _lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """("file:number", line) of the lines with content."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    # Not `splitlines`: a text may hold one of the rarer separators.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def _field(entry: dict[str, Any], name: str, where: str, kinds: type | tuple[type, ...], wanted: str) -> Any:
    value = entry[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise RecordError(where, name, f"{value!r} must be {wanted}")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" or character == "\0" for character in value):
        raise RecordError(where, name, "holds half a character (surrogate) or a null character")
    return value


def _utterance(line: str, where: str, root: Path) -> Utterance:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(where, "", f"not JSON ({error.msg}, column {error.colno}); one object a line") from error
    except RecursionError as error:
        raise RecordError(where, "", "nested too deeply to be a recording") from error
    if not isinstance(entry, dict):
        raise RecordError(where, "", f"expected an object with 'audio' and 'text', got {type(entry).__name__}")
    for name in ("audio", "text"):
        if name not in entry:
            raise RecordError(where, name, f"is missing; fields are {', '.join(_KNOWN)}")
    text = _field(entry, "text", where, str, "text").strip()
    if not text:
        raise RecordError(where, "text", "is empty; leave recordings without words out", "no text")
    name = _field(entry, "audio", where, str, "a path")
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RecordError(where, "audio", f"{name!r} lies outside of the root folder {root}; refused")
    language = _field(entry, "language", where, str, "text") if "language" in entry else language_of(text)
    duration = None
    if "duration" in entry:
        seconds = _field(entry, "duration", where, (int, float), "a number of seconds")
        if not 0 < seconds < LONGEST_SECONDS:
            raise RecordError(where, "duration", f"{seconds} must be more than 0 seconds, and no more than a year")
        duration = float(seconds)
    identity = str(_field(entry, "id", where, (str, int), "text or a number")) if "id" in entry else path.stem
    return Utterance(where, path, text, language, identity, duration)


def read_manifest(path: str | Path, root: str | Path | None = None) -> Iterator[Utterance | RecordError]:
    """The recordings of a JSON-lines manifest; other fields than those above are left alone.

    Args:
      path: of the manifest.
      root: folder the paths are relative to; default the folder of the manifest.

    Raises:
      UserError: the manifest cannot be read, or is empty; the root is no folder.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    if not root.is_dir():
        raise UserError(f"root {root} is not a folder; it is where the paths of {path} start")
    empty = True
    for where, line in _lines(path, "manifest"):
        empty = False
        try:
            yield _utterance(line, where, root)
        except RecordError as error:
            yield error
    if empty:
        raise UserError(f'manifest {path} is empty; expected lines such as {{"audio": "a.wav", "text": "hello"}}')


# ---- folders of well-known corpora -----------------------------------------------------------------------------------


def _split_line(where: str, line: str) -> tuple[str, str]:
    name, _, text = line.strip().partition(" ")
    if not text.strip():
        raise RecordError(where, "", f"expected an utterance name and its text, got {line!r}")
    return name, text.strip()


def read_librispeech(root: str | Path) -> Iterator[Utterance | RecordError]:
    """The recordings of LibriSpeech, or of any part of it; English, in lower case (the transcripts shout).

    Raises:
      UserError: no transcripts below `root`, or one that cannot be read.
    """
    transcripts = sorted(Path(root).rglob("*.trans.txt"))
    if not transcripts:
        raise UserError(f"no *.trans.txt below {root}; expected LibriSpeech's <part>/<speaker>/<chapter>/ folders")
    for transcript in transcripts:
        for where, line in _lines(transcript, "transcript"):
            try:
                name, text = _split_line(where, line)
            except RecordError as error:
                yield error
                continue
            files = [transcript.parent / f"{name}{suffix}" for suffix in AUDIO_SUFFIXES]
            found = next((file for file in files if file.is_file()), transcript.parent / f"{name}.flac")
            yield Utterance(where, found, text.lower(), "en", name)


def read_aishell(root: str | Path) -> Iterator[Utterance | RecordError]:
    """The recordings of AISHELL-1 (its speakers unpacked below wav/); Mandarin, without the spaces between words.

    AISHELL transcribes some sentences whose recordings it leaves out; those are passed over.

    Raises:
      UserError: no transcript or no recordings below `root`, or nothing that has both.
    """
    root = Path(root)
    transcripts = sorted((root / "transcript").glob("*.txt"))
    recordings = {path.stem: path for path in sorted((root / "wav").rglob("*.wav"))}
    if not transcripts or not recordings:
        missing = "transcript/*.txt" if not transcripts else "wav/**/*.wav"
        raise UserError(f"no {missing} below {root}; expected AISHELL's transcript/ and (unpacked) wav/ folders")
    matched = False
    for transcript in transcripts:
        for where, line in _lines(transcript, "transcript"):
            try:
                name, text = _split_line(where, line)
            except RecordError as error:
                yield error
                continue
            if name in recordings:
                matched = True
                yield Utterance(where, recordings[name], text.replace(" ", ""), "zh", name)
    if not matched:
        raise UserError(f"no recording below {root / 'wav'} has the name of a line in {root / 'transcript'}")


def read_corpus(path: str | Path, layout: str, root: str | Path | None = None) -> Iterator[Utterance | RecordError]:
    """The recordings of one corpus.

    Args:
      path: of the manifest, or the top folder of the others.
      layout: one of `LAYOUTS`.
      root: for manifests only, see `read_manifest`.

    Raises:
      UserError: an unknown layout, a root where none is used, and as the readers.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r} of a corpus; known: {', '.join(LAYOUTS)}")
    if layout == "manifest":
        return read_manifest(path, root)
    if root is not None:
        raise UserError(f"root={str(root)!r} is for manifests; {layout} has its recordings below its own folder")
    return read_librispeech(path) if layout == "librispeech" else read_aishell(path)
