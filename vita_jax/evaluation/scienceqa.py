"""ScienceQA: accuracies by class, and a text-only model beside one that sees (arXiv 2304.08485, section 5.2).

Complement: where the text-only model settles on no option, the answer of the one that sees is taken. Judge: where they
differ, the text-only model is shown both answers and decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vita_jax.data.scienceqa import Problem, chosen_letter
from vita_jax.data.teacher import Message
from vita_jax.errors import UserError

# Columns of the published tables: subjects, whether there is a text, a picture or neither, grades.
CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
AVERAGE = "all"

SYSTEM = """\
You solve school questions that have several options. Some are about a picture that you cannot see; decide then by what
the text tells and by what you know. Think it through in a few sentences, and end with a line "The answer is X." with
the letter of one option. If the text does not allow any decision, end with "The answer cannot be told."."""
JUDGE = """\
You decide between two answers to a school question. Assistant 1 has only read it; assistant 2 has also seen the
picture, if there is one. Both explain themselves, and either may be wrong. Weigh what they say against the question and
what you know, in a few sentences, and end with a line "The answer is X." with the letter of one option."""


def messages(problem: Problem) -> list[Message]:
    """What the text-only model is asked."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem.instruction}]


def judge_messages(problem: Problem, reader: str, viewer: str) -> list[Message]:
    """What it is asked as a judge of its own answer (`reader`) and of the one of the model that sees (`viewer`)."""
    parts = (problem.instruction, f"[Assistant 1]\n{reader}", f"[Assistant 2]\n{viewer}")
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": "\n\n".join(parts)}]


def answers_to(problems: Sequence[Problem], answers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The text of every problem's answer by its id. Raises UserError if one is missing."""
    missing = [problem.id for problem in problems if problem.id not in answers]
    if missing:
        raise UserError(f"{len(missing)} of {len(problems)} problems have no answer, for example {missing[0]}")
    return {problem.id: answers[problem.id]["text"] for problem in problems}


def letters_of(problems: Sequence[Problem], texts: Mapping[str, str]) -> dict[str, str | None]:
    """The option that each answer settles on; None for none."""
    return {problem.id: chosen_letter(texts[problem.id], len(problem.choices)) for problem in problems}


def complemented(reader: Mapping[str, str | None], viewer: Mapping[str, str | None]) -> dict[str, str | None]:
    """The text-only model's options, and the other one's where it has none."""
    return {name: viewer[name] if letter is None else letter for name, letter in reader.items()}


def to_be_judged(reader: Mapping[str, str | None], viewer: Mapping[str, str | None]) -> list[str]:
    """Where the two differ."""
    return [name for name, letter in reader.items() if letter != viewer[name]]


def accuracies(problems: Sequence[Problem], chosen: Mapping[str, str | None]) -> dict[str, tuple[float, int]]:
    """(share of right options, number of problems) of every class that occurs, and of all together.

    An answer without an option is wrong.
    """
    right: dict[str, list[bool]] = {name: [] for name in (*CLASSES, AVERAGE)}
    for problem in problems:
        letter = chosen[problem.id]
        is_right = letter is not None and ord(letter) - ord("A") == problem.answer
        for name in (*problem.classes, AVERAGE):
            right[name].append(is_right)
    return {name: (sum(found) / len(found), len(found)) for name, found in right.items() if found}
