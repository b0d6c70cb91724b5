"""The index, in SQLite: which rows exist, and where. A row is in the store exactly when a transaction here says so."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from featurecache.errors import CorruptionError, StoreError
from featurecache.store.files import step
from featurecache.store.format import ChunkRecord, Layout, StorePaths, feature_list
from featurecache.store.lookup import BY_KEY, all_rows, merge_keys
from featurecache.store.recipe import KEY_BYTES, Recipe
from featurecache.store.schema import LAST_RECIPE, REMOVED, next_generation, next_row, sqlite_errors

_BUSY_SECONDS = 30.0
_WRITER_CACHE_KIB = 2 * 1024  # what a commit touches and this does not hold goes to the log early, which is cheap
_FEW_KEYS = 512  # up to here keys are looked up one by one
_PER_KEY = 4  # and where the recipe has more rows than this many for each key asked for
# Connections that were open when the process was forked. Closing one here could end the parent's locks or its
# write-ahead log, so that they are kept for good instead.
_inherited: list[sqlite3.Connection] = []


class Meta(NamedTuple):
    """What the index says of the store, or the root of features.zarr does."""

    format: int
    uuid: str
    generation: int
    required_features: tuple[str, ...]


@dataclass(frozen=True)
class StoredRecipe:
    """A recipe as the index has it; `next_row`, `next_chunk` and `partial` are those at the time of asking."""

    number: int
    recipe: Recipe
    layout: Layout
    canary: Mapping[str, Any] | None
    recorded: Mapping[str, Any]
    next_row: int
    next_chunk: int
    partial: int | None


class _Handle:
    """One connection of one process."""

    def __init__(self, connection: sqlite3.Connection, copy: tempfile.TemporaryDirectory[str] | None) -> None:
        self.connection = connection
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.copy = copy


class Index:
    """The SQLite side of a store. Safe to use from several threads; a forked process opens a connection of its own."""

    def __init__(self, paths: StorePaths, *, write: bool) -> None:
        """Prepare to open the index; nothing is opened before the first use."""
        self.paths = paths
        self._writer = os.getpid() if write else 0
        self._current: _Handle | None = None
        self._opening = threading.Lock()

    # ---- connections -------------------------------------------------------------------------------------------------

    def _handle(self) -> _Handle:
        handle, pid = self._current, os.getpid()
        if handle is not None and handle.pid == pid:
            return handle
        if handle is not None:
            self.abandon()
            self._opening = threading.Lock()
        with self._opening:
            if self._current is None:
                with sqlite_errors(self.paths.index):
                    self._current = self._open()
            return self._current

    def _open(self) -> _Handle:
        if not self.paths.index.is_file():
            raise StoreError(
                f"{self.paths.index} is missing. `featurecache verify {self.paths.root} --rebuild-index` makes it anew."
            )
        if self._writer == os.getpid():
            connection = self._connect("mode=rw")
            connection.execute("PRAGMA journal_mode=WAL").fetchone()
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(
                f"PRAGMA cache_size=-{_WRITER_CACHE_KIB}"
            )  # keys are random: each commit touches many pages
            connection.execute("PRAGMA foreign_keys=ON")
            return _Handle(connection, None)
        connection = self._connect("mode=ro")
        try:
            connection.execute("SELECT name FROM meta").fetchall()
            return _Handle(connection, None)
        except sqlite3.OperationalError as error:
            if not getattr(error, "sqlite_errorname", "").startswith(
                ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_PROTOCOL")
            ):
                raise
            connection.close()
        # A read-only medium. Without a log the file is all there is; with one, of a killed writer, a copy is read.
        log = self.paths.index.with_name("index.sqlite-wal")
        if not log.is_file() or log.stat().st_size == 0:
            return _Handle(self._connect("mode=ro&immutable=1"), None)
        copy = tempfile.TemporaryDirectory(prefix="featurecache-")
        for path in (self.paths.index, log):
            shutil.copyfile(path, Path(copy.name) / path.name)
        return _Handle(self._connect("mode=rw", Path(copy.name) / "index.sqlite"), copy)

    def _connect(self, options: str, path: Path | None = None) -> sqlite3.Connection:
        uri = f"file:{quote(str((path or self.paths.index).absolute()))}?{options}"
        return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection on which all queries see the same state."""
        handle = self._handle()
        with handle.lock, sqlite_errors(self.paths.index):
            connection = handle.connection
            if connection.in_transaction:
                yield connection
                return
            try:
                connection.execute("BEGIN")  # within: Ctrl-C right after it must not leave the transaction open
                yield connection
            finally:
                connection.rollback()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all or nothing.

        Raises:
            StoreError: the store was opened for reading, or the disk refused.
        """
        if self._writer != os.getpid():
            raise StoreError(
                f"{self.paths.root}: opened for reading in this process; open it with write=True to change it."
            )
        handle = self._handle()
        with handle.lock, sqlite_errors(self.paths.index):
            connection = handle.connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.rollback()
                raise

    def abandon(self) -> None:
        """Leave the connection of the process that this one was forked from alone."""
        if self._current is not None and self._current.pid != os.getpid():
            _inherited.append(self._current.connection)
            self._current = None

    def close(self) -> None:
        """Close this process's connection; the writer leaves a single file without a log behind."""
        self.abandon()
        handle, self._current = self._current, None
        if handle is None:
            return
        with handle.lock:
            if self._writer == os.getpid():
                # A reader that has the database open keeps it in WAL mode; the next writer to close tries again.
                with contextlib.suppress(sqlite3.Error):
                    handle.connection.execute("PRAGMA busy_timeout=200")
                    handle.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    handle.connection.execute("PRAGMA journal_mode=DELETE").fetchall()
            handle.connection.close()
            if handle.copy is not None:
                handle.copy.cleanup()

    # ---- the store and its recipes -----------------------------------------------------------------------------------

    def meta(self) -> Meta:
        """Format, UUID, generation and required features; what else a newer version noted is left alone.

        Raises:
            CorruptionError: one of them is missing or damaged.
        """
        with self.reading() as connection:
            values = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        try:
            features = feature_list(json.loads(values["required_features"]))
            return Meta(int(values["format"]), str(values["uuid"]), int(values["generation"]), features)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"{self.paths.index}: damaged: no {error} in it") from None

    def recipes(self) -> list[StoredRecipe]:
        """All recipes in the order in which they were added."""
        columns = "number, recipe, layout, canary, recorded, next_row, next_chunk, partial"
        with self.reading() as connection:
            found = connection.execute(f"SELECT {columns} FROM recipes ORDER BY number").fetchall()
        try:
            return [
                StoredRecipe(
                    number, Recipe.from_json(json.loads(recipe)), Layout.from_json(json.loads(layout)),
                    json.loads(canary), json.loads(recorded), next_row, next_chunk, partial,
                )
                for number, recipe, layout, canary, recorded, next_row, next_chunk, partial in found
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(
                f"{self.paths.index}: damaged: a recipe can't be read ({error}). "
                f"`featurecache verify {self.paths.root} --rebuild-index` makes the index anew."
            ) from None

    def add_recipe(
        self, recipe: Recipe, layout: Layout, canary: Mapping[str, Any] | None, recorded: Mapping[str, Any]
    ) -> None:
        """Add a recipe without rows, and count the generation up."""
        texts = (
            json.dumps(part, ensure_ascii=False)
            for part in (recipe.to_json(), layout.to_json(), canary, dict(recorded))
        )
        with self.writing() as connection:
            connection.execute(
                "INSERT INTO recipes (number, next_row, id, digest, base, recipe, layout, canary, recorded) "
                "SELECT 1 + MAX(COALESCE((SELECT MAX(number) FROM recipes), 0), COALESCE((SELECT value FROM meta "
                "WHERE name = ?), 0)), COALESCE((SELECT value FROM meta WHERE name = ?), 0), ?, ?, ?, ?, ?, ?, ?",
                (LAST_RECIPE, REMOVED + recipe.id, recipe.id, recipe.digest, recipe.base, *texts),
            )
            next_generation(connection)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def count(self, number: int) -> tuple[int, int]:
        """Rows and bytes of a recipe."""
        with self.reading() as connection:
            rows = connection.execute("SELECT COUNT(*) FROM rows WHERE recipe = ?", (number,)).fetchone()[0]
            size = connection.execute(
                "SELECT COALESCE(SUM(size), 0) FROM chunks WHERE recipe = ?", (number,)
            ).fetchone()[0]
        return int(rows), int(size)

    def lookup(self, number: int, keys: NDArray[np.uint8], replicas: NDArray[np.int32]) -> NDArray[np.int64]:
        """Row ids for keys (n, 32) and replicas (n,); -1 where there is no such row."""
        with self.reading() as connection:
            total = next_row(connection, number)
            if len(keys) > _FEW_KEYS and total <= len(keys) * _PER_KEY:
                return merge_keys(connection, number, keys, replicas)
            blob, found = keys.tobytes(), np.full(len(keys), -1, np.int64)
            for i, replica in enumerate(replicas.tolist()):
                key = blob[i * KEY_BYTES : (i + 1) * KEY_BYTES]
                row = connection.execute(BY_KEY, (number, key, replica)).fetchone()
                if row is None:
                    continue
                if row[1:] != (key, replica):
                    raise CorruptionError(
                        f"{self.paths.index}: damaged: it leads from the key of one row to another row. "
                        f"`featurecache verify {self.paths.root} --rebuild-index` makes it anew from the key arrays."
                    )
                found[i] = row[0]
            return found

    def slots(self, number: int) -> NDArray[np.int64]:
        """Where each row lies, (next row id,) int64, -1 for a row that is no more."""
        with self.reading() as connection:
            total = next_row(connection, number)
            flat = np.fromiter(
                chain.from_iterable(
                    connection.execute("SELECT row, slot FROM rows WHERE recipe = ? ORDER BY slot", (number,))
                ),
                np.int64,
            ).reshape(-1, 2)
        slots = np.full(total, -1, np.int64)
        if len(flat) and (flat[:, 0].min() < 0 or flat[:, 0].max() >= total):
            raise CorruptionError(
                f"{self.paths.index}: damaged: it numbers rows beyond the {total} that were ever added"
            )
        slots[flat[:, 0]] = flat[:, 1]
        return slots

    def rows_between(self, number: int, first: int, last: int) -> list[tuple[int, bytes, int, int]]:
        """(row id, key, replica, slot) of the rows in slots `first` to `last`, exclusive, by slot."""
        with self.reading() as connection:
            return connection.execute(
                "SELECT row, key, replica, slot FROM rows WHERE recipe = ? AND slot >= ? AND slot < ? ORDER BY slot",
                (number, first, last),
            ).fetchall()

    def rows_of(self, stored: StoredRecipe, chunk: int) -> list[tuple[int, bytes, int, int]]:
        """The same of a chunk of a recipe."""
        n = stored.layout.rows_per_chunk
        return self.rows_between(stored.number, chunk * n, (chunk + 1) * n)

    def keys_agree(
        self, stored: StoredRecipe, chunk: int, keys: NDArray[np.uint8], replicas: NDArray[np.int32] | None
    ) -> bool:
        """Whether a chunk's key array (rows, 32), and replica array (rows,), hold in each slot what the index has."""
        rows = self.rows_of(stored, chunk)
        offsets = np.array([row[3] for row in rows], np.int64) - chunk * stored.layout.rows_per_chunk
        known = np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(-1, KEY_BYTES)
        if not np.array_equal(keys[offsets], known):
            return False
        return replicas is None or np.array_equal(replicas[offsets], np.array([row[2] for row in rows], np.int32))

    def keys(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32]]:
        """Row ids (n,), keys (n, 32) and replicas (n,) of all rows of a recipe, in the order in which they lie."""
        with self.reading() as connection:
            rows, keys, replicas, slots = all_rows(connection, number)
        order = np.argsort(slots)
        return rows[order], keys[order], replicas[order]

    def chunks(self, number: int, chunk: int | None = None) -> dict[tuple[int, str], ChunkRecord]:
        """(chunk, array) -> record, for one chunk or for all of a recipe."""
        where, values = ("", (number,)) if chunk is None else (" AND chunk = ?", (number, chunk))
        with self.reading() as connection:
            found = connection.execute(
                f"SELECT chunk, array, size, crc32c, sha256 FROM chunks WHERE recipe = ?{where}", values
            )
            return {(at, array): ChunkRecord(size, crc32c, sha256) for at, array, size, crc32c, sha256 in found}

    def commit(
        self,
        stored: StoredRecipe,
        chunk: int,
        records: Mapping[str, ChunkRecord],
        moved: Iterable[tuple[int, int]],
        added: Iterable[tuple[bytes, int, int]],
        *,
        full: bool,
    ) -> None:
        """The commit point: one transaction adds a chunk and its rows, and re-points those of the partial chunk before.

        Args:
            stored: the recipe as it was when the chunk was begun.
            chunk: the free slot that the files were written to.
            records: of every array's file.
            moved: (row id, new slot) of rows copied from the partial chunk.
            added: (key, replica, slot) of new rows.
            full: False where the chunk is the new partial one.
        """
        number, added = stored.number, list(added)
        with self.writing() as connection:
            connection.executemany(
                "UPDATE rows SET slot = ? WHERE recipe = ? AND row = ?", ((s, number, r) for r, s in moved)
            )
            if stored.partial is not None:
                connection.execute("DELETE FROM chunks WHERE recipe = ? AND chunk = ?", (number, stored.partial))
                connection.execute("INSERT INTO superseded (recipe, chunk) VALUES (?, ?)", (number, stored.partial))
            connection.executemany(
                "INSERT INTO rows (recipe, row, key, replica, slot) VALUES (?, ?, ?, ?, ?)",
                ((number, stored.next_row + i, *row) for i, row in enumerate(added)),
            )
            if connection.execute("SELECT 1 FROM failures WHERE recipe = ?", (number,)).fetchone():
                connection.executemany(
                    "DELETE FROM failures WHERE recipe = ? AND key = ?", ((number, row[0]) for row in added)
                )
            connection.executemany(
                "INSERT INTO chunks (recipe, chunk, array, size, crc32c, sha256) VALUES (?, ?, ?, ?, ?, ?)",
                ((number, chunk, name, *record) for name, record in records.items()),
            )
            connection.execute(
                "UPDATE recipes SET next_row = ?, next_chunk = ?, partial = ? WHERE number = ?",
                (stored.next_row + len(added), chunk + 1, None if full else chunk, number),
            )
            next_generation(connection)
            step("rows-inserted")

    def superseded(self, number: int) -> list[int]:
        """Chunks whose rows were re-pointed and whose files may still be there."""
        with self.reading() as connection:
            return [row[0] for row in connection.execute("SELECT chunk FROM superseded WHERE recipe = ?", (number,))]

    def forget_superseded(self, number: int, chunks: Iterable[int]) -> None:
        """Note that the files of superseded chunks are gone."""
        with self.writing() as connection:
            connection.executemany(
                "DELETE FROM superseded WHERE recipe = ? AND chunk = ?", ((number, c) for c in chunks)
            )
