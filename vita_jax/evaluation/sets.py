"""Sets of questions that are read from a folder as it is published, for `evaluate --benchmark NAME --data FOLDER`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import Question, Scoring
from vita_jax.evaluation.question_scores import STATES

SOUNDS = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm"})
# AISHELL-1 (openslr.org/33): below `data_aishell` the recordings by split and speaker, and one file of all transcripts.
AISHELL_TRANSCRIPTS = "transcript/aishell_transcript_v0.8.txt"
AISHELL_WAVES = "wav/test"
WRITE_DOWN_ZH = "写下你听到的内容。"


@dataclass(frozen=True)
class QuestionSet:
    """A benchmark of ours.

    Attributes:
      title: as shown.
      read: the questions of a folder, and the folder that their files start from.
      scoring: how answers are compared.
      column: of the published figures that it is compared with, see `published`; None = there are none.
      max_new_tokens: the longest answer.
    """

    title: str
    read: Callable[[Path], tuple[list[Question], Path]]
    scoring: Scoring
    column: str | None = None
    max_new_tokens: int = 128


def read_aishell(folder: Path) -> tuple[list[Question], Path]:
    """The test split of AISHELL-1: recordings that have a transcript, by name; a few of the corpus have none.

    Args:
      folder: `data_aishell`, or what it lies in, with the speakers' archives unpacked.

    Raises:
      UserError: it has no transcripts or no recordings, or none that belong together.
    """
    root = next((r for r in (folder, folder / "data_aishell") if (r / AISHELL_TRANSCRIPTS).is_file()), None)
    if root is None:
        raise UserError(f"{folder} has no {AISHELL_TRANSCRIPTS}; give the folder data_aishell of AISHELL-1")
    texts: dict[str, str] = {}
    for line in (root / AISHELL_TRANSCRIPTS).read_text(encoding="utf-8").splitlines():
        name, _, words = line.strip().partition(" ")
        texts[name] = "".join(words.split())
    waves = sorted((root / AISHELL_WAVES).rglob("*.wav"), key=lambda wave: wave.stem)
    if not waves:
        raise UserError(f"{root / AISHELL_WAVES} has no .wav file; unpack the archives of its speakers there")
    questions = [
        Question(wave.stem, WRITE_DOWN_ZH, (("audio", str(wave.relative_to(root))),), (texts[wave.stem],), (), "test")
        for wave in waves
        if texts.get(wave.stem)
    ]
    if not questions:
        raise UserError(f"{root / AISHELL_TRANSCRIPTS} has no transcript of a file of {AISHELL_WAVES}, like {waves[0]}")
    return questions, root


def read_query_noise(folder: Path) -> tuple[list[Question], Path]:
    """Sounds in `query`, which are meant for the model, and in `noise`, which are not; subfolders are categories.

    Raises:
      UserError: one of the two folders is missing or has no sound.
    """
    questions = []
    for state in STATES:
        files = sorted(path for path in (folder / state).rglob("*") if path.suffix.lower() in SOUNDS)
        if not files:
            raise UserError(f"{folder / state} has no sound ({', '.join(sorted(SOUNDS))}); both kinds are needed")
        for path in files:
            name = path.relative_to(folder)
            media = (("audio", str(name)),)
            questions.append(Question(name.as_posix(), "", media, (state,), (), name.parent.as_posix()))
    return questions, folder


def evenly(questions: Sequence[Question], count: int) -> list[Question]:
    """At most so many of them, evenly spread over their order."""
    places = range(min(count, len(questions)))
    return [questions[place * len(questions) // len(places)] for place in places]


SETS: Mapping[str, QuestionSet] = MappingProxyType(
    {
        "aishell1": QuestionSet("AISHELL-1, test (CER)", read_aishell, "cer", "aishell1_cer"),
        # The symbol is what counts; it comes first.
        "query_noise": QuestionSet("queries and noise", read_query_noise, "state", max_new_tokens=2),
    }
)
