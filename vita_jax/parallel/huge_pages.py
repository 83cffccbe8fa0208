"""Memory in pages of 2 MiB on CPUs: what XLA allocates anew in every step is then filled in 512 times as fast.

Without them a fifth to a third of a training step on a CPU is the kernel filling in pages of 4 KiB. glibc asks for
large ones by itself, but only if the environment says so when a process starts. No jax here: the process that is
started again would import it twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FIRST_GLIBC = (2, 35)  # that has the setting

# Device files of GPUs and TPUs.
ACCELERATOR_FILES = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")


def restart_with_huge_pages() -> None:
    """Replaces this process by one with the same arguments and large pages, if that makes it faster; else returns.

    To be called first of all in a command. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` leaves pages as they are.
    """
    if sys.platform == "linux" and sys.executable and helps(os.environ, _glibc(), _kernel_setting()):
        rest = [value for value in (os.environ.get(TUNABLES), f"{SETTING}=1") if value]
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: ":".join(rest)})


def helps(environ: Mapping[str, str], glibc: tuple[int, ...], kernel_setting: str) -> bool:
    """Whether the setting changes anything.

    Args:
      environ: variables of this process.
      glibc: its version; () for another C library.
      kernel_setting: "madvise" if programs get large pages that ask for them; with "always" they have them already.
    """
    computes_on_cpu = environ.get("JAX_PLATFORMS") == "cpu" or not has_accelerator_files()
    return (
        computes_on_cpu
        and glibc >= FIRST_GLIBC
        and kernel_setting == "madvise"
        and SETTING not in environ.get(TUNABLES, "")
    )


def has_accelerator_files() -> bool:
    """Whether this machine has a GPU or TPU, without asking jax."""
    return any(next(Path("/dev").glob(name), None) for name in ACCELERATOR_FILES)


def _glibc() -> tuple[int, ...]:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()
    except (ValueError, OSError):
        return ()


def _kernel_setting() -> str:
    """Which of "always [madvise] never" is chosen; "" on a kernel without."""
    try:
        choices = KERNEL_SETTING.read_text(encoding="ascii").split()
    except OSError:
        return ""
    return next((choice.strip("[]") for choice in choices if choice.startswith("[")), "")
