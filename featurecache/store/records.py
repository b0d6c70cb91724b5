"""What the index remembers besides rows: files that were hashed (`--check stat`), and contents that failed for good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.store.index import Index
from featurecache.store.schema import next_generation, no_collections

STAT_MARGIN_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT: 2 s)
_PER_PATH = 4
_BLOCK = 4096  # rows that are Python objects at a time
_SCHEMA = {
    "path": pl.String, "size": pl.Int64, "mtime_ns": pl.Int64, "ctime_ns": pl.Int64, "inode": pl.Int64,
    "recorded_ns": pl.Int64, "sha256": pl.Binary,
}  # fmt: skip
_COLUMNS = ", ".join(_SCHEMA)


class StatRecord(NamedTuple):
    """A file as it was when its bytes were hashed: from fstat of the very handle that was read.

    `recorded_ns` is the time of that fstat (time.time_ns()), `sha256` of the bytes has 32 bytes.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    recorded_ns: int
    sha256: bytes

    @classmethod
    def of(cls, path: str, status: os.stat_result, recorded_ns: int, sha256: bytes) -> StatRecord:
        """The record for a file that was just hashed."""
        inode = _signed(status.st_ino)
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode, recorded_ns, sha256)


def _signed(inode: int) -> int:
    """An inode number as SQLite can hold it: some file systems use all 64 bits."""
    return (inode + 2**63) % 2**64 - 2**63


def _stored(path: str) -> str | bytes:
    """A path as SQLite can hold it: bytes where it isn't UTF-8."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def load_payloads(index: Index, paths: Sequence[str]) -> dict[str, StatRecord]:
    """The records of those of `paths` that have one."""
    query = f"SELECT {_COLUMNS} FROM payloads WHERE path = ?"
    with index.reading() as connection:
        found = ((path, connection.execute(query, (_stored(path),)).fetchone()) for path in paths)
        return {path: StatRecord._make((path, *row[1:])) for path, row in found if row is not None}


def load_payload_table(index: Index, paths: pl.Series) -> pl.DataFrame:
    """The records of many paths (String, may come several times) at once.

    Returns:
        One row a path that has a record, with the columns of StatRecord.
    """
    paths = paths.drop_nulls().unique().alias("path")
    with index.reading() as connection, no_collections():
        (total,) = connection.execute("SELECT COUNT(*) FROM payloads").fetchone()
        if total <= len(paths) * _PER_PATH:
            every = connection.execute(f"SELECT {_COLUMNS} FROM payloads WHERE typeof(path) = 'text'")
            blocks = iter(lambda: every.fetchmany(_BLOCK), [])
        else:
            query = f"SELECT {_COLUMNS} FROM payloads WHERE path = ?"
            blocks = ([row for path in block for row in connection.execute(query, (path,))] for block in _lists(paths))
        return pl.concat([pl.DataFrame(schema=_SCHEMA), *map(_table, blocks)]).join(
            paths.to_frame(), on="path", how="semi"
        )


def _lists(paths: pl.Series) -> Iterator[list[str]]:
    return (paths[at : at + _BLOCK].to_list() for at in range(0, len(paths), _BLOCK))


def _table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    columns = zip(*rows, strict=True) if rows else ([] for _ in _SCHEMA)
    return pl.DataFrame(dict(zip(_SCHEMA, columns, strict=True)), schema=_SCHEMA)


def look_same(records: pl.DataFrame, has_change_time: Callable[[str], bool]) -> NDArray[np.bool_]:
    """Which files surely hold the bytes that were hashed, since all of their stat is what it was then.

    A record taken within 2 s of the file's change doesn't count: a second change would not show. Nor does any on a
    file system without a true change time.

    Args:
        records: a row a file, with the columns of StatRecord.
        has_change_time: whether the file system of a path keeps one; asked once for each device.

    Returns:
        (n,) bool.
    """
    trusted: dict[int, bool] = {}
    settled = pl.col("recorded_ns") - pl.max_horizontal("mtime_ns", "ctime_ns") >= STAT_MARGIN_NS
    same = records.select(settled).to_series().to_numpy().copy()
    found = records.filter(same).select("path", "size", "mtime_ns", "ctime_ns", "inode")
    inodes = found["inode"].to_numpy().view(np.uint64).tolist()  # as the system gives them, see `_signed`
    known = zip(*(found[name].to_list() for name in found.columns[:-1]), inodes, strict=True)
    answers = np.zeros(len(found), np.bool_)
    for at, (path, size, mtime_ns, ctime_ns, inode) in enumerate(known):
        try:
            status = os.stat(path)
        except OSError:
            continue
        if (
            status.st_mtime_ns == mtime_ns
            and status.st_ctime_ns == ctime_ns
            and status.st_size == size
            and status.st_ino == inode
        ):
            if status.st_dev not in trusted:
                trusted[status.st_dev] = has_change_time(path)
            answers[at] = trusted[status.st_dev]
    same[same] = answers
    return same


def save_payloads(index: Index, records: Iterable[StatRecord]) -> None:
    """Remember files as hashed, in the place of what was known of these paths."""
    with index.writing() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO payloads (path, size, mtime_ns, ctime_ns, inode, recorded_ns, sha256) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((_stored(record.path), *record[1:]) for record in records),
        )


def load_failures(index: Index, number: int) -> dict[bytes, tuple[str, str]]:
    """Key -> (reader with version, message) of the contents that can't be extracted in a recipe."""
    with index.reading() as connection:
        found = connection.execute("SELECT key, reader, message FROM failures WHERE recipe = ?", (number,))
        return {key: (reader, message) for key, reader, message in found}


def save_failures(index: Index, number: int, failures: Iterable[tuple[bytes, str, str]]) -> None:
    """Remember (key, reader with version, message); a later row for the key removes it."""
    with index.writing() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO failures (recipe, key, reader, message) VALUES (?, ?, ?, ?)",
            ((number, bytes(key), *rest) for key, *rest in failures),
        )
        next_generation(connection)  # a cell that was pending to readers may be a failed one now


def clear_failures(index: Index, number: int, keys: Iterable[bytes] | None) -> None:
    """Forget the failures of these keys, or all of the recipe's."""
    with index.writing() as connection:
        if keys is None:
            connection.execute("DELETE FROM failures WHERE recipe = ?", (number,))
        else:
            connection.executemany(
                "DELETE FROM failures WHERE recipe = ? AND key = ?", ((number, bytes(key)) for key in keys)
            )
        next_generation(connection)
