"""Golden table of the learning-rate schedule."""

from __future__ import annotations

import math

import numpy as np

from tests.parity.cases import Case
from vita_jax.training.optimizer import warmup_cosine, warmup_steps

# The table was computed in double precision by another order of operations.
RELATIVE_TOLERANCE = 1e-12


def lr_schedule(case: Case) -> list[str]:
    """Rates and warm-up lengths of every row; returns what differs."""
    mismatches = []
    for index, row in enumerate(case.table["cases"]):
        warmup = warmup_steps(row["total_steps"], row["warmup_ratio"])
        if warmup != row["warmup_steps"]:
            mismatches.append(f"row {index}: {warmup} warm-up steps, expected {row['warmup_steps']}")
        rates = warmup_cosine(np.array(row["steps"]), row["total_steps"], row["warmup_ratio"], row["peak_lr"], xp=np)
        for step, got, want in zip(row["steps"], rates, row["lr"], strict=True):
            if not math.isclose(got, want, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-20):
                mismatches.append(f"row {index} step {step}: rate {got!r}, expected {want!r}")
    return mismatches


MODULES = {"lr_schedule": lr_schedule}
