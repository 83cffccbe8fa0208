"""The scores of duplex scenes as a result: shares and latencies with intervals, and a line for every sound.

What the numbers are says `vita_jax.inference.scene_score`. Sounds and answers of all scenes are drawn together for the
intervals, as if each were a scene of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vita_jax.evaluation.answer_lines import ID
from vita_jax.evaluation.bootstrap import interval
from vita_jax.inference.scene_score import Scores

SEED = 0
QUERY, OTHER = "query", "noise"  # what a sound is: meant for the model, or not
LATENCIES = {"stop_latency": "stops", "silence_latency": "silences", "response_latency": "responses"}


def scene_lines(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """A line for every sound.

    Args:
      scores: by the name of the scene.

    Returns:
      {"question_id", "scene", "prompt" (the sound's name), "text" (what the model took it for), "truth" ("query" or
      "noise"), "score": 1 or 0, None where no decision about it could be wrong}.
    """
    return [
        {
            ID: f"{scene} {number}",
            "scene": scene,
            "prompt": verdict.name,
            "text": verdict.decision,
            "truth": QUERY if verdict.meant else OTHER,
            "score": None if verdict.right is None else int(verdict.right),
        }
        for scene, found in scores.items()
        for number, verdict in enumerate(found.verdicts)
    ]


def interruption_figures(scores: Sequence[Scores]) -> dict[str, Any]:
    """The figures of all scenes together.

    Returns:
      {"takeover", "false_takeover": {"value" (a share), "low", "high", "n"}, "stop_latency", "silence_latency",
      "response_latency": {"value" (mean seconds), "low", "high", "n", "median", "most"}}; the bounds are the 95 %
      bootstrap interval, and what never happened is missing.
    """
    counted = [verdict for found in scores for verdict in found.verdicts if verdict.right is not None]
    values = {
        name: [float(verdict.decision == QUERY) for verdict in counted if verdict.meant == meant]
        for name, meant in (("takeover", True), ("false_takeover", False))
    }
    values |= {name: [one for found in scores for one in getattr(found, field)] for name, field in LATENCIES.items()}
    figures = {}
    for name, own in values.items():
        if own:
            low, high = interval([np.array(own)], SEED)
            figures[name] = {"value": statistics.fmean(own), "low": low, "high": high, "n": len(own)}
            if name in LATENCIES:
                figures[name] |= {"median": statistics.median(own), "most": max(own)}
    return figures
