"""Every golden case against this package; see `cases.py` for the rules and `conftest.py` for the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import cases
from tests.parity.conftest import PROPERTY


def test_adapter_imports(adapter_topic: str) -> None:
    assert cases.load_topic(adapter_topic), f"adapter {adapter_topic} exports no module"


def test_case(
    case_path: Path,
    request: pytest.FixtureRequest,
    adapters: dict[str, cases.Adapter],
    pending: dict[str, str],
    unsupported: dict[str, str],
) -> None:
    case_id = request.node.callspec.id
    row = [case_id, "?", float("inf"), "fail", "error"]
    request.node.user_properties.append((PROPERTY, row))  # the row of the summary, also if what follows raises
    case = cases.load_case(case_path)
    row[1] = case.module
    outcome = cases.run_case(case, adapters, pending, unsupported)
    row[2:] = [outcome.worst, outcome.status, outcome.detail]
    if outcome.status == "fail":
        pytest.fail(f"{case_id}\n{outcome.detail}", pytrace=False)
    if outcome.status in ("pending", "unsupported"):
        pytest.skip(f"{outcome.status}: {outcome.detail}")
