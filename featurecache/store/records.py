"""What the index remembers besides rows: files that were hashed (`--check stat`), and contents that failed for good."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.machine import scouts
from featurecache.store.files import has_change_time
from featurecache.store.index import Index
from featurecache.store.packed import blobs, numbers, packed, texts, to_blobs, to_numbers
from featurecache.store.schema import next_generation, no_collections

STAT_MARGIN_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT: 2 s)
_PER_PATH = 4
_BLOCK = 4096  # paths that are asked for at a time
_SCHEMA: dict[str, Any] = {
    "path": pl.String, "size": pl.Int64, "mtime_ns": pl.Int64, "ctime_ns": pl.Int64, "inode": pl.Int64,
    "recorded_ns": pl.Int64, "sha256": pl.Array(pl.UInt8, 32),
}  # fmt: skip
_COLUMNS = ", ".join(_SCHEMA)
_NUMBERS = [name for name, kind in _SCHEMA.items() if kind == pl.Int64]
_PACKED = [texts("path"), blobs("sha256"), *map(numbers, _NUMBERS)]


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
    paths = paths.drop_nulls().alias("path")
    with index.reading() as connection, no_collections():
        (total,) = connection.execute("SELECT COUNT(*) FROM payloads").fetchone()
        if total <= len(paths) * _PER_PATH:
            found = packed(connection, "payloads", "path", "", _PACKED, "path < x''")  # bytes come after text
            tables: Iterable[pl.DataFrame] = (_unpacked(count, columns) for count, columns in found)
        else:
            query = f"SELECT {_COLUMNS} FROM payloads WHERE path = ?"
            rows = (
                [row for path in block for row in connection.execute(query, (path,))]
                for block in _lists(paths.unique())
            )
            tables = map(_table, rows)
        every = pl.concat([pl.DataFrame(schema=_SCHEMA), *tables])
    return every.join(paths.to_frame(), on="path", how="semi")


def _lists(paths: pl.Series) -> Iterator[list[str]]:
    return (paths[at : at + _BLOCK].to_list() for at in range(0, len(paths), _BLOCK))


def _unpacked(count: int, columns: Sequence[str]) -> pl.DataFrame:
    path, sha256, *rest = columns
    paths = pl.Series([path]).str.split("\0").explode()
    if len(paths) != count:
        raise sqlite3.DatabaseError("payloads: paths are damaged")
    named = {name: to_numbers(text, count) for name, text in zip(_NUMBERS, rest, strict=True)}
    return pl.DataFrame({"path": paths, **named, "sha256": to_blobs(sha256, count, 32)}, schema=_SCHEMA)


def _table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    if not rows:
        return pl.DataFrame(schema=_SCHEMA)
    *columns, sha256 = zip(*rows, strict=True)
    digests = np.frombuffer(b"".join(sha256), np.uint8).reshape(len(rows), -1)
    return pl.DataFrame(dict(zip(_SCHEMA, [*columns, digests], strict=True)), schema=_SCHEMA)


def unchanged_files(records: pl.DataFrame, now: scouts.Records | None = None) -> pl.DataFrame:
    """Those of the records, a row a file, that tell of the bytes that are there now; see `look_same`."""
    return records.filter(look_same(records, lambda path: has_change_time(Path(path)), now))


def look_same(
    records: pl.DataFrame, has_change_time: Callable[[str], bool], now: scouts.Records | None = None
) -> NDArray[np.bool_]:
    """Which files surely hold the bytes that were hashed, since all of their stat is what it was then.

    A record taken within 2 s of the file's change doesn't count: a second change would not show. Nor does any on a
    file system without a true change time.

    Args:
        records: a row a file, with the columns of StatRecord.
        has_change_time: whether the file system of a path keeps one; asked once for each device.
        now: the files' stat, where they were looked at already, else it is done here.

    Returns:
        (n,) bool.
    """
    same = settled(records)
    if now is None:
        now = np.zeros(len(records), scouts.RECORD)
        now[same] = scouts.look(records["path"].filter(same))
    same &= now["ok"]
    for name in ("size", "mtime_ns", "ctime_ns", "inode"):
        same &= records[name].to_numpy().view(now.dtype[name]) == now[name]
    for device in np.unique(now["device"][same]).tolist():
        there = same & (now["device"] == device)
        if not has_change_time(records["path"][int(np.argmax(there))]):
            same &= ~there
    return same


def settled(records: pl.DataFrame) -> NDArray[np.bool_]:
    """(n,) bool: which records were taken long enough after the file's last change to tell of the next one."""
    late = pl.col("recorded_ns") - pl.max_horizontal("mtime_ns", "ctime_ns") >= STAT_MARGIN_NS
    return records.select(late).to_series().to_numpy().copy()


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
