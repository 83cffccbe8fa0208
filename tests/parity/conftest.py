"""Command line, collection and summary of the parity run: `pytest tests/parity --golden-dir DIR [--areas a,b]`.

Without --golden-dir the cases are those of tests/golden and of the folder in the environment variable
VITA_JAX_GOLDEN_DIR.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.parity import cases

DEFAULT_GOLDEN_DIR = Path(__file__).parents[1] / "golden"
PROPERTY = "parity"  # name under which a test leaves its outcome for the summary


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=None, help="folder with <area>/<case>.{safetensors,json}")
    parser.addoption("--areas", default=None, help="first-level folders, comma separated; default: those built so far")


def golden_files(config: pytest.Config) -> dict[str, Path]:
    """Test id -> case file, for the folders and areas this run was asked for."""
    # The options are unknown when pytest starts above this folder, hence the default.
    chosen, areas = config.getoption("--golden-dir", default=None), config.getoption("--areas", default=None)
    folders = [Path(chosen)] if chosen else [DEFAULT_GOLDEN_DIR]
    if not chosen and os.environ.get("VITA_JAX_GOLDEN_DIR"):
        folders.append(Path(os.environ["VITA_JAX_GOLDEN_DIR"]))
    area_list = None if areas is None else [area.strip() for area in areas.split(",") if area.strip()]
    files: dict[str, Path] = {}
    for folder in folders:
        for path in cases.find_case_files(folder, area_list):
            key = f"{path.parent.name}/{path.stem}"
            if key in files and files[key].read_bytes() == path.read_bytes():
                continue  # the same case in both folders runs once
            files[f"{folder.name}:{key}" if key in files else key] = path
    return files


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_path" in metafunc.fixturenames:
        try:
            files = golden_files(metafunc.config)
        except cases.CaseError as error:
            raise pytest.UsageError(str(error)) from error
        metafunc.parametrize("case_path", list(files.values()), ids=list(files))
    if "adapter_topic" in metafunc.fixturenames:
        metafunc.parametrize("adapter_topic", cases.adapter_topics())


@pytest.fixture(scope="session")
def adapters() -> dict[str, cases.Adapter]:
    """Module name -> adapter, of every topic that can be imported; `test_adapter_imports` fails for the others."""
    topics = {}
    for topic in cases.adapter_topics():
        try:
            topics[topic] = cases.load_topic(topic)
        except Exception as error:  # one broken topic must not hide the results of the others
            print(f"adapter {topic} cannot be imported: {error!r}")
    return cases.merge_topics(topics)


@pytest.fixture(scope="session")
def pending() -> dict[str, str]:
    return cases.read_listing(cases.HERE / "pending.txt")


@pytest.fixture(scope="session")
def unsupported() -> dict[str, str]:
    return cases.read_listing(cases.HERE / "unsupported.txt")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per case: area/case, module, worst error as a fraction of the tolerance, status."""
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) in ("call", "setup")
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not rows:
        return
    terminalreporter.section("parity")
    counts: dict[str, int] = {}
    for case_id, module, worst, status, detail in sorted(rows):
        counts[status] = counts.get(status, 0) + 1
        note = f"  ({detail.splitlines()[0]})" if detail else ""
        figure = "-" if status in ("pending", "unsupported") else f"{worst:.3f}"
        terminalreporter.write_line(f"{case_id:<48} {module:<24} {figure:>8}  {status}{note}")
    total = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    terminalreporter.write_line(f"{len(rows)} cases: {total}")
