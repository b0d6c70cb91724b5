"""How much memory there is: what `--memory auto` goes by."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

UNKNOWN = 4 << 30  # assumed where the system does not say
CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be had without swapping, page cache counted as free, within the limit of a container."""
    found = [value for value in (_available(), _below_limit(CGROUP)) if value is not None]
    return min(found, default=UNKNOWN)


def give_back() -> None:
    """Hand memory that was freed back to the system, where the C library is glibc.

    It keeps what lies between things that are still in use, of each thread: after XGBoost's sketches, hundreds of
    megabytes that nothing is put into again.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            said = next((line.split()[1] for line in file if line.startswith("MemAvailable:")), None)
        if said is not None:
            return int(said) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _below_limit(folder: Path) -> int | None:
    """What a container (cgroup v2) may still take; its page cache is given back when it needs room."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))  # "max" where there is none
        current = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        cache = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    except (OSError, ValueError):
        return None
    return max(limit - current + cache, 0)
