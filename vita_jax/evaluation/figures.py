"""From answers, or whatever else was tried, to the figures of a group.

A group of a result: {"title", "n", "accuracy" (mean over kinds), "by_kind", "by_language", "by_num_digits" (key ->
{"accuracy", "n"}), "prior", "floor", "goal", "floor_reached", "goal_reached" (the last four and the prior may be null),
"outcomes": {kind: {item id: right or not}}}, and what its measure adds. The accuracy of a transcript is 1 minus its
character error rate, and it is right without any error.

A line, of every item of every group: {"question_id", "group", "kind", "language", "prompt", "text" (what was answered,
heard or named), "truth", "score" (1 right, 0 wrong)}, and where there are such "state" (of the symbol in front of the
answer) and "errors" (wrong characters, characters of the truth).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vita_jax.data.prompts import split_state_symbol
from vita_jax.data.templates import Template
from vita_jax.evaluation.answer_lines import ID
from vita_jax.evaluation.benchmarks import Benchmark, Group
from vita_jax.evaluation.items import Item
from vita_jax.evaluation.scoring import (
    answer_prior,
    character_errors,
    error_rate,
    is_refusal,
    is_right,
    normalise,
)

# Answered items that a result keeps per group, for people to look at.
EXAMPLES_PER_GROUP = 24


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one item.

    Attributes:
      id, kind, language, num_digits: of the item.
      right: whether it was done right.
      errors: (wrong characters, characters of the truth), where characters are counted.
      prompt, text, truth: what was asked, what came of it, and what should have; for the lines.
      state: of the symbol in front of an answer.
    """

    id: str
    kind: str
    language: str
    right: bool
    num_digits: int = 0
    errors: tuple[int, int] | None = None
    prompt: str = ""
    text: str = ""
    truth: str = ""
    state: str | None = None


def outcome_lines(group: Group, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The lines of a group, see the top of this file."""
    lines = []
    for one in outcomes:
        line = {ID: one.id, "group": group.name, "kind": one.kind, "language": one.language, "prompt": one.prompt}
        line |= {"text": one.text, "truth": one.truth, "score": int(one.right)}
        line |= {} if one.state is None else {"state": one.state}
        lines.append(line if one.errors is None else {**line, "errors": list(one.errors)})
    return lines


def group_figures(group: Group, outcomes: Sequence[Outcome], prior: float | None = None, **more: Any) -> dict[str, Any]:
    """The figures of a group, see the top of this file.

    Args:
      outcomes: at least one; all with `errors` if the group counts characters.
      prior: accuracy of the best constant answer, where that means something.
      more: further entries.
    """

    def accuracy_of(chosen: Sequence[Outcome]) -> float:
        if not group.counts_characters:
            return sum(outcome.right for outcome in chosen) / len(chosen)
        return max(0.0, 1 - error_rate(outcome.errors or (0, 0) for outcome in chosen))

    def by(key: Callable[[Outcome], Any]) -> dict[str, dict[str, float]]:
        parts: dict[Any, list[Outcome]] = {}
        for outcome in outcomes:
            parts.setdefault(key(outcome), []).append(outcome)
        return {str(name): {"accuracy": accuracy_of(part), "n": len(part)} for name, part in sorted(parts.items())}

    by_kind = by(lambda outcome: outcome.kind)
    accuracy = sum(part["accuracy"] for part in by_kind.values()) / len(by_kind)
    by_num_digits = by(lambda outcome: outcome.num_digits)
    by_num_digits.pop("0", None)
    if group.counts_characters:
        exact = Counter(outcome.kind for outcome in outcomes if outcome.right)
        more = {"exact": exact.total(), **more}
        for kind, part in by_kind.items():
            part["exact"] = exact[kind]
    kept: dict[str, dict[str, bool]] = {}
    for outcome in outcomes:
        kept.setdefault(outcome.kind, {})[outcome.id] = outcome.right
    return {
        "title": group.title,
        "n": len(outcomes),
        "accuracy": accuracy,
        "by_kind": by_kind,
        "by_language": by(lambda outcome: outcome.language),
        "by_num_digits": by_num_digits,
        "prior": prior,
        "floor": group.floor,
        "goal": group.goal,
        "floor_reached": None if group.floor is None else accuracy >= group.floor,
        "goal_reached": None if group.goal is None else accuracy >= group.goal,
        **more,
        "outcomes": kept,
    }


def score(
    benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str], template: Template | None = None
) -> dict[str, Any]:
    """The figures of answered items, without time and limit.

    Args:
      benchmark: groups that are not made of answers, or have no items here, are left out.
      items, answers: what was asked, and what the model said.
      template: whose state symbols the answers begin with; None = they have none.

    Returns:
      {"benchmark", "title", "num_items", "groups", "examples", "lines"}.
    """
    groups, examples, lines = {}, [], []
    for group in benchmark.groups:
        indices = [index for index, item in enumerate(items) if item.group == group.items]
        if not indices or not group.is_answered:
            continue
        chosen, said = [items[i] for i in indices], [answers[i] for i in indices]
        outcomes = [_judge(group, item, answer, template) for item, answer in zip(chosen, said, strict=True)]
        # A constant answer to sound that is no question is the refusal itself, and there is none for transcripts.
        prior = answer_prior(chosen, template) if group.measure == "answer" else None
        refused = sum(is_refusal(answer, template) for answer in said) / len(said)
        groups[group.name] = group_figures(group, outcomes, prior, refused=refused)
        lines += outcome_lines(group, outcomes)
        if group.measure != "acceptance":  # the same items as another group
            examples += _examples(group, chosen, said, outcomes, template)
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "num_items": len(items),
        "groups": groups,
        "examples": examples,
        "lines": lines,
    }


def _judge(group: Group, item: Item, answer: str, template: Template | None) -> Outcome:
    errors = None
    if group.measure in ("refusal", "acceptance"):
        right = is_refusal(answer, template) == (group.measure == "refusal")
    elif group.measure == "transcript":
        errors = character_errors(answer, item.answer, template)
        right = errors[0] == 0
    else:
        right = is_right(item.kind, answer, item.answer, template)
    state, text = (None, answer) if template is None else split_state_symbol(answer.strip(), template)
    said = {"prompt": item.question, "text": text.strip(), "truth": item.answer, "state": state}
    return Outcome(item.id, item.kind, item.language, right, item.num_digits, errors, **said)


def _examples(
    group: Group,
    items: Sequence[Item],
    answers: Sequence[str],
    outcomes: Sequence[Outcome],
    template: Template | None,
) -> list[dict[str, Any]]:
    """Some of the items with what came of them."""
    examples = []
    for i in _sample(items):
        # No longer than it can be read; the comparison has seen all of it.
        answer = normalise(answers[i], template)[:200]
        if group.measure == "refusal" and outcomes[i].right:
            answer = f"(refused) {answer}"
        shown = {"truth": items[i].answer, "answer": answer, "right": outcomes[i].right}
        examples.append({**dataclasses.asdict(items[i]), **shown})
    return examples


def _sample(items: Sequence[Item]) -> list[int]:
    """Up to EXAMPLES_PER_GROUP places: kinds and languages in turn, unseen files and digit counts first."""
    strata: dict[tuple[str, str], list[int]] = {}
    for index, item in enumerate(items):
        strata.setdefault((item.kind, item.language), []).append(index)
    chosen: list[int] = []
    files: Counter[tuple[tuple[str, str], ...]] = Counter()
    digits: Counter[int] = Counter()
    while len(chosen) < min(EXAMPLES_PER_GROUP, len(items)):
        for waiting in filter(None, strata.values()):
            if len(chosen) == EXAMPLES_PER_GROUP:
                break
            index = min(waiting, key=lambda i: (files[items[i].media], digits[items[i].num_digits], i))
            waiting.remove(index)
            files[items[index].media] += 1
            digits[items[index].num_digits] += 1
            chosen.append(index)
    return chosen
