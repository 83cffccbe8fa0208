"""What an answer to a user's own question is worth, and the figures of many.

exact    equal to one of the true answers, as `scoring.normalise` writes both
choice   settles on the true option: by its letter, or by its text alone
wer, cer wrong words, or characters, by those of the truth, both as `normalise_transcript` writes them (`jiwer`)
state    the model takes the sound for a query or for noise, by the symbol in front of its answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jiwer
import numpy as np

from vita_jax.data.ctc_vocabulary import normalise_transcript
from vita_jax.data.scienceqa import LETTERS, chosen_letter
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import Question, Scoring, missing_truths
from vita_jax.evaluation.bootstrap import interval, rate_interval
from vita_jax.evaluation.scoring import normalise

ERROR_RATES = ("wer", "cer")
# What sound may be: meant for the model or not; and what an answer without a symbol takes it for.
STATES, NEITHER = ("query", "noise"), "none"
SEED = 0

TRANSCRIPTS = (
    "Unicode NFKC, lower case, punctuation and symbols are gaps (but ' stays), single gaps between words and none "
    "beside Chinese characters; numbers stay as they are written"
)
NORMALISATION: Mapping[Scoring, str] = {
    "exact": "Unicode NFKC, lower case, single spaces, no full stop at the end",
    "choice": "an option's text alone, else the letter of the last 'The answer is X', else the letter in front",
    "wer": TRANSCRIPTS,
    "cer": TRANSCRIPTS + "; a gap between words counts as a character",
    "state": "nothing but the symbol in front of the answer; without one the sound is taken for neither",
}
_COUNTS = ("substitutions", "deletions", "insertions")


def check_questions(questions: Sequence[Question], scoring: Scoring) -> None:
    """Raises UserError if a question cannot be scored so."""
    if reason := missing_truths(questions, scoring):
        raise UserError(reason)
    for question in questions:
        where = f"question {question.id}: answer={list(question.truths)!r}"
        if scoring == "choice" and len(question.choices) > len(LETTERS):
            raise UserError(f"question {question.id} has {len(question.choices)} choices; at most {len(LETTERS)}")
        if scoring == "choice" and any(_option(truth, question.choices) is None for truth in question.truths):
            raise UserError(f"{where} is neither a letter of a choice nor the text of one ({list(question.choices)!r})")
        if scoring == "state" and (len(question.truths) > 1 or question.truths[0] not in STATES):
            raise UserError(f"{where} must be one of {', '.join(STATES)}")
        if scoring in ERROR_RATES and (len(question.truths) > 1 or not normalise_transcript(question.truths[0])):
            raise UserError(f"{where} must be one text with a letter or digit in it for --scoring {scoring}")


def score_answer(question: Question, answer: str, state: str | None, scoring: Scoring) -> dict[str, Any]:
    """What becomes part of the answer's line.

    Args:
      answer: without its state symbol.
      state: that symbol's meaning, see `split_state_symbol`.

    Returns:
      {"score": 1 or 0, or of error rates the rate of this answer, "truth"} and what it was made of: "chosen" (the
      letter), "taken_for" ("query", "noise" or "none"), or "errors" (the three counts and "units" of the truth).
    """
    truth: Any = question.truths[0] if len(question.truths) == 1 else list(question.truths)
    if scoring == "exact":
        return {"score": int(normalise(answer) in map(normalise, question.truths)), "truth": truth}
    if scoring == "choice":
        chosen = _option(answer, question.choices)
        right = chosen is not None and chosen in {_option(known, question.choices) for known in question.truths}
        return {"score": int(right), "truth": truth, "chosen": chosen}
    if scoring == "state":
        taken_for = NEITHER if state is None else "noise" if state == "noise" else "query"
        return {"score": int(taken_for in question.truths), "truth": truth, "taken_for": taken_for}
    errors = count_errors(answer, question.truths[0], scoring)
    wrong = sum(errors[name] for name in _COUNTS)
    return {"score": wrong / errors["units"], "truth": truth, "errors": errors}


def _option(text: str, choices: Sequence[str]) -> str | None:
    """The letter that a text settles on, None for none."""
    for letter, choice in zip(LETTERS, choices, strict=False):
        if normalise(text) == normalise(choice):
            return letter
    return chosen_letter(text, len(choices) or len(LETTERS))


def count_errors(answer: str, truth: str, scoring: Scoring) -> dict[str, int]:
    """{"substitutions", "deletions", "insertions", "units"} of the shortest way from the truth to the answer.

    Args:
      truth: has a word, after normalisation.
      scoring: "wer" counts words, "cer" characters.
    """
    process = jiwer.process_words if scoring == "wer" else jiwer.process_characters
    truth = normalise_transcript(truth)
    found = process(truth, normalise_transcript(answer))
    units = len(truth.split()) if scoring == "wer" else len(truth)
    return {name: getattr(found, name) for name in _COUNTS} | {"units": units}


def figures(scoring: Scoring, questions: Sequence[Question], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of answered questions.

    Args:
      scores: see `score_answer`, at least one.

    Returns:
      {"scoring", "normalisation", "value", "low", "high" (95 % bootstrap interval), "n", "better": "higher" or "lower",
      "by_category": {name: {"value", "low", "high", "n"}}}; of error rates also "errors" (sums), of states "confusion"
      ({"classes", "taken_for": the same and "none", "counts": rows are what it was, columns what it was taken for}),
      "recall" and "precision" of both.
    """
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for question, score in zip(questions, scores, strict=True):
        by_category.setdefault(question.category, []).append(score)
    value, low, high = _value(scoring, scores)
    found: dict[str, Any] = {
        "scoring": scoring,
        "normalisation": NORMALISATION[scoring],
        "value": value,
        "low": low,
        "high": high,
        "n": len(scores),
        "better": "lower" if scoring in ERROR_RATES else "higher",
        "by_category": {
            name: dict(zip(("value", "low", "high"), _value(scoring, part), strict=True)) | {"n": len(part)}
            for name, part in sorted(by_category.items())
        },
    }
    if scoring in ERROR_RATES:
        found["errors"] = {name: sum(s["errors"][name] for s in scores) for name in (*_COUNTS, "units")}
    return found | (_confusion(scores) if scoring == "state" else {})


def _value(scoring: Scoring, scores: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    if scoring in ERROR_RATES:
        errors = np.array([sum(score["errors"][name] for name in _COUNTS) for score in scores])
        bounds = rate_interval(errors, np.array([score["errors"]["units"] for score in scores]), SEED)
    else:
        bounds = interval([np.array([score["score"] for score in scores])], SEED)
    return _mean(scoring, scores), *bounds


def _mean(scoring: Scoring, scores: Sequence[Mapping[str, Any]]) -> float:
    if scoring not in ERROR_RATES:
        return sum(score["score"] for score in scores) / len(scores)
    wrong = sum(score["errors"][name] for score in scores for name in _COUNTS)
    return wrong / sum(score["errors"]["units"] for score in scores)


def _confusion(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs = [(score["truth"], score["taken_for"]) for score in scores]
    columns = [*STATES, NEITHER]
    counts = [[pairs.count((truth, taken)) for taken in columns] for truth in STATES]
    recall, precision = {}, {}
    for place, name in enumerate(STATES):
        there, taken = sum(counts[place]), sum(row[place] for row in counts)
        recall[name] = counts[place][place] / there if there else None
        precision[name] = counts[place][place] / taken if taken else None
    confusion = {"classes": list(STATES), "taken_for": columns, "counts": counts}
    return {"confusion": confusion, "recall": recall, "precision": precision}
