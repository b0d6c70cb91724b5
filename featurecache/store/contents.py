"""Which contents datasets name, and which rows and files hold them: sets of keys, as sorted arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.store.binding import STORED, stored_binding
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.recipe import KEY_BYTES, content_keys
from featurecache.store.records import load_failures

_BLOCK = 65_536  # rows that are Python objects at a time

Keys = NDArray[np.bytes_]
"""(n,) of 32 bytes each. Their zeros at the end count as padding, which is the same for all, so that they compare."""
Choice = Callable[[Keys], NDArray[np.bool_]]


def no_keys() -> Keys:
    """None."""
    return np.zeros(0, f"S{KEY_BYTES}")


def packed(keys: Sequence[bytes]) -> Keys:
    """Keys as an array."""
    return np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")


def among(keys: Keys, known: Keys) -> NDArray[np.bool_]:
    """(n,) whether each key is among those known, which are sorted."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    return np.asarray(known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys, np.bool_)


def columns_of(index: Index, name: str) -> dict[str, Any]:
    """The stored columns of a dataset that is there."""
    return dict(zip(STORED, stored_binding(index, name) or (), strict=True))


def bound_keys(index: Index, name: str) -> Keys:
    """The keys of all cells of a dataset whose content is known."""
    keys = np.frombuffer(columns_of(index, name)["keys"], np.uint8).reshape(-1, KEY_BYTES)
    return np.ascontiguousarray(keys[keys.any(axis=1)]).view(f"S{KEY_BYTES}").ravel()


def sample_ids(index: Index, name: str) -> list[str]:
    """The ids of a dataset's samples."""
    return [str(sample) for sample in json.loads(columns_of(index, name)["ids"])]


def row_blocks(index: Index, stored: StoredRecipe) -> Iterator[tuple[NDArray[np.int64], Keys, NDArray[np.int32]]]:
    """Ids, keys and replicas of a recipe's rows in the order in which they lie, a part at a time."""
    for first in range(0, stored.next_chunk * stored.layout.rows_per_chunk, _BLOCK):
        found = index.rows_between(stored.number, first, first + _BLOCK)
        yield np.array([row[0] for row in found], np.int64), packed([row[1] for row in found]), _replicas(found)


def _replicas(found: list[tuple[int, bytes, int, int]]) -> NDArray[np.int32]:
    return np.array([row[2] for row in found], np.int32)


def all_rows(index: Index, stored: StoredRecipe) -> tuple[NDArray[np.int64], Keys, NDArray[np.int32]]:
    """Ids, keys and replicas of all rows of a recipe in the order in which they lie."""
    blocks = [(np.zeros(0, np.int64), no_keys(), np.zeros(0, np.int32)), *row_blocks(index, stored)]
    ids, keys, replicas = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return ids, keys, replicas


def rows_where(index: Index, stored: StoredRecipe, chosen: Choice) -> NDArray[np.int64]:
    """Ids of the rows whose keys are chosen."""
    return np.concatenate([np.zeros(0, np.int64), *(ids[chosen(keys)] for ids, keys, _ in row_blocks(index, stored))])


def rows_of(index: Index, stored: StoredRecipe, keys: Keys) -> NDArray[np.int64]:
    """Ids of the rows of some contents, all replicas."""
    with index.reading() as connection:
        query = "SELECT row FROM rows WHERE recipe = ? AND key = ?"
        raw = (key.ljust(KEY_BYTES, b"\0") for key in keys.tolist())  # numpy takes zeros at the end for padding
        rows = [row for key in raw for (row,) in connection.execute(query, (stored.number, key))]
    return np.array(rows, np.int64)


def failures_where(index: Index, stored: StoredRecipe, chosen: Choice) -> list[bytes]:
    """The keys of a recipe's failures that are chosen."""
    keys = list(load_failures(index, stored.number))
    return [key for key, yes in zip(keys, chosen(packed(keys)).tolist(), strict=True) if yes]


def known_files(index: Index, chosen: Choice) -> list[str | bytes]:
    """Paths of the files that are known as hashed and whose key, as a whole, is chosen."""
    paths: list[str | bytes] = []
    with index.reading() as connection:
        found = connection.execute("SELECT path, sha256 FROM payloads")
        while block := found.fetchmany(_BLOCK):
            keys = content_keys("file", ["{}"] * len(block), [row[1] for row in block])
            picked = chosen(np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel())
            paths += [row[0] for row, yes in zip(block, picked.tolist(), strict=True) if yes]
    return paths
