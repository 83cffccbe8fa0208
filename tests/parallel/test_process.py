"""What a process sets up before it computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import numpy as np
from vita_jax.parallel.process import prepare_process

if {prepared}:
    prepare_process()

def touch():
    np.full(16 << 20, 1.0, np.float32)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_not_fetched_again():
    """Blocks of 64 MiB: once the first was freed, the same pages serve all others."""

    def faults(prepared: bool) -> int:
        code = COUNT_FAULTS.format(prepared=prepared)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    without, kept = faults(False), faults(True)
    assert kept < 16
    assert without > 8 * kept
