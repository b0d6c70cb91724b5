"""What a writer does first: clears away what one before it left behind when it died, and ends what that had begun."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

from featurecache.errors import StoreError
from featurecache.store.appender import align_shapes, clear_leftovers, clear_superseded
from featurecache.store.files import step, storage_errors, sync_directory, trash
from featurecache.store.format import StorePaths
from featurecache.store.index import Index
from featurecache.store.schema import REMOVED, sqlite_errors

SCRUB = "scrub"
"""Entry of `meta` while deleted entries may still lie in the index's free pages."""


def settle(index: Index, paths: StorePaths) -> None:
    """Clear the store of all that no commit names; called with the writer's lock held, index open for writing."""
    shutil.rmtree(paths.incoming, ignore_errors=True)
    paths.incoming.mkdir(exist_ok=True)
    shutil.rmtree(paths.trash, ignore_errors=True)
    clear_removed(index, paths)
    for stored in index.recipes():
        clear_superseded(index, paths, stored)
        clear_leftovers(index, paths, stored)
        align_shapes(paths, stored)
    finish_scrub(index, patience=0.2)


def removed_groups(index: Index) -> list[Path]:
    """Groups of recipes that were removed, whose files are still there: a process died before it had deleted them."""
    with index.reading() as connection:
        marks = connection.execute("SELECT name FROM meta WHERE name GLOB ?", (f"{REMOVED}*",)).fetchall()
        known = {row[0] for row in connection.execute("SELECT id FROM recipes")}
    names = sorted({mark.removeprefix(REMOVED) for (mark,) in marks} - known)
    return [index.paths.zarr / name for name in names if (index.paths.zarr / name).is_dir()]


def clear_removed(index: Index, paths: StorePaths) -> None:
    """Delete the groups of removed recipes; each goes to the trash first, in one step."""
    for group in removed_groups(index):
        target = trash(group, paths.trash)
        sync_directory(paths.zarr)
        step("group-trashed")
        shutil.rmtree(target)
        sync_directory(paths.trash)


def orphans(index: Index) -> list[Path]:
    """Files that no commit names: chunks, what is in the trash, in the making, and in groups of removed recipes."""
    paths, found = index.paths, list[Path]()
    for directory in (paths.trash, paths.incoming, *removed_groups(index)):
        found += [path for path in directory.rglob("*") if path.is_file()]
    for stored in index.recipes():
        named = index.chunks(stored.number)
        for name, spec in stored.layout.arrays().items():
            known = {spec.chunk_name(chunk) for chunk, array in named if array == name}
            directory = paths.array(stored.recipe.id, name)
            found += [path for path in sorted(directory.glob("c.*")) if path.name not in known]
    return found


def empty_trash(paths: StorePaths) -> None:
    """Delete what is in the trash and in the making, for good.

    Raises:
        StoreError: something there can't be deleted.
    """
    with storage_errors(f"{paths.root}: deleting what was dropped failed"):
        for directory in (paths.trash, paths.incoming):
            if directory.is_dir():
                shutil.rmtree(directory)
        sync_directory(paths.root)
        paths.incoming.mkdir(exist_ok=True)


def finish_scrub(index: Index, *, patience: float = 30.0) -> bool:
    """Write the index anew where entries were deleted, so that none of their bytes stay in its free pages or its log.

    Args:
        index: open for writing, outside of a transaction.
        patience: seconds to wait for readers that hold an earlier state of the index.

    Returns:
        Whether it is done; else a reader was in the way, and the next writer goes on.
    """
    with index.reading() as connection:
        if connection.execute("SELECT 1 FROM meta WHERE name = ?", (SCRUB,)).fetchone() is None:
            return True
    path = index.paths.index
    with contextlib.suppress(_InUse), sqlite_errors(path):
        with contextlib.closing(sqlite3.connect(path, timeout=patience, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise _InUse(str(path))
        step("index-scrubbed")
        with index.writing() as connection:
            connection.execute("DELETE FROM meta WHERE name = ?", (SCRUB,))
        return True
    return False


class _InUse(StoreError):
    """A reader holds an earlier state of the index."""
