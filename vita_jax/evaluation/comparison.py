"""What a change did to a model, measured on the same questions before and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vita_jax.errors import UserError
from vita_jax.evaluation.results import FINAL, read_evaluation

# Two-sided 95 % of the normal distribution.
Z = 1.959964
# Points that a model may lose by learning something else, and what is aimed at.
CHANGE_FLOOR, CHANGE_GOAL = -1.0, 0.0
# A difference of sums of fractions may miss a round number by this much.
ROUNDING = 1e-9


def compare_groups(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Paired difference of the accuracies of one group in two results.

    The figure of a group is the mean over its kinds, and so is the difference; its variance is that of a stratified
    sample of pairs, sum over kinds of s_k^2 / n_k, divided by the square of their number. Only items that both results
    have are compared.

    Args:
      before, after: the group in either result, see `figures`.

    Returns:
      {"title", "n", "before", "after" (accuracies of the compared items), "difference", "low", "high" (points, 95 %
      interval), "lost", "won" (items that were right only before, only after), "floor", "goal" (points),
      "floor_reached", "goal_reached" (by the difference itself)}.

    Raises:
      UserError: the results have no item in common.
    """
    means, variances = [], []
    befores, afters = [], []
    lost = won = total = 0
    for kind, first in before.get("outcomes", {}).items():
        second = after.get("outcomes", {}).get(kind, {})
        shared = [name for name in first if name in second]
        if not shared:
            continue
        changes = [int(second[name]) - int(first[name]) for name in shared]
        n, mean = len(changes), sum(changes) / len(changes)
        means.append(mean)
        # Of a single pair the spread is unknown; the widest is taken.
        spread = sum((change - mean) ** 2 for change in changes) / (n - 1) if n > 1 else 1.0
        variances.append(spread / n)
        befores.append(sum(first[name] for name in shared) / n)
        afters.append(sum(second[name] for name in shared) / n)
        lost += changes.count(-1)
        won += changes.count(1)
        total += n
    if not means:
        raise UserError("the two results have no question in common; evaluate both again")
    kinds = len(means)
    difference = 100 * sum(means) / kinds
    half = 100 * Z * math.sqrt(sum(variances)) / kinds
    return {
        "title": after["title"],
        "n": total,
        "before": sum(befores) / kinds,
        "after": sum(afters) / kinds,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "lost": lost,
        "won": won,
        "floor": CHANGE_FLOOR,
        "goal": CHANGE_GOAL,
        "floor_reached": difference >= CHANGE_FLOOR - ROUNDING,
        "goal_reached": difference >= CHANGE_GOAL - ROUNDING,
    }


def changes_since(
    before: Mapping[str, Any], after: Mapping[str, Any], groups: Sequence[str], stage: str
) -> dict[str, dict[str, Any]]:
    """Comparisons of several groups, those that both results have.

    Args:
      before, after: results.
      groups: names.
      stage: after which `before` was measured; kept as "since".
    """
    return {
        name: {**compare_groups(before["groups"][name], after["groups"][name]), "since": stage}
        for name in groups
        if all("outcomes" in result["groups"].get(name, {}) for result in (before, after))
    }


def changes_again(run_dir: str | Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons that the run's final result has, anew for another result at its end: {"changes"}, or nothing."""
    old = read_evaluation(run_dir, FINAL, result["benchmark"]) or {}
    since: dict[str, list[str]] = {}
    for name, change in old.get("changes", {}).items():
        since.setdefault(change["since"], []).append(name)
    changes: dict[str, dict[str, Any]] = {}
    for stage, groups in since.items():
        before = read_evaluation(run_dir, stage, result["benchmark"])
        if before is not None:
            changes |= changes_since(before, result, groups, stage)
    return {"changes": changes} if changes else {}
