"""One trained run for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.evaluation.benchmark_run import make_run


@pytest.fixture(scope="session")
def run_config(tmp_path_factory):
    """The configuration of a finished run with benchmark data."""
    return make_run(tmp_path_factory.mktemp("evaluated") / "run")
