"""What the index remembers besides rows: files that were hashed (`--check stat`), and contents that failed for good."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from featurecache.store.index import Index
from featurecache.store.schema import no_collections

STAT_MARGIN_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT: 2 s)
_PER_PATH = 4


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

    def matches(self, status: os.stat_result) -> bool:
        """Whether a file that now looks like `status` surely holds the bytes that were hashed.

        A record taken within 2 s of the file's change doesn't count: a second change would not show.
        """
        return (
            status.st_size == self.size
            and status.st_mtime_ns == self.mtime_ns
            and status.st_ctime_ns == self.ctime_ns
            and _signed(status.st_ino) == self.inode
            and self.recorded_ns - max(self.mtime_ns, self.ctime_ns) >= STAT_MARGIN_NS
        )


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
    columns = "path, size, mtime_ns, ctime_ns, inode, recorded_ns, sha256"
    with index.reading() as connection, no_collections():
        (total,) = connection.execute("SELECT COUNT(*) FROM payloads").fetchone()
        if total <= len(paths) * _PER_PATH:
            wanted = set(map(_stored, paths))
            rows = connection.execute(f"SELECT {columns} FROM payloads")
            found = {row[0]: StatRecord._make(row) for row in rows if row[0] in wanted}
        else:
            query = f"SELECT {columns} FROM payloads WHERE path = ?"
            one_by_one = (connection.execute(query, (_stored(path),)).fetchone() for path in paths)
            found = {row[0]: StatRecord._make(row) for row in one_by_one if row is not None}
    for raw in [path for path in found if isinstance(path, bytes)]:
        path = os.fsdecode(raw)
        found[path] = found.pop(raw)._replace(path=path)
    return found


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


def clear_failures(index: Index, number: int, keys: Iterable[bytes] | None) -> None:
    """Forget the failures of these keys, or all of the recipe's."""
    with index.writing() as connection:
        if keys is None:
            connection.execute("DELETE FROM failures WHERE recipe = ?", (number,))
        else:
            connection.executemany(
                "DELETE FROM failures WHERE recipe = ? AND key = ?", ((number, bytes(key)) for key in keys)
            )
