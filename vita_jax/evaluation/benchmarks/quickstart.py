"""Questions about handwritten digits that were held out: pictures, clips, and scenes described in words."""

from __future__ import annotations

from vita_jax.evaluation.benchmarks.benchmark import Benchmark, Group

QUICKSTART = Benchmark(
    name="quickstart",
    title="handwritten digits",
    groups=(
        Group("typed", "typed questions about pictures", floor=0.90, goal=0.95),
        Group("typed_unseen_writers", "typed questions, unseen writers"),
        Group("video_order", "order of digits in clips", floor=0.85, goal=0.90),
        Group("text", "questions without pictures"),
    ),
)
