"""The index made anew from the key arrays, and what that shares with repair."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import uuid as uuids
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import CorruptionError, FeatureCacheError, MissingFileError
from featurecache.store.appender import publish_generation
from featurecache.store.binding import insert_bindings
from featurecache.store.files import move, publish, storage_errors, sync_directory, trash
from featurecache.store.format import (
    KEY,
    REPLICA,
    ArraySpec,
    ChunkRecord,
    Layout,
    StorePaths,
    group_document,
    grown,
    inspect_chunk,
    to_bytes,
)
from featurecache.store.index import Index, Meta, StoredRecipe
from featurecache.store.lock import WriterLock
from featurecache.store.opening import read_root
from featurecache.store.recipe import Recipe
from featurecache.store.salvage import Salvage, salvage
from featurecache.store.schema import build_index, sqlite_errors
from featurecache.store.verify import VerifyReport, metadata_problems


@dataclass
class RepairReport:
    """What was done.

    Attributes:
        path: of the store.
        found: what `verify` found before; None when the index was rebuilt.
        dropped: rows that are no longer in the index, and that the next extract computes again.
        kept: rows that are in the index now.
        rewritten: metadata files that were written anew.
        trashed: files that were moved to the store's trash, which the next extract empties.
        notes: what could not be kept.
    """

    path: Path
    found: VerifyReport | None = None
    dropped: int = 0
    kept: int = 0
    rewritten: list[str] = field(default_factory=list)
    trashed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = None if self.found is None else self.found.to_json()
        return {**vars(self), "path": str(self.path), "found": found}


@contextmanager
def locked(paths: StorePaths) -> Iterator[None]:
    """Hold the writer's lock and have a directory for files in the making."""
    lock = WriterLock(paths.lock)
    try:
        paths.incoming.mkdir(exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            paths.incoming.rmdir()
        lock.release()


def trash_chunks(paths: StorePaths, stored: StoredRecipe, chunks: Iterable[int]) -> list[str]:
    """Move the files of chunks to the trash; returns where they were."""
    moved = []
    for chunk in sorted(chunks):
        for name, spec in stored.layout.arrays().items():
            path = paths.array(stored.recipe.id, name) / spec.chunk_name(chunk)
            if path.exists():
                trash(path, paths.trash)
                moved.append(str(path))
    return moved


def write_metadata(paths: StorePaths, stored: StoredRecipe) -> list[str]:
    """Write the zarr.json of a recipe's group and arrays anew from the index; returns their paths."""
    directory = paths.zarr / stored.recipe.id
    document = group_document(stored.recipe, stored.layout, stored.canary, stored.recorded)
    documents = {directory / "zarr.json": document}
    capacity = grown(0, stored.next_chunk)
    for name, spec in stored.layout.arrays().items():
        documents[directory / name / "zarr.json"] = spec.document(capacity)
    for path, content in documents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(paths.incoming, path, to_bytes(content))
    return [str(path) for path in documents]


def rebuild_index(path: str | os.PathLike[str]) -> RepairReport:
    """Make the index anew from the key arrays: every chunk whose files are all sound brings its rows.

    Where the old index is whole and that of these features, the new one agrees with it: chunks of a commit that was cut
    off go, as the next writer would have it, and so do chunks that are not those that were committed. Where it is lost,
    damaged or an earlier copy, nobody knows which chunk was committed, and every whole one counts. Its rows are found
    by content, so that they are right; there may be more of them than there were.

    What can still be read of the old index (datasets, failures) is taken over; the old index goes to the trash. Row ids
    change, and files that were hashed are read once more. Killed at any instant, it can be called again.

    Raises:
        MissingFileError: there are no features at `path`.
        LockedError: another process is writing.
        StoreError: a newer version wrote the store, or the disk refused.
    """
    paths = StorePaths(Path(path))
    if not paths.zarr.is_dir():
        raise MissingFileError(f"{paths.root}: no features.zarr, so there is nothing to rebuild an index from.")
    with locked(paths), storage_errors(f"{paths.root}: making the index anew failed"):
        report = RepairReport(paths.root)
        try:
            root: Meta | None = read_root(paths)
        except CorruptionError:
            root = None
            report.rewritten.append(str(paths.zarr / "zarr.json"))
        old = salvage(paths, root)
        for path in filter(Path.exists, old.dead):
            report.trashed.append(str(path))
            trash(path, paths.trash)
        _replace_index(paths, _staged_index(paths, root, old, report))
        with contextlib.closing(Index(paths, write=True)) as index:
            publish_generation(index, paths)
            for stored in [stored for stored in index.recipes() if metadata_problems(paths, stored)]:
                report.rewritten += write_metadata(paths, stored)
    report.notes += [f"the old index could not be read: {what}" for what in old.lost]
    if old.bindings is None:
        report.notes.append("datasets were lost; extract with the same manifest binds them again and computes nothing")
    elif old.bindings and not old.current and not old.lost:
        names = ", ".join(str(row[0]) for row in old.bindings)
        report.notes.append(
            f"the old index was not that of these features as they are now, but an earlier copy or another store's: "
            f"look whether its datasets ({names}) are those you want; extract brings them up to date, rm drops them"
        )
    return report


def _staged_index(paths: StorePaths, root: Meta | None, old: Salvage, report: RepairReport) -> Path:
    """The new index, not yet in its place."""
    generation = max(old.generation, root.generation if root is not None else 0)
    staged = paths.incoming / "index.sqlite"
    build_index(staged, root.uuid if root is not None else old.uuid or str(uuids.uuid4()))
    with sqlite_errors(staged), contextlib.closing(sqlite3.connect(staged, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("UPDATE meta SET value = ? WHERE name = 'generation'", (generation + 1,))
        for directory in sorted(path for path in paths.zarr.iterdir() if path.is_dir()):
            _adopt_group(connection, paths, directory.name, old, report)
        insert_bindings(connection, old.bindings or ())
        connection.execute("COMMIT")
    return staged


def _replace_index(paths: StorePaths, staged: Path) -> None:
    """Put the new index into the place of the old one, of which a copy goes to the trash.

    In one step: killed before it, the store still has what only the old index knows, which are its datasets.
    """
    if paths.index.exists():
        # The last one to close it leaves a single file, without a log.
        with contextlib.suppress(FeatureCacheError), contextlib.closing(Index(paths, write=True)) as index:
            index.meta()
        copy = paths.incoming / "old.index.sqlite"
        shutil.copyfile(paths.index, copy)
        trash(copy, paths.trash)
    for name in ("index.sqlite-wal", "index.sqlite-shm", "index.sqlite-journal"):
        if (paths.root / name).exists():  # of a damaged index; it must never be applied to the new one
            trash(paths.root / name, paths.trash)
    move(staged, paths.index)
    sync_directory(paths.root)


def _adopt_group(
    connection: sqlite3.Connection, paths: StorePaths, name: str, old: Salvage, report: RepairReport
) -> None:
    """Add one group of features.zarr with all its sound chunks."""
    described = _described(paths.zarr / name / "zarr.json", name) or old.recipes.get(name)
    if described is None:
        report.notes.append(f"{paths.zarr / name}: its zarr.json doesn't hold its recipe; left as it is, without rows")
        return
    recipe, layout = described.recipe, described.layout
    parts = (recipe.to_json(), layout.to_json(), described.canary, dict(described.recorded))
    texts = (json.dumps(part, ensure_ascii=False) for part in parts)
    number = connection.execute(
        "INSERT INTO recipes (id, digest, base, recipe, layout, canary, recorded) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (recipe.id, recipe.digest, recipe.base, *texts),
    ).lastrowid
    arrays, n = layout.arrays(), layout.rows_per_chunk
    present = sorted({chunk for spec in arrays.values() for chunk in _chunk_numbers(paths, name, spec)})
    numbers = [chunk for chunk in present if name not in old.free or chunk < old.free[name]]
    report.trashed += trash_chunks(paths, described, present[len(numbers) :])
    rows: dict[tuple[bytes, int], int] = {}  # a row that lies twice counts where it was written last
    sound: dict[int, dict[str, ChunkRecord]] = {}
    for chunk in numbers:
        found = _read_chunk(paths, name, arrays, chunk, old.records.get(name, {}))
        if found is None:
            continue
        sound[chunk], keys, replicas = found
        for offset in np.flatnonzero(keys.any(axis=1)).tolist():
            rows[keys[offset].tobytes(), int(replicas[offset])] = chunk * n + offset
    occupied = {slot // n for slot in rows.values()}
    useless = [chunk for chunk in numbers if chunk not in sound or chunk not in occupied]
    report.trashed += trash_chunks(paths, described, useless)
    damaged = [chunk for chunk in numbers if chunk not in sound]
    if damaged:
        report.notes.append(f"recipe {name}: chunks {damaged} are damaged; extract computes what was in them again")
    ordered = sorted((slot, key, replica) for (key, replica), slot in rows.items())
    connection.executemany(
        "INSERT INTO rows (recipe, row, key, replica, slot) VALUES (?, ?, ?, ?, ?)",
        ((number, row, key, replica, slot) for row, (slot, key, replica) in enumerate(ordered)),
    )
    connection.executemany(
        "INSERT INTO chunks (recipe, chunk, array, size, crc32c, sha256) VALUES (?, ?, ?, ?, ?, ?)",
        ((number, chunk, array, *record) for chunk in sorted(occupied) for array, record in sound[chunk].items()),
    )
    last = max(occupied, default=-1)
    in_last = sum(slot // n == last for slot in rows.values())
    connection.execute(
        "UPDATE recipes SET next_row = ?, next_chunk = ?, partial = ? WHERE number = ?",
        (len(rows), max(numbers, default=-1) + 1, last if 0 < in_last < n else None, number),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO failures (recipe, key, reader, message) VALUES (?, ?, ?, ?)",
        ((number, *row) for row in old.failures.get(name, ())),
    )
    report.kept += len(rows)


def _described(path: Path, name: str) -> StoredRecipe | None:
    """The recipe that a group's attributes hold, if they hold the one that its name says."""
    try:
        found = json.loads(path.read_bytes())["attributes"]
        recipe = Recipe.from_json(found["recipe"])
        layout = Layout.from_json(found["layout"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if recipe.id != name or recipe.digest != found.get("digest"):
        return None
    return StoredRecipe(0, recipe, layout, found.get("canary"), found.get("recorded") or {}, 0, 0, None)


def _chunk_numbers(paths: StorePaths, recipe_id: str, spec: ArraySpec) -> Iterator[int]:
    for path in paths.array(recipe_id, spec.name).glob("c.*"):
        part = path.name.split(".")[1]
        if part.isdecimal() and path.name == spec.chunk_name(int(part)):
            yield int(part)


def _read_chunk(
    paths: StorePaths,
    recipe_id: str,
    arrays: dict[str, ArraySpec],
    chunk: int,
    old: dict[tuple[int, str], ChunkRecord],
) -> tuple[dict[str, ChunkRecord], np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Records, keys and replicas of a chunk, or None unless the files of all arrays are sound."""
    records, contents = {}, {}
    for name, spec in arrays.items():
        try:
            content = (paths.array(recipe_id, name) / spec.chunk_name(chunk)).read_bytes()
            records[name], sound = inspect_chunk(content)
            rows = spec.decode(content) if sound else None
        except (OSError, CorruptionError):
            return None
        known = old.get((chunk, name))
        # One of two sums that differs is damage to the old index; both differing means that the file is another one.
        swapped = known is not None and known.crc32c != records[name].crc32c and known.sha256 != records[name].sha256
        if rows is None or swapped:
            return None
        if name in (KEY, REPLICA):
            contents[name] = rows
    return records, contents[KEY], contents.get(REPLICA, np.zeros(len(contents[KEY]), np.int32))
