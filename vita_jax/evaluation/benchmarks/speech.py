"""Spoken questions, sounds that are no questions, and transcripts: by voices that were held out of training."""

from __future__ import annotations

from vita_jax.evaluation.benchmarks.benchmark import Benchmark, Group

SPEECH = Benchmark(
    name="speech",
    title="spoken questions",
    groups=(
        Group("spoken", "spoken questions about pictures", floor=0.85, goal=0.90),
        Group("noise", "sound that is not for the model", floor=0.95, goal=0.98, measure="refusal"),
        Group("transcribe", "transcripts (1 - CER)", floor=0.90, goal=0.95, measure="transcript"),
    ),
)
