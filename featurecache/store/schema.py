"""The tables of the index, what SQLite's errors mean to a user, and making an empty index."""

from __future__ import annotations

import contextlib
import gc
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featurecache.errors import CorruptionError, StoreError
from featurecache.store.files import move, sync_directory
from featurecache.store.format import FORMAT, StorePaths

REMOVED, LAST_RECIPE = "removed:", "last recipe"
"""Entries of `meta` that outlive a removed recipe: by its id the next row's id, and the largest number there ever was.

A recipe that is added again goes on from there, so that no number and no row id ever means something else to a reader.
"""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE recipes (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, digest TEXT NOT NULL UNIQUE, base TEXT NOT NULL,
    recipe TEXT NOT NULL, layout TEXT NOT NULL, canary TEXT NOT NULL, recorded TEXT NOT NULL,
    next_row INTEGER NOT NULL DEFAULT 0, next_chunk INTEGER NOT NULL DEFAULT 0, partial INTEGER) STRICT;
-- row: the row's id within the recipe, for good. slot: where it lies now; a partial chunk that is rewritten changes it.
CREATE TABLE rows (
    recipe INTEGER NOT NULL REFERENCES recipes, row INTEGER NOT NULL, key BLOB NOT NULL CHECK (length(key) = 32),
    replica INTEGER NOT NULL, slot INTEGER NOT NULL, PRIMARY KEY (recipe, row)) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX rows_by_key ON rows (recipe, key, replica);
CREATE UNIQUE INDEX rows_by_slot ON rows (recipe, slot);
CREATE TABLE chunks (
    recipe INTEGER NOT NULL REFERENCES recipes, chunk INTEGER NOT NULL, array TEXT NOT NULL, size INTEGER NOT NULL,
    crc32c INTEGER NOT NULL, sha256 BLOB NOT NULL, PRIMARY KEY (recipe, chunk, array)) STRICT, WITHOUT ROWID;
-- chunks whose rows a commit has re-pointed, until their files are deleted
CREATE TABLE superseded (
    recipe INTEGER NOT NULL, chunk INTEGER NOT NULL, PRIMARY KEY (recipe, chunk)) STRICT, WITHOUT ROWID;
CREATE TABLE failures (
    recipe INTEGER NOT NULL REFERENCES recipes, key BLOB NOT NULL, reader TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (recipe, key)) STRICT, WITHOUT ROWID;
CREATE TABLE payloads (
    path ANY PRIMARY KEY, -- text; bytes where the path is not UTF-8
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    recorded_ns INTEGER NOT NULL, sha256 BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE bindings (
    name TEXT PRIMARY KEY, manifest_path TEXT NOT NULL, manifest_digest TEXT NOT NULL, digest TEXT NOT NULL,
    multi TEXT NOT NULL, config TEXT NOT NULL, recipes TEXT NOT NULL,
    samples BLOB NOT NULL, cells BLOB NOT NULL, -- Parquet; the cells without their keys
    keys BLOB NOT NULL, owners BLOB NOT NULL, ids TEXT NOT NULL, -- 32 bytes, a uint32 a cell; JSON list of sample ids
    sha256 BLOB NOT NULL -- of the other columns: each one's length as a uint64 and its bytes
) STRICT, WITHOUT ROWID;
"""


def create_index(paths: StorePaths, uuid: str, staged: Path) -> None:
    """Make an empty index at `staged` and rename it into place."""
    build_index(staged, uuid)
    move(staged, paths.index)
    sync_directory(paths.root)


def build_index(path: Path, uuid: str) -> None:
    """Make an empty index, of generation 0, in the place of whatever is at `path`."""
    path.unlink(missing_ok=True)
    with sqlite_errors(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=FULL")
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        values = [("format", FORMAT), ("required_features", "[]"), ("uuid", uuid), ("generation", 0)]
        connection.executemany("INSERT INTO meta (name, value) VALUES (?, ?)", values)


def missing_columns(connection: sqlite3.Connection) -> list[str]:
    """Columns (`table.column`) that an index must have and this one lacks; what a newer version added is no matter."""
    query = "SELECT t.name || '.' || c.name FROM sqlite_master AS t, pragma_table_info(t.name) AS c"
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(_SCHEMA)
        expected, found = ({row[0] for row in one.execute(query)} for one in (model, connection))
    return sorted(expected - found)


class RecipeGone(StoreError):
    """A recipe was removed since it was looked up."""


def next_row(connection: sqlite3.Connection, number: int) -> int:
    """The id that the next row of a recipe gets: one more than any row ever had.

    Raises:
        RecipeGone: the recipe was removed.
    """
    found = connection.execute("SELECT next_row FROM recipes WHERE number = ?", (number,)).fetchone()
    if found is None:
        raise RecipeGone("The recipe was removed from the store since it was looked up. Run extract to compute it.")
    return int(found[0])


def next_generation(connection: sqlite3.Connection) -> None:
    """Count the store's generation up: part of every transaction that adds rows, recipes or bindings."""
    connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'generation'")


@contextmanager
def no_collections() -> Iterator[None]:
    """Load many small tuples without the cyclic collector looking through them again and again (half of the time)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours: what may pass into StoreError, damage into CorruptionError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        # A statement of ours is wrong, or a text no text (then there is no code), where the index is damaged only.
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR:
            raise _damaged(path, error) from error
        raise StoreError(f"{path}: {error}. What was committed before is intact.") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: of a damaged name in SQLite's message
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CorruptionError:
    return CorruptionError(
        f"{path}: damaged ({error}). `featurecache verify {path.parent} --rebuild-index` makes it anew from the "
        "key arrays."
    )
