"""Many rows of an SQLite table as columns: SQLite joins their values to text, so that none becomes a Python object.

That takes a third of the time of fetching tuples, and other threads work meanwhile.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 1 << 13  # to a block


def packed(
    connection: sqlite3.Connection,
    table: str,
    key: str,
    after: Any,
    columns: Sequence[str],
    where: str = "TRUE",
    values: Sequence[Any] = (),
) -> Iterator[tuple[int, list[str]]]:
    """Yield blocks of rows in the order of `key`: how many there are, and each column as text.

    Args:
        connection: of the database.
        table: to read.
        key: a column by which rows are sorted, unique among those that `where` leaves.
        after: what is less than every key.
        columns: what to make of the rows: `numbers("size")`, `blobs("sha256")`, `texts("path")`.
        where: which rows.
        values: of the question marks in `where`.

    Raises:
        sqlite3.DatabaseError: the table is damaged.
    """
    query = (
        f"SELECT COUNT(*), MAX({key}), {', '.join(columns)} FROM (SELECT * FROM {table} "
        f"WHERE ({where}) AND {key} > ? ORDER BY {key} LIMIT {ROWS})"
    )
    while True:
        count, last, *found = connection.execute(query, (*values, after)).fetchone()
        if not count:
            return
        if type(last) is not type(after) or last <= after or not all(isinstance(text, str) for text in found):
            raise sqlite3.DatabaseError(f"{table} is out of order")
        yield count, found
        after = last


def numbers(column: str) -> str:
    """The integers of a column; see `to_numbers`."""
    return f"group_concat({column}, ',')"


def blobs(column: str) -> str:
    """The bytes of a column in hexadecimal; see `to_blobs`."""
    return f"group_concat(hex({column}), '')"


def texts(column: str) -> str:
    """The texts of a column, which hold no zero bytes, with a zero byte between them."""
    return f"group_concat({column}, char(0))"


def to_numbers(text: str, count: int) -> NDArray[np.int64]:
    """(count,) int64.

    Raises:
        sqlite3.DatabaseError: they are not so many integers.
    """
    if text.count(",") + 1 == count and not text.encode().translate(None, b"0123456789-,"):
        return np.fromstring(text, np.int64, sep=",")
    raise sqlite3.DatabaseError("a column holds something else than numbers")


def to_blobs(text: str, count: int, size: int) -> NDArray[np.uint8]:
    """(count, size) uint8.

    Raises:
        sqlite3.DatabaseError: they are not of that size.
    """
    if len(text) != 2 * size * count:
        raise sqlite3.DatabaseError(f"a column holds something else than {size} bytes a row")
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(count, size)
