"""The documentation as a site: no link that leads nowhere, no page that is not in the table of contents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    done = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {page.stem for page in tmp_path.glob("*.html")} - {"genindex", "search"}
    assert written == {page.stem for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "CONTRIBUTING.md"])
def test_files_that_are_linked_are_there(name):
    """Those of the repository's first pages, which are no part of the site, and the headings they name."""
    for target in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        assert (ROOT / (file or name)).exists(), target
        headings = re.findall(r"^#+ (.*)$", (ROOT / (file or name)).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_first_page_in_chinese_says_as_much():
    """As many sections, the same commands, and the same figures in tables."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert len(re.findall(r"^## ", english, re.MULTILINE)) == len(re.findall(r"^## ", chinese, re.MULTILINE)) >= 10
    found = []
    for text in (english, chinese):
        lines = text.splitlines()
        commands = [re.sub(r" *#.*", "", line) for line in lines if re.match(r" {4,}(\S*python -m|launch/\w|--)", line)]
        commands = [re.sub(r'--text ".*"', "--text", command) for command in commands]
        cells = [line for line in lines if line.startswith("| ")]
        found.append((commands, [re.findall(r"[\d.]+ %|\d+:\d\d", line) for line in cells]))
    assert found[0] == found[1]


def test_every_study_is_listed():
    table = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    programs = sorted(path.parent.name for path in (ROOT / "experiments" / "studies").glob("*/__main__.py"))
    rows = re.findall(r"^\| \[(\w+)\]\(\S+\) \| .+\? \| `python -m experiments\.studies\.(\w+)", table, re.MULTILINE)
    assert sorted(rows) == [(name, name) for name in programs] and len(programs) >= 8


def test_documents_that_are_named_are_there():
    """Programs and documents name pages as `docs/NAME.md`."""
    files = [
        path for room in ("vita_jax", "data_pipelines", "experiments", "docs") for path in (ROOT / room).rglob("*.*")
    ]
    for path in [*files, ROOT / "README.md"]:
        if path.suffix in (".py", ".md"):
            for named in re.findall(r"docs/[a-z0-9_]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / named).is_file(), f"{path.relative_to(ROOT)} names {named}"
