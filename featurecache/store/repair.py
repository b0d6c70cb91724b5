"""Repair: rows of damaged chunks are dropped, so that the next extract computes them, and metadata are written anew."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from featurecache.errors import CorruptionError, StoreError
from featurecache.store.appender import publish_generation
from featurecache.store.files import storage_errors
from featurecache.store.format import StorePaths
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.opening import check_identity, read_root, require_store
from featurecache.store.rebuild import RepairReport, locked, trash_chunks, write_metadata
from featurecache.store.schema import next_generation
from featurecache.store.verify import check_store, metadata_problems


def repair(path: str | os.PathLike[str]) -> RepairReport:
    """Drop the rows of every damaged chunk from the index, so that the next extract computes those and no others.

    The files of such chunks go to the store's trash; damaged zarr.json files are written anew from the index.

    Raises:
        StoreError: the index is damaged, or not the one of these features: it must be rebuilt. Or writing failed.
        LockedError: another process is writing.
    """
    paths = StorePaths(Path(path))
    require_store(paths)
    with locked(paths), storage_errors(f"{paths.root}: repairing failed"):
        index = Index(paths, write=True)
        try:
            return _repair(index, paths)
        finally:
            index.close()


def _repair(index: Index, paths: StorePaths) -> RepairReport:
    try:
        read_root(paths)
        root_damaged = False
    except CorruptionError:
        root_damaged = True
    found = check_store(index, paths)
    hopeless = [problem for problem in found.problems if problem.kind in ("index", "unknown")]
    if hopeless:
        raise StoreError(
            f"{paths.root}: {hopeless[0].message}. Repair needs a sound index: run "
            f"`featurecache verify {paths.root} --rebuild-index` first."
        )
    report = RepairReport(paths.root, found)
    if root_damaged:
        publish_generation(index, paths)
        report.rewritten.append(str(paths.zarr / "zarr.json"))
    check_identity(index, paths)
    for stored in index.recipes():
        damaged = {p.chunk for p in found.problems if p.recipe == stored.recipe.id and p.chunk >= 0}
        if metadata_problems(paths, stored):
            report.rewritten += write_metadata(paths, stored)
        if damaged:
            report.dropped += _drop(index, stored, sorted(damaged))
            report.trashed += trash_chunks(paths, stored, damaged)
        report.kept += index.count(stored.number)[0]
    for problem in found.problems:
        if problem.kind == "dataset":
            report.notes.append(problem.message)
    publish_generation(index, paths)
    return report


def _drop(index: Index, stored: StoredRecipe, chunks: Iterable[int]) -> int:
    """Drop the rows of chunks; killed before their files are away, the next writer takes these away."""
    number, n, dropped = stored.number, stored.layout.rows_per_chunk, 0
    with index.writing() as connection:
        for chunk in chunks:
            values = (number, chunk * n, (chunk + 1) * n)
            deleted = connection.execute("DELETE FROM rows WHERE recipe = ? AND slot >= ? AND slot < ?", values)
            dropped += deleted.rowcount
            connection.execute("DELETE FROM chunks WHERE recipe = ? AND chunk = ?", (number, chunk))
            connection.execute("INSERT OR REPLACE INTO superseded (recipe, chunk) VALUES (?, ?)", (number, chunk))
            connection.execute("UPDATE recipes SET partial = NULL WHERE number = ? AND partial = ?", (number, chunk))
        next_generation(connection)
    return dropped
