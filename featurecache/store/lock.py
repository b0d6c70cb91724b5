"""One writer at a time: a lock that dies with its process, plus a registry for a second writer within the process."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from featurecache.errors import LockedError, StoreError
from featurecache.store.files import storage_errors

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# (device, inode) of the lock file -> process that holds it. lockf does not exclude a second open in the same process,
# and drops the lock when any descriptor of the file is closed, so the registry is asked before the file is even opened.
_held: dict[tuple[int, int], int] = {}
_registry = threading.Lock()


class WriterLock:
    """The writer's lock on a store: `lockf`, since `flock` is inherited by workers and outlives a killed writer."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Args:
            path: the lock file; it is created and keeps the holder's process id.

        Raises:
            LockedError: names the process that holds it.
            StoreError: the disk refused, or the store can't be written.
        """
        self.path = path
        with _registry:
            descriptor = self._free_descriptor()
            try:
                _lock(descriptor)
            except OSError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise self._refused(holder) from None
            status = os.fstat(descriptor)
            self._identity = (status.st_dev, status.st_ino)
            _held[self._identity] = os.getpid()
        self._descriptor = descriptor
        self._released = False
        self.pid = os.getpid()
        try:
            with storage_errors(f"{path.parent}: opening for writing failed"):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{self.pid}\n".encode())
        except BaseException:
            self.release()
            raise

    def _free_descriptor(self) -> int:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            pass
        else:
            if _held.get((status.st_dev, status.st_ino)) == os.getpid():
                raise self._refused(os.getpid())
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:  # a read-only medium, or a store of somebody else
            raise StoreError(
                f"{self.path.parent}: this store can't be written: {error.strerror or error} ({self.path.name}). "
                "Commands that only read it work as before. To add to it, copy it to where you may write, or have "
                "it made writable."
            ) from error

    def _refused(self, pid: int) -> LockedError:
        who = "this process" if pid == os.getpid() else f"process {pid}" if pid else "another process"
        return LockedError(
            f"{self.path.parent}: {who} is writing to this store. Wait until it has ended; reading is possible "
            "meanwhile.",
            pid=pid,
        )

    def release(self) -> None:
        """Give the lock back; in a process forked from the holder this does nothing."""
        with _registry:
            if self._released or self.pid != os.getpid():
                return
            self._released = True
            del _held[self._identity]
            os.close(self._descriptor)


def writer_of(path: Path) -> int | None:
    """The process that holds the lock now, 0 where it can't be told; None where nobody does, or nobody may look."""
    try:
        status = os.stat(path)
        with _registry:
            if (status.st_dev, status.st_ino) in _held:  # closing a descriptor of one's own lock file would drop it
                return os.getpid()
            descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        _lock(descriptor)
    except OSError:
        return _holder(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # behind the process id: a locked byte can't be read there
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(descriptor: int) -> int:
    """The process id written in the lock file, 0 where there is none."""
    try:
        return int(os.read(descriptor, 32).split()[0])
    except (OSError, ValueError, IndexError):
        return 0
