"""What an old index, damaged or not, still yields when it is made anew. None of it is needed to find the rows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurecache.errors import CorruptionError, FeatureCacheError
from featurecache.store.binding import binding_names, stored_binding
from featurecache.store.format import ChunkRecord, StorePaths
from featurecache.store.index import Index, Meta, StoredRecipe
from featurecache.store.opening import NewerStoreError, require_known
from featurecache.store.settle import removed_groups


@dataclass
class Salvage:
    """What could be read.

    `records`, `free` and `dead` are held against files: what they condemn goes. So they are filled only from an index
    that is whole and, as far as can be told, that of these features as they are now. One of another store, or a copy
    from before, knows other files by the same names and would condemn what was committed since.

    Attributes:
        uuid: of the store, or ''.
        generation: of the store, or 0.
        current: whether the index is that of these features as they are now.
        recipes: by id.
        records: recipe's id -> (chunk, array) -> sums of the file.
        free: recipe's id -> the first chunk from which on nothing in the index names one, so that what lies there is of
            a commit that was cut off.
        dead: what was dropped, but not yet deleted when a process died.
        failures: recipe's id -> (key, reader, message).
        bindings: their stored columns; None where they were lost.
        lost: why parts could not be read.
    """

    uuid: str = ""
    generation: int = 0
    current: bool = False
    recipes: dict[str, StoredRecipe] = field(default_factory=dict)
    records: dict[str, dict[tuple[int, str], ChunkRecord]] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    dead: list[Path] = field(default_factory=list)
    failures: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    bindings: list[tuple[Any, ...]] | None = None
    lost: list[str] = field(default_factory=list)


def salvage(paths: StorePaths, root: Meta | None) -> Salvage:
    """Read what can be read of the index.

    Args:
        paths: of the store.
        root: what features.zarr says of the store; None where that is damaged.

    Raises:
        NewerStoreError: a newer version wrote it.
    """
    old = Salvage()
    if not paths.index.is_file():
        return old
    index = Index(paths, write=False)
    try:
        try:
            meta = index.meta()
            require_known(paths, meta.format, meta.required_features)
            old.uuid, old.generation = meta.uuid, meta.generation
            old.current = root is None or (meta.uuid == root.uuid and meta.generation >= root.generation)
            _read_recipes(index, old)
        except NewerStoreError:
            raise
        except FeatureCacheError as error:
            old.lost.append(str(error))
            old.current = False
        if not old.current:
            old.records.clear()
            old.free.clear()
            old.dead.clear()
        try:
            old.bindings = _bindings(index)
        except FeatureCacheError as error:
            old.lost.append(str(error))
    finally:
        index.close()
    return old


def _read_recipes(index: Index, old: Salvage) -> None:
    old.dead += removed_groups(index)
    for stored in index.recipes():
        name, rows = stored.recipe.id, stored.layout.rows_per_chunk
        for array, spec in stored.layout.arrays().items():
            directory = index.paths.array(name, array)
            old.dead += [directory / spec.chunk_name(chunk) for chunk in index.superseded(stored.number)]
        records = index.chunks(stored.number)
        with index.reading() as connection:
            query = "SELECT key, reader, message FROM failures WHERE recipe = ?"
            failures = connection.execute(query, (stored.number,)).fetchall()
            query = "SELECT COALESCE(MAX(slot), -1) FROM rows WHERE recipe = ?"
            (last_slot,) = connection.execute(query, (stored.number,)).fetchone()
        # Three witnesses in three tables: one that was damaged must not cost a committed chunk.
        last = max([last_slot // rows, *(chunk for chunk, _ in records)])
        old.recipes[name], old.records[name], old.failures[name] = stored, records, failures
        old.free[name] = max(stored.next_chunk, last + 1)


def _bindings(index: Index) -> list[tuple[Any, ...]]:
    sound = []
    for name in binding_names(index):
        with contextlib.suppress(CorruptionError):
            sound.append(stored_binding(index, name))
    return [columns for columns in sound if columns is not None]
