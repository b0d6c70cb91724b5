"""From many keys to their rows: the rows of a recipe read at once, and searched as arrays."""

from __future__ import annotations

import sqlite3

import numpy as np
from numpy.typing import NDArray

from featurecache.store.packed import blobs, numbers, packed, to_blobs, to_numbers
from featurecache.store.recipe import KEY_BYTES

# SQLite finds no flipped bits: what leads from a key to a row is compared with the row itself.
BY_KEY = """
SELECT found.row, rows.key, rows.replica FROM rows AS found JOIN rows ON rows.recipe = found.recipe AND
rows.row = found.row WHERE found.recipe = ? AND found.key = ? AND found.replica = ?"""


class KeyTable:
    """Rows that are found by key and replica, many at once, by a binary search."""

    def __init__(self, rows: NDArray[np.int64], keys: NDArray[np.uint8], replicas: NDArray[np.int32]) -> None:
        """Take row ids (n,), keys (n, 32) and replicas (n,)."""
        first = _first(keys)
        order = np.argsort(first)
        self._first, self._rows, self._replicas = first[order], rows[order], replicas[order]
        self._keys = _words(keys)[order]

    def find(self, keys: NDArray[np.uint8], replicas: NDArray[np.int32]) -> NDArray[np.int64]:
        """(n,) row ids for keys (n, 32) and replicas (n,); -1 where there is no such row."""
        wanted, sought = _words(keys), _first(keys)
        # The first eight bytes, read as a number, lead to the first row that may be meant; from there on all is
        # compared. Searching in order stays in the processor's caches.
        order = np.argsort(sought)
        at = np.empty(len(sought), np.int64)
        at[order] = np.searchsorted(self._first, sought[order])
        result, left = np.full(len(sought), -1, np.int64), np.arange(len(sought))
        while len(left):
            left = left[at[left] < len(self._first)]
            left = left[self._first[at[left]] == sought[left]]
            here = at[left]
            same = (self._keys[here] == wanted[left]).all(axis=1) & (self._replicas[here] == replicas[left])
            result[left[same]] = self._rows[here[same]]
            left = left[~same]
            at[left] += 1
        return result


def _words(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys).view(np.uint64)


def _first(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return _words(keys)[:, 0].copy().view(">u8").astype(np.uint64)


def merge_keys(
    connection: sqlite3.Connection, number: int, keys: NDArray[np.uint8], replicas: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Look many keys up at once in all rows of a recipe, which come from the table itself (see `BY_KEY`)."""
    rows, known, numbers_, _ = all_rows(connection, number)
    return KeyTable(rows, known, numbers_).find(keys, replicas)


def all_rows(
    connection: sqlite3.Connection, number: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32], NDArray[np.int64]]:
    """Row ids (n,), keys (n, 32), replicas (n,) and slots (n,) of a recipe."""
    columns = [numbers("row"), blobs("key"), numbers("replica"), numbers("slot")]
    rows, replicas, slots = ([np.zeros(0, np.int64)] for _ in range(3))
    keys = [np.zeros((0, KEY_BYTES), np.uint8)]
    for count, found in packed(connection, "rows", "row", -1, columns, "recipe = ?", [number]):
        rows.append(to_numbers(found[0], count))
        keys.append(to_blobs(found[1], count, KEY_BYTES))
        replicas.append(to_numbers(found[2], count))
        slots.append(to_numbers(found[3], count))
    return (
        np.concatenate(rows),
        np.concatenate(keys),
        np.concatenate(replicas).astype(np.int32),
        np.concatenate(slots),
    )
