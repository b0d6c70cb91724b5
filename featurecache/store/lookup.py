"""From many keys to their rows: the rows of a recipe read at once, and searched as arrays."""

from __future__ import annotations

import sqlite3

import numpy as np
from numpy.typing import NDArray

from featurecache.store.recipe import KEY_BYTES
from featurecache.store.schema import no_collections

_BLOCK = 8192  # rows that are Python objects at a time
# SQLite finds no flipped bits: what leads from a key to a row is compared with the row itself.
BY_KEY = """
SELECT found.row, rows.key, rows.replica FROM rows AS found JOIN rows ON rows.recipe = found.recipe AND
rows.row = found.row WHERE found.recipe = ? AND found.key = ? AND found.replica = ?"""


def merge_keys(
    connection: sqlite3.Connection, number: int, keys: NDArray[np.uint8], replicas: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Look many keys up at once by a binary search in all rows, which come from the table itself (see `BY_KEY`)."""
    known_rows, known_keys, known_replicas, _ = all_rows(connection, number)
    known, wanted = (np.ascontiguousarray(side).view(np.uint64) for side in (known_keys, keys))
    # The first eight bytes, read as a number, lead to the first row that may be meant; from there on all is compared.
    first, sought = (side[:, 0].copy().view(">u8").astype(np.uint64) for side in (known, wanted))
    by_key = np.argsort(first)
    first, known, known_replicas, known_rows = (
        first[by_key], known[by_key], known_replicas[by_key], known_rows[by_key]
    )  # fmt: skip
    order = np.argsort(sought)  # searching in order stays in the processor's caches
    at = np.empty(len(sought), np.int64)
    at[order] = np.searchsorted(first, sought[order])
    result, left = np.full(len(sought), -1, np.int64), np.arange(len(sought))
    while len(left):
        left = left[at[left] < len(first)]
        left = left[first[at[left]] == sought[left]]
        here = at[left]
        same = (known[here] == wanted[left]).all(axis=1) & (known_replicas[here] == replicas[left])
        result[left[same]] = known_rows[here[same]]
        left = left[~same]
        at[left] += 1
    return result


def all_rows(
    connection: sqlite3.Connection, number: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32], NDArray[np.int64]]:
    """Row ids (n,), keys (n, 32), replicas (n,) and slots (n,) of a recipe; few are Python objects at a time."""
    keys, numbers = bytearray(), [np.zeros((3, 0), np.int64)]
    with no_collections():
        query = "SELECT key, row, replica, slot FROM rows WHERE recipe = ? ORDER BY row"
        found = connection.execute(query, (number,))
        while block := found.fetchmany(_BLOCK):
            block_keys, *rest = zip(*block, strict=True)
            keys += b"".join(block_keys)
            numbers.append(np.array(rest, np.int64))
    rows, replicas, slots = np.concatenate(numbers, axis=1)
    return rows, np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES), replicas.astype(np.int32), slots
