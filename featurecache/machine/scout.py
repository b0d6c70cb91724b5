"""Looks at files: at their stat alone, or at the bytes too. Also the script of a process that does so for another one.

`python -I -S scout.py look|read` imports a handful of standard modules, so that it starts in hundredths of a second. It
takes blocks of paths from stdin, each as its length in bytes (4, little-endian) and the paths with zero bytes between
them, and answers with one RECORD a path on stdout. See `featurecache.machine.scouts` for why.
"""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

RECORD: Final = struct.Struct("<?qqqQQq32s")
"""Whether there is an answer; size, mtime_ns, ctime_ns, inode, device, time.time_ns() of the look; SHA-256 if read."""
NOTHING: Final = bytes(RECORD.size)
LENGTH: Final = 4
_PART: Final = 1 << 24  # bytes of a file that are in memory at a time
_ALL_BITS: Final = 2**64 - 1
# A named pipe opens at once instead of waiting for somebody who writes.
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def look(path: str | bytes) -> bytes:
    """The RECORD of a file's stat; NOTHING where it has none."""
    try:
        return _record(os.stat(path), b"")
    except (OSError, ValueError, struct.error):
        return NOTHING


def read(path: str | bytes) -> bytes:
    """The RECORD of a file, from the very handle that its bytes are hashed by.

    NOTHING for what can't be read or is no regular file, and for a file that grows or shrinks meanwhile.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError):
        return NOTHING
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return NOTHING
        now, left, digest = time.time_ns(), status.st_size, hashlib.sha256()
        while part := os.read(descriptor, min(left, _PART) + 1):  # one more, to see the end with the same call
            digest.update(part)
            left -= len(part)
            if left <= 0:
                break
        return _record(status, digest.digest(), now) if left == 0 else NOTHING
    except (OSError, MemoryError, struct.error):
        return NOTHING
    finally:
        os.close(descriptor)


def _record(status: os.stat_result, sha256: bytes, now: int = 0) -> bytes:
    inode, device = status.st_ino & _ALL_BITS, status.st_dev & _ALL_BITS
    return RECORD.pack(True, status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode, device, now, sha256)


def main() -> None:
    """Answer until there are no more questions, or nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    do: Callable[[bytes], bytes] = {"look": look, "read": read}[sys.argv[1]]
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        while len(length := source.read(LENGTH)) == LENGTH:
            paths = source.read(int.from_bytes(length, "little")).split(b"\0")
            sink.write(b"".join(map(do, paths)))
            sink.flush()
    except OSError:
        os._exit(1)  # whoever asked is gone: there is nobody to tell


if __name__ == "__main__":
    main()
