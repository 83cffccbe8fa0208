"""What a process sets up once before it computes."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import jax

from vita_jax.parallel.huge_pages import has_accelerator_files

# Parameters of glibc's mallopt: mapped blocks, bytes free at the end of the heap before it shrinks, and by how many it
# grows. Threads keep arenas of their own: a single one makes large blocks cheaper still, but after many compilations it
# is in so many pieces that looking for a free one took half of a step of small operations.
_MALLOPT = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


def prepare_process() -> None:
    """Settings of a process that is going to compute: compiled programs are kept between runs, and where the CPU
    computes so is the memory that a step frees.

    To be called before anything else: threads keep the arenas that they began with, whatever is set later, and jax
    starts its threads when a backend is first asked for.
    """
    if jax.config.jax_platforms == "cpu" or not has_accelerator_files():
        _keep_freed_memory()
    _enable_compilation_cache()


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed: XLA allocates the buffers of a step anew in every step, and when they come from
    the kernel each time, filling in their pages takes up to half of it. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.values():
            mallopt(parameter, value)


def _enable_compilation_cache() -> None:
    """In JAX_COMPILATION_CACHE_DIR, or `~/.cache/vita_jax/compiled` if that is unset."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "vita_jax" / "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
