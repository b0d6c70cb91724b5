"""Chunk files mapped side by side into one range of addresses: rows of many chunks are gathered by one indexing."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.store.format import ArraySpec

AVAILABLE = sys.platform != "win32" and sys.maxsize > 2**32
"""Whether this platform can map a file at a chosen address; elsewhere chunks are read whole instead."""

Gather = Callable[[NDArray[Any], NDArray[np.int64], NDArray[Any]], None]
"""`gather(source, index, out)` does `out[i] = source[index[i]]`; only rows of `out` must lie apart."""

PIECE_BYTES = 1 << 18
_PROT_NONE = 0
_MAP_FIXED = 0x10  # the same on Linux, macOS and the BSDs; Python's mmap has no name for it
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)
_FAILED = ctypes.c_void_p(-1).value


def gather_rows(source: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """`Gather` by numpy, which can't gather into a part of wider rows: in pieces that stay in the processor's cache."""
    step = max(1, PIECE_BYTES // max(1, out.itemsize * out.shape[1]))
    for start in range(0, len(index), step):
        out[start : start + step] = source[index[start : start + step]]


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


_LIBC: Any = _libc() if AVAILABLE else None


def _mmap(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
    # Not Python's mmap: that keeps a descriptor open for each map, and can't choose the address.
    found = _LIBC.mmap(address, length, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


class Window:
    """Room for `capacity` uncompressed chunks of one array. Not thread-safe: the owner holds a lock around each call.

    A chunk file is the rows and four bytes of checksum. Each is mapped at the next page boundary after its predecessor,
    so the step from row to row breaks between chunks. Counted in units of gcd(page, bytes of a row), though, every row
    starts at a whole number, and one strided view, whose rows overlap, indexes them all.

    A chunk file is checked when it is mapped, not again at each read: that would cost as much as the read. The store
    itself replaces files by rename and never shortens one, so that what is mapped stays as it was, even where it is
    deleted. Whoever truncates a chunk file by other means while it is mapped ends the readers with SIGBUS, or makes
    them read zeros in its last page; one that was truncated before is refused.
    """

    def __init__(self, spec: ArraySpec, capacity: int) -> None:
        """Reserve addresses; no memory is used and nothing is mapped.

        Raises:
            OSError: the address space is limited.
        """
        self.capacity = capacity
        self.mapped = np.zeros(capacity, np.bool_)
        self.used = np.zeros(capacity, np.int64)
        self._size = spec.rows * spec.row_bytes + 4
        self._step = -(-self._size // mmap.PAGESIZE) * mmap.PAGESIZE
        total = self._step * capacity
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._address = _mmap(None, total, _PROT_NONE, flags, -1)
        weakref.finalize(self, _LIBC.munmap, self._address, total).atexit = False
        region: Any = (ctypes.c_char * total).from_address(self._address)
        self._bytes: NDArray[np.uint8] = np.frombuffer(region, np.uint8)
        unit = math.gcd(mmap.PAGESIZE, spec.row_bytes)
        self._chunk_units, self._row_units = self._step // unit, spec.row_bytes // unit
        length = spec.row_bytes // spec.dtype.itemsize
        self._rows: NDArray[Any] = np.ndarray(
            (total // unit - self._row_units + 1, length), spec.dtype, self._bytes, 0, (unit, spec.dtype.itemsize)
        )

    def map(self, chunk: int, descriptor: int) -> None:
        """Map a chunk file, which must have its full size."""
        address = self._address + chunk * self._step
        _mmap(address, self._size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        self.mapped[chunk] = True

    def unmap(self, chunk: int) -> None:
        """Give a chunk's pages back, keeping the addresses reserved."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self.mapped[chunk] = False
        _mmap(self._address + chunk * self._step, self._step, _PROT_NONE, flags, -1)

    def content(self, chunk: int) -> NDArray[np.uint8]:
        """The bytes of a mapped chunk without its checksum, not copied."""
        return self._bytes[chunk * self._step : chunk * self._step + self._size - 4]

    def take(
        self, chunks: NDArray[np.int64], offsets: NDArray[np.int64], out: NDArray[Any], gather: Gather = gather_rows
    ) -> None:
        """Copy rows to `out`, (n, values of a row). Every chunk must be mapped: one that is not ends the process."""
        if not self.mapped[chunks].all():
            raise RuntimeError("a row of a chunk that is not mapped was asked for")
        gather(self._rows, chunks * self._chunk_units + offsets * self._row_units, out)
