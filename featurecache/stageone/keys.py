"""From the cells of a manifest to their keys: payloads are hashed, or recognised as unchanged by their stat.

Cells and keys are held as columns, and a `Cell` is made when it is asked for: a run may have millions of them.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.data.readers.base import ReadFailure
from featurecache.store.recipe import KEY_BYTES, content_key, content_keys
from featurecache.store.records import StatRecord, unchanged_files
from featurecache.store.store import FeatureStore

MOST_HELD = 2_000_000  # rows whose keys are held in memory
ROWS_PER_QUESTION = 32  # loading that many takes as long as one look-up
BLOCK = 4096  # cells that are made Python objects at a time


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell to read: `index` is its row in the manifest's cells."""

    index: int
    kind: str
    value: str
    location: str
    selector: str


@dataclass(frozen=True, slots=True)
class Payload:
    """A cell's bytes, their SHA-256 and key, and for a file the stat of the very handle that was read."""

    data: bytes
    key: bytes
    record: StatRecord | None


class Cells(Sequence[Cell]):
    """Some cells of a manifest in some order, four bytes each.

    Attributes:
        table: the manifest's cells, all of them.
        indices: (n,) uint32, rows of `table`.
    """

    def __init__(self, table: pl.DataFrame, indices: NDArray[np.uint32]) -> None:
        self.table, self.indices = table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Cell]:
        for start in range(0, len(self), BLOCK):
            yield from self._made(self.indices[start : start + BLOCK])

    @overload
    def __getitem__(self, at: int) -> Cell: ...
    @overload
    def __getitem__(self, at: slice) -> Cells: ...
    def __getitem__(self, at: int | slice) -> Cell | Cells:
        if isinstance(at, slice):
            return Cells(self.table, self.indices[at])
        return self._made(self.indices[[at]])[0]

    def _made(self, indices: NDArray[np.uint32]) -> list[Cell]:
        part = self.table[indices].select("kind", "value", pl.col("location").fill_null(""), "selector")
        return [Cell(*row) for row in zip(indices.tolist(), *(column.to_list() for column in part), strict=True)]

    def pick(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Cells:
        """Those of a mask (n,), or at positions, in that order."""
        return Cells(self.table, self.indices[chosen])

    def joined(self, others: Cells) -> Cells:
        """These cells and then others of the same table."""
        return Cells(self.table, np.concatenate([self.indices, others.indices]))

    def column(self, name: str) -> pl.Series:
        """A column of the table, as these cells have it."""
        return self.table[name].gather(self.indices)

    @cached_property
    def _places(self) -> NDArray[np.int32]:
        places = np.full(self.table.height, -1, np.int32)
        places[self.indices] = np.arange(len(self), dtype=np.int32)
        return places

    def place(self, index: int) -> int:
        """Where among these cells the one in this row of the table is."""
        return int(self._places[index])

    def places(self, others: Cells) -> NDArray[np.int32]:
        """Where among these cells others of them are."""
        return self._places[others.indices]


class Keys:
    """The keys of some cells, in their order, where they are known.

    Attributes:
        values: (n, 32) uint8, zeros where unknown.
        known: (n,) bool.
    """

    def __init__(self, length: int) -> None:
        self.values = np.zeros((length, KEY_BYTES), np.uint8)
        self.known = np.zeros(length, np.bool_)

    def __getitem__(self, place: int) -> bytes | None:
        return self.values[place].tobytes() if self.known[place] else None

    def __setitem__(self, place: int, key: bytes) -> None:
        self.values[place] = np.frombuffer(key, np.uint8)
        self.known[place] = True

    def pick(self, chosen: NDArray[np.bool_]) -> Keys:
        """Those of a mask (n,)."""
        found = Keys(int(chosen.sum()))
        found.values[:], found.known[:] = self.values[chosen], self.known[chosen]
        return found

    def to_list(self) -> list[bytes | None]:
        """As Python objects."""
        blob = self.values.tobytes()
        return [blob[at * KEY_BYTES : (at + 1) * KEY_BYTES] if known else None for at, known in enumerate(self.known)]

    def places_of(self, keys: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """(place, key) of every cell that has one of `keys`, in the order of the cells."""
        first = np.unique(key_array(keys)[:, :8].copy().view(np.uint64))
        wanted = set(keys)
        hits = np.flatnonzero(np.isin(self.values[:, :8].copy().view(np.uint64).ravel(), first) & self.known)
        found = ((place, self.values[place].tobytes()) for place in hits.tolist())
        return [(place, key) for place, key in found if key in wanted]

    def distinct(self, chosen: NDArray[np.bool_]) -> int:
        """How many different keys there are among the chosen cells."""
        return len(np.unique(self.values[chosen & self.known].view(f"S{KEY_BYTES}")))


class KeySet:
    """A set of keys that takes about fifty bytes for each, a third of a Python set of them."""

    def __init__(self, keys: NDArray[np.uint8] | None = None) -> None:
        """Begin with keys (n, 32), each once, or with none."""
        self._keys = bytearray() if keys is None else bytearray(np.ascontiguousarray(keys))
        self._fill(2 * len(self) + 512)

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES

    def __contains__(self, key: bytes) -> bool:
        return self._table.item(self._find(key)) != 0

    def add(self, key: bytes) -> bool:
        """Put a key in; False where it was there already."""
        at = self._find(key)
        if self._table.item(at):
            return False
        self._keys += key
        self._table[at] = len(self)
        if len(self) * 3 > len(self._table) * 2:
            self._fill(2 * len(self._table))
        return True

    def _find(self, key: bytes) -> int:
        """The key's place in the table, or the free one where it belongs."""
        table, last = self._table, len(self._table) - 1
        at = int.from_bytes(key[:8], "little") & last
        while (number := table.item(at)) and self._keys[(number - 1) * KEY_BYTES : number * KEY_BYTES] != key:
            at = (at + 1) & last
        return at

    def _fill(self, least: int) -> None:
        """Make the table: key number + 1 at the place that the key's first bytes say, or at the next free one."""
        table = np.zeros(1 << (least - 1).bit_length(), np.uint32)
        last = np.uint64(len(table) - 1)
        places = np.frombuffer(bytes(self._keys), "<u8")[:: KEY_BYTES // 8] & last
        left = np.arange(len(self), dtype=np.uint32)
        while len(left):  # all at once: of those that want the same free place, one has it
            free = left[table[places[left]] == 0]
            table[places[free]] = free + 1
            left = left[table[places[left]] != left + 1]
            places[left] = (places[left] + np.uint64(1)) & last
        self._table = table


def present_cells(cells: pl.DataFrame, view: str | None = None) -> Cells:
    """The cells that hold something, of one view or all."""
    held = cells["value"].is_not_null()
    if view is not None:
        held &= cells["view"] == view
    return Cells(cells, held.arg_true().to_numpy().astype(np.uint32))


def key_array(keys: Sequence[bytes]) -> NDArray[np.uint8]:
    """(n, 32) uint8 from n keys."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)


class StoredKeys:
    """Which keys a recipe has rows for; asked once an image, from any thread.

    A look-up in the index takes 0.1 ms, so that where it pays all keys are held in memory, as they are now.
    """

    def __init__(self, store: FeatureStore, recipe_id: str, rows: int, questions: int, replica: int = 0) -> None:
        self._store, self._recipe_id, self._rows, self._replica = store, recipe_id, rows, replica
        self._held: KeySet | None = None
        if 0 < rows <= min(MOST_HELD, ROWS_PER_QUESTION * questions):
            _, keys, replicas = store.keys(recipe_id)
            self._held = KeySet(keys[replicas == replica])

    def __contains__(self, key: bytes) -> bool:
        if not self._rows:
            return False
        if self._held is not None:
            return key in self._held
        return bool(self._store.rows(self._recipe_id, key_array([key]), self._replica)[0] >= 0)


def _without_waiting(path: str, flags: int) -> int:
    """Open: a named pipe too at once, which else waits for somebody who writes."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_payload(cell: Cell) -> Payload | ReadFailure:
    """Read and hash one cell. I/O errors are values, and not deterministic: they are tried again on every run."""
    if cell.kind == "text":
        data = cell.value.encode()
        return Payload(data, content_key("text", cell.selector, hashlib.sha256(data).digest()), None)
    try:
        with open(cell.location, "rb", opener=_without_waiting) as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):  # a pipe may never end, and a device never does
                return ReadFailure("InputError", "not a regular file but a pipe, device or socket", False)
            now = time.time_ns()
            data = handle.read()
    except OSError as error:
        return ReadFailure(type(error).__name__, error.strerror or str(error), False)
    except MemoryError:
        return ReadFailure("MemoryError", "out of memory", False)
    digest = hashlib.sha256(data).digest()
    # A file that grew or shrank while it was read is keyed by the bytes that were read, and its stat says nothing.
    record = StatRecord.of(cell.location, status, now, digest) if len(data) == status.st_size else None
    return Payload(data, content_key(cell.kind, cell.selector, digest), record)


def unchanged(cells: Cells, store: FeatureStore, files: pl.DataFrame | None = None) -> Keys:
    """Keys of the cells whose file has the very stat that it had when it was hashed.

    A file is left out, and must be read, that is missing or changed, was hashed too soon after its last change, or lies
    on a file system that keeps no change time.

    Args:
        cells: of which.
        store: that remembers files.
        files: what `unchanged_files` has found of all their files, where that was asked already.
    """
    return _keys(cells, unchanged_files(store.payload_table(cells.column("location"))) if files is None else files)


def last_keys(cells: Cells, store: FeatureStore) -> Keys:
    """Keys that the cells' files had when they were last hashed, whatever has become of them."""
    return _keys(cells, store.payload_table(cells.column("location")))


def _keys(cells: Cells, records: pl.DataFrame) -> Keys:
    """Keys of the files that have a record; one of `records` a path."""
    keys = Keys(len(cells))
    places = pl.DataFrame({"path": cells.column("location")}).with_row_index("place")
    found = places.join(records.select("path", "sha256"), on="path", how="inner")
    if found.height:
        at = found["place"].to_numpy()
        keys.values[at] = file_keys(cells.column("selector").gather(at), found["sha256"].to_numpy())
        keys.known[at] = True
    return keys


def file_keys(selectors: pl.Series, sha256: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 32) keys of parts of files, from the selectors' JSON and the SHA-256 of the files, (n, 32)."""
    blob = np.ascontiguousarray(sha256).tobytes()
    digests = [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]
    return content_keys("file", selectors.to_list(), digests)
