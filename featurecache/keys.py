"""From the cells of a manifest to their keys: payloads are hashed, or recognised as unchanged by their stat."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.data.readers.base import ReadFailure
from featurecache.store.files import has_change_time
from featurecache.store.recipe import KEY_BYTES, content_key
from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore

MOST_HELD = 2_000_000  # rows whose keys are held in memory
ROWS_PER_QUESTION = 32  # loading that many takes as long as one look-up


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


def present_cells(cells: pl.DataFrame, view: str | None = None) -> list[Cell]:
    """The cells that hold something, of one view or all."""
    held = cells.with_row_index("index").filter(pl.col("value").is_not_null())
    if view is not None:
        held = held.filter(pl.col("view") == view)
    rows = held.select("index", "kind", "value", pl.col("location").fill_null(""), "selector").iter_rows()
    return [Cell(*row) for row in rows]


def key_array(keys: Sequence[bytes]) -> NDArray[np.uint8]:
    """(n, 32) uint8 from n keys."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)


class StoredKeys:
    """Which keys a recipe has rows for, as of now; asked once an image, from any thread.

    A look-up in the index takes 0.1 ms, so that the first eight bytes of all keys are held in memory where that pays:
    what is not among them is not stored, and only what is gets looked up.
    """

    def __init__(self, store: FeatureStore, recipe_id: str, rows: int, questions: int) -> None:
        self._store, self._recipe_id, self._rows = store, recipe_id, rows
        self._prefixes: NDArray[np.uint64] | None = None
        if 0 < rows <= min(MOST_HELD, ROWS_PER_QUESTION * questions):
            keys = store.keys(recipe_id)[1]
            self._prefixes = np.sort(np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel())

    def __contains__(self, key: bytes) -> bool:
        if not self._rows:
            return False
        if self._prefixes is not None:
            prefix = np.frombuffer(key, np.uint64, 1)
            at = int(np.searchsorted(self._prefixes, prefix)[0])
            if at == len(self._prefixes) or self._prefixes[at] != prefix[0]:
                return False
        return bool(self._store.rows(self._recipe_id, key_array([key]))[0] >= 0)


def read_payload(cell: Cell) -> Payload | ReadFailure:
    """Read and hash one cell. I/O errors are values, and not deterministic: they are tried again on every run."""
    if cell.kind == "text":
        data = cell.value.encode()
        return Payload(data, content_key("text", cell.selector, hashlib.sha256(data).digest()), None)
    try:
        with open(cell.location, "rb") as handle:
            status = os.fstat(handle.fileno())
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


def unchanged(cells: Sequence[Cell], store: FeatureStore) -> dict[int, bytes]:
    """Keys of the cells whose file has the very stat that it had when it was hashed: {cell index: key}.

    A file is left out, and must be read, that is missing or changed, was hashed too soon after its last change, or lies
    on a file system that keeps no change time.
    """
    records = _records(cells, store)
    trusted: dict[int, bool] = {}  # device -> whether it keeps a change time

    def holds(record: StatRecord) -> bool:
        try:
            status = os.stat(record.path)
        except OSError:
            return False
        if status.st_dev not in trusted:
            trusted[status.st_dev] = has_change_time(Path(record.path))
        return trusted[status.st_dev] and record.matches(status)

    return _keys(cells, {location: record.sha256 for location, record in records.items() if holds(record)})


def last_keys(cells: Sequence[Cell], store: FeatureStore) -> dict[int, bytes]:
    """Keys that the cells' files had when they were last hashed, whatever has become of them: {cell index: key}."""
    return _keys(cells, {location: record.sha256 for location, record in _records(cells, store).items()})


def _records(cells: Sequence[Cell], store: FeatureStore) -> dict[str, StatRecord]:
    return store.payloads(list({cell.location for cell in cells if cell.kind == "file"}))


def _keys(cells: Sequence[Cell], digests: Mapping[str, bytes]) -> dict[int, bytes]:
    return {
        cell.index: content_key(cell.kind, cell.selector, digests[cell.location])
        for cell in cells
        if cell.kind == "file" and cell.location in digests
    }
