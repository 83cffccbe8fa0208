"""Prompts of Flamingo's few-shot tasks, as strings (`open_flamingo/eval/eval_model.py`, `models/open_flamingo.py`).

A demonstration is a query with its answer and the end of its chunk; a prompt is demonstrations followed by a query.
Without shots two demonstrations are shown as text alone: their tags are taken out and no pictures are given for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.errors import UserError

# Demonstrations that are shown, without their pictures, where no shots are asked for.
ZERO_SHOT_DEMONSTRATIONS = 2


def _answered(query: str, answer: str | None) -> str:
    return query if answer is None else f"{query}{answer}{END_OF_CHUNK}"


def caption_prompt(caption: str | None = None) -> str:
    """Captioning; None is the query."""
    return _answered(f"{IMAGE}Output:", caption)


def class_prompt(name: str | None = None) -> str:
    """ImageNet: the name of a class as a caption."""
    return caption_prompt(name)


def question_prompt(question: str, answer: str | None = None) -> str:
    """Visual question answering."""
    return _answered(f"{IMAGE}Question:{question} Short answer:", answer)


def meme_prompt(text: str, wording: tuple[str, str], answer: str | None = None) -> str:
    """Hateful Memes: `wording` stands before and after the meme's text and makes it a question that is yes or no."""
    before, after = wording
    return _answered(f"{IMAGE}{before}{text}{after}Answer:", answer)


def effective_shots(shots: int) -> int:
    """How many demonstrations a prompt has."""
    if shots < 0:
        raise UserError(f"shots {shots} must not be negative")
    return shots or ZERO_SHOT_DEMONSTRATIONS


def few_shot_prompt(demonstrations: Sequence[str], query: str, *, pictures: bool = True, separator: str = "\n") -> str:
    """Demonstrations and a query.

    Args:
      demonstrations: prompts with answers, most similar last.
      query: a prompt without one.
      pictures: False takes the demonstrations' tags out.
      separator: behind every demonstration; "" for classification.
    """
    shown = "".join(f"{demonstration}{separator}" for demonstration in demonstrations)
    return (shown if pictures else shown.replace(IMAGE, "")) + query
