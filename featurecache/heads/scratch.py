"""A temporary folder that goes away even after a kill: the next one that is made removes those of dead processes."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
YOUNG = 60.0  # seconds in which a folder is left alone: its process may not have locked it yet


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """An empty folder among the system's temporary ones (TMPDIR), removed at the end.

    A lock on a file in it ends with the process, however that ends, and with it the folder's claim to be kept.

    Args:
        prefix: how its name begins; folders of that name whose lock is free are removed first.
    """
    remove_dead(Path(tempfile.gettempdir()), prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / LOCK).open("wb") as lock:
            _try_lock(lock)
            (folder / "files").mkdir()
            yield folder / "files"


def remove_dead(parent: Path, prefix: str) -> None:
    """Remove folders that begin with `prefix` and hold a lock that nobody has any more."""
    for path in parent.glob(f"{prefix}*/{LOCK}"):
        with suppress(OSError):  # of another user, or gone meanwhile
            if time.time() - path.stat().st_mtime >= YOUNG and not path.is_symlink():
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    with path.open("rb") as lock:
        if _try_lock(lock):
            shutil.rmtree(path.parent, ignore_errors=True)


def _try_lock(file: IO[bytes]) -> bool:
    """Whether this open file has the lock now; never on Windows, which keeps what is open from being removed anyhow."""
    if sys.platform == "win32":
        return False
    try:
        # Not lockf: that can't tell two folders of one process apart, and forgets a lock when a copy is closed.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
