"""Two programs against each other in one run: they take turns, so that whatever else the machine does meets both.

A ratio is taken within every turn, of samples that lie side by side in time; what is reported is the median of these
ratios and their quartiles. Which side begins changes from turn to turn.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import SETTING, TUNABLES

Call = Callable[[], object]  # computes, and returns when everything is there

PAUSE_SECONDS = 0.01  # before a sample: threads of the other side have stopped to look for work by then
PILOT_CALLS = 2
# How time is taken: from the wall, or as what all threads of this process have worked, which other jobs do not change
# much. The latter says something of one thread only: threads that wait for each other may work at waiting.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Ratio:
    """What the turns gave.

    Attributes:
      median, lower, upper: of the other side's time over the first one's, with both quartiles; above 1 the first side
        is faster.
      first_seconds, other_seconds: medians of one call.
    """

    median: float
    lower: float
    upper: float
    first_seconds: float
    other_seconds: float


def take_turns(first: Call, other: Call, *, turns: int, sample_seconds: float, clock: str = "wall") -> Ratio:
    """Times both sides in turn.

    Args:
      first, other: the sides; each is called before anything is timed, so compilation does not count.
      turns: samples of each side, at least 1.
      sample_seconds: both sides are called so often for a sample that the faster one takes about as long as this.
      clock: a name of `CLOCKS`.
    """
    fastest = min(pilot_seconds(call, clock) for call in (first, other))
    calls = max(1, math.ceil(sample_seconds / max(fastest, 1e-9)))
    seconds: dict[int, list[float]] = {0: [], 1: []}
    sides = list(enumerate((first, other)))
    for turn in range(turns):
        for number, call in sides if turn % 2 == 0 else reversed(sides):
            seconds[number].append(_sample(call, calls, clock))
    firsts, others = np.asarray(seconds[0]), np.asarray(seconds[1])
    lower, median, upper = np.quantile(others / firsts, (0.25, 0.5, 0.75))
    return Ratio(float(median), float(lower), float(upper), float(np.median(firsts)), float(np.median(others)))


def pilot_seconds(call: Call, clock: str = "wall") -> float:
    """Median seconds of a few calls after a first one that is not counted."""
    call()
    return float(np.median([_sample(call, 1, clock) for _ in range(PILOT_CALLS)]))


def _sample(call: Call, calls: int, clock: str) -> float:
    time.sleep(PAUSE_SECONDS)
    start = CLOCKS[clock]()
    for _ in range(calls):
        call()
    return (CLOCKS[clock]() - start) / calls


def use_cores(count: int | None) -> int:
    """Binds this process to some of the cores it may run on, before XLA makes its threads: it makes one for each core
    of the process's affinity.

    Args:
      count: None leaves all of them.

    Returns:
      How many cores the process has now; what the other framework's number of threads is to be set to.

    Raises:
      UserError: there are not so many, or the system has no affinity of processes.
    """
    if not hasattr(os, "sched_setaffinity"):
        if count is not None:
            raise UserError(
                f"--threads {count}: processes cannot be bound to cores on {platform.system()}; leave it out"
            )
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if count is None:
        return len(cores)
    if not 1 <= count <= len(cores):
        raise UserError(f"--threads {count} must be between 1 and the {len(cores)} cores this process may use")
    os.sched_setaffinity(0, cores[:count])
    return count


def describe_machine(packages: Sequence[str]) -> dict[str, str]:
    """What results depend on, without any name of the machine: processor, its vector units, load, versions."""
    described = {"processor": platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(
            (part.strip() for part in line.split(":", 1)) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        flags = fields.get("flags", "").split()
        vectors = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "")
        described["processor"] = " ".join(filter(None, (fields.get("model name", platform.machine()), vectors)))
    described["cores"] = str(os.cpu_count())
    if hasattr(os, "getloadavg"):
        described["load before"] = f"{os.getloadavg()[0]:.1f}"
    # Of both sides: see vita_jax/parallel/huge_pages.py.
    described["pages of memory"] = (
        "2 MiB" if f"{SETTING}=1" in os.environ.get(TUNABLES, "") else "as the system has them"
    )
    described["python"] = platform.python_version()
    return described | {name: metadata.version(name) for name in packages}


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Aligned columns, those of numbers to the right; or a table in Markdown."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numeric = [index > 0 and all(row[index][:1].isdigit() for row in rows) for index in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    lines = [line(head), *(line(row) for row in rows)]
    if markdown:
        lines.insert(1, "| " + " | ".join("---:" if right else "---" for right in numeric) + " |")
    return "\n".join(lines)


def format_machine(machine: Mapping[str, str]) -> str:
    """One line."""
    return "; ".join(f"{name} {value}" for name, value in machine.items())


def write_page(output: Path, text: str, notes: str, content: Mapping[str, object]) -> None:
    """Writes results as `<output>.md` and `<output>.json`.

    Args:
      output: a path without an ending.
      text: the page; what an earlier one has from the line `notes` on, a person's words, is put behind it.
      content: for JSON.
    """
    page, data = output.with_suffix(".md"), output.with_suffix(".json")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = page.read_text(encoding="utf-8") if page.is_file() else ""
    kept = f"\n{notes}{written.split(notes, 1)[1]}" if notes in written else ""
    page.write_text(text + kept, encoding="utf-8")
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
