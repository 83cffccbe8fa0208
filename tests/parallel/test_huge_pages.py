"""Large pages: when a process is started again for them, and what they are good for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vita_jax.parallel import huge_pages
from vita_jax.parallel.huge_pages import SETTING, TUNABLES, helps

CPU = {"JAX_PLATFORMS": "cpu"}
RESTART = """
import json, os, resource, sys
from vita_jax.parallel.huge_pages import restart_with_huge_pages

print("started", flush=True)
restart_with_huge_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
filled = b"x" * (64 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
tunables = os.environ.get("GLIBC_TUNABLES")
print(json.dumps({"argv": sys.argv, "tunables": tunables, "pid": os.getpid(), "faults": faults}))
"""


def test_when_it_helps():
    assert helps(CPU, (2, 36), "madvise")
    assert helps(CPU | {TUNABLES: "glibc.malloc.arena_max=2"}, (2, 35), "madvise")
    for environ, glibc, kernel in (
        (CPU | {TUNABLES: f"{SETTING}=0"}, (2, 36), "madvise"),
        (CPU, (2, 34), "madvise"),
        (CPU, (), "madvise"),
        (CPU, (2, 36), "always"),
        (CPU, (2, 36), "never"),
        (CPU, (2, 36), ""),
    ):
        assert not helps(environ, glibc, kernel)


def test_machines_with_accelerators_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(huge_pages, "has_accelerator_files", lambda: True)
    assert not helps({}, (2, 36), "madvise") and helps(CPU, (2, 36), "madvise")


def test_the_setting_of_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "KERNEL_SETTING", tmp_path / "enabled")
    assert huge_pages._kernel_setting() == ""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages._kernel_setting() == "madvise"


def run(tmp_path, **environ):
    """The process that restarts: what it printed, the last line as JSON."""
    script = tmp_path / "restart.py"
    script.write_text(RESTART)
    started = subprocess.Popen(
        [sys.executable, "-u", str(script), "--config=a b", "x"],
        env={name: value for name, value in os.environ.items() if name != TUNABLES} | CPU | environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = started.communicate(timeout=60)[0].splitlines()
    assert started.returncode == 0
    return started.pid, lines[:-1], json.loads(lines[-1])


HAS_PAGES = helps(CPU, huge_pages._glibc(), huge_pages._kernel_setting())


@pytest.mark.skipif(not HAS_PAGES, reason="this machine has no large pages to ask for")
def test_a_process_is_started_again_once_with_its_arguments(tmp_path):
    pid, lines, told = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.arena_test=4")
    assert lines == ["started", "started"] and told["pid"] == pid
    assert told["argv"][1:] == ["--config=a b", "x"]
    assert told["tunables"] == "glibc.malloc.arena_test=4:glibc.malloc.hugetlb=1"
    _, lines, small = run(tmp_path, GLIBC_TUNABLES=f"{SETTING}=0")
    assert lines == ["started"]
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.
    assert small["faults"] > 16000 and told["faults"] < 1000
