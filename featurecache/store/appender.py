"""The writer: collects rows and commits them chunk by chunk, so that a process may die at any instant."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featurecache.errors import InputError, StoreError
from featurecache.store.chunks import ChunkReader
from featurecache.store.files import move, publish, step, storage_errors, sync_directory, trash, write_file
from featurecache.store.format import (
    KEY,
    REPLICA,
    ArraySpec,
    ChunkRecord,
    StorePaths,
    agrees,
    grown,
    root_document,
    to_bytes,
)
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.recipe import KEY_BYTES, checked_keys

COMMIT_SECONDS = 30.0


class Appender:
    """Adds rows to one recipe. One thread uses it; others may look rows up and read meanwhile, and may close it.

    Attributes:
        refused: (key, message) of rows that were not stored: not finite, or not in the storage dtype.
        appended: rows committed by this appender so far.
        ignored: rows that were left out because the recipe has their key, or an earlier row of this appender had it.
    """

    def __init__(
        self,
        index: Index,
        paths: StorePaths,
        reader: ChunkReader,
        load: Callable[[], StoredRecipe],
        on_close: Callable[[], None],
    ) -> None:
        """Prepare to append.

        Args:
            index: opened for writing.
            paths: of the store.
            reader: reads the rows of a partial chunk.
            load: gives the recipe as it is in the index now.
            on_close: called once, when the appender is closed.
        """
        self.refused: list[tuple[bytes, str]] = []
        self.appended = 0
        self.ignored = 0
        self._index, self._paths, self._load, self._on_close = index, paths, load, on_close
        self._stored = load()
        clear_leftovers(index, paths, self._stored)  # of an appender of this process whose commit failed
        self._layout = self._stored.layout
        self._rows = self._layout.rows_per_chunk
        self._arrays = self._layout.arrays()
        self._buffers = {name: np.zeros(spec.chunk_shape, spec.dtype) for name, spec in self._arrays.items()}
        self._kept: list[int] = []  # row ids of the partial chunk, which lie first in the buffers
        self._filled = 0
        self._pending: set[tuple[bytes, int]] = set()
        self._since: float | None = None
        self._closed = False
        self._lock = threading.RLock()  # after Ctrl-C a store is closed while the thread that writes still does
        self._pid = os.getpid()
        if self._stored.partial is not None:
            self._take_over(reader, self._stored.partial)

    def _take_over(self, reader: ChunkReader, chunk: int) -> None:
        """Copy the rows of the partial chunk in front: they are rewritten together with the next ones."""
        rows = self._index.rows_of(self._stored, chunk)
        offsets = np.array([row[3] for row in rows], np.int64) - chunk * self._rows
        for name, buffer in self._buffers.items():
            buffer[: len(rows)] = reader.chunk(self._stored, name, chunk)[offsets]
        if not np.array_equal(self._buffers[KEY][: len(rows)].tobytes(), b"".join(row[1] for row in rows)):
            reader.read(
                self._stored, self._layout_tap(), np.array([row[0] for row in rows])
            )  # raises, naming the samples
        self._kept = [row[0] for row in rows]
        self._filled = len(rows)

    def _layout_tap(self) -> str:
        return next(iter(self._layout.taps))

    # ---- adding ------------------------------------------------------------------------------------------------------

    def append(self, keys: ArrayLike, arrays: Mapping[str, NDArray[Any]], replica: ArrayLike | None = None) -> int:
        """Add rows; whole chunks are committed at once, the rest when the chunk is full, after 30 s, or by `flush`.

        Args:
            keys: (n, 32) uint8.
            arrays: for each tap of the recipe (n, *row shape), of any float dtype.
            replica: (n,) non-negative numbers, only for a recipe with replicas.

        Returns:
            How many rows were taken; the others were refused or ignored.

        Raises:
            InputError: shapes or names don't fit; nothing was taken.
            StoreError: writing failed; what was committed before is intact, and this appender takes no more.
        """
        if self._pid != os.getpid():
            raise StoreError(
                f"recipe {self._stored.recipe.id}: this appender is of process {self._pid}, this is a child of it"
            )
        with self._lock:
            if self._closed:
                raise StoreError(f"recipe {self._stored.recipe.id}: this appender is closed")
            key_rows, replicas, casts = self._validated(keys, arrays, replica)
            fresh = self._fresh(key_rows, replicas, casts)
            for start in range(0, len(fresh), self._rows):
                self._add(fresh[start : start + self._rows], key_rows, replicas, casts)
            self.commit_if_due()
            return len(fresh)

    def _add(
        self,
        picked: NDArray[np.int64],
        keys: NDArray[np.uint8],
        replicas: NDArray[np.int32],
        casts: Mapping[str, NDArray[Any]],
    ) -> None:
        while len(picked):
            now, picked = np.split(picked, [self._rows - self._filled])
            place = slice(self._filled, self._filled + len(now))
            for name, rows in casts.items():
                self._buffers[name][place] = rows[now]
            self._buffers[KEY][place] = keys[now]
            if REPLICA in self._buffers:
                self._buffers[REPLICA][place] = replicas[now]
            self._pending.update(zip(_split(keys[now]), replicas[now].tolist(), strict=True))
            self._filled += len(now)
            if self._since is None:
                self._since = time.monotonic()
            if self._filled == self._rows:
                self._commit()

    def _validated(
        self, keys: ArrayLike, arrays: Mapping[str, NDArray[Any]], replica: ArrayLike | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32], dict[str, NDArray[Any]]]:
        key_rows = checked_keys(keys)
        n = len(key_rows)
        if n and not key_rows.any(axis=1).all():
            raise InputError("keys: a key of zeros stands for 'no row' and can't be stored")
        if set(arrays) != set(self._layout.taps):
            raise InputError(f"arrays: given for {sorted(arrays)}, the recipe has {sorted(self._layout.taps)}")
        casts = {}
        for name, rows in arrays.items():
            spec, given = self._arrays[name], np.asarray(rows)
            if given.shape != (n, *spec.row_shape) or given.dtype.kind not in "fiu":
                raise InputError(
                    f"array {name}: need {(n, *spec.row_shape)} numbers, found {given.shape} {given.dtype}"
                )
            with np.errstate(over="ignore"):
                casts[name] = given.astype(spec.dtype, copy=False)
        if replica is None:
            if self._layout.replicas:
                raise InputError("replica: this recipe has replicas, each row needs its number")
            return key_rows, np.zeros(n, np.int32), casts
        replicas = np.asarray(replica)
        if replicas.shape != (n,) or replicas.dtype.kind not in "iu" or (n and int(replicas.min()) < 0):
            raise InputError(f"replica: need ({n},) integers from 0, found {replicas.shape} {replicas.dtype}")
        if not self._layout.replicas and replicas.any():
            raise InputError("replica: this recipe has no replicas")
        return key_rows, replicas.astype(np.int32), casts

    def _fresh(
        self, keys: NDArray[np.uint8], replicas: NDArray[np.int32], casts: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.int64]:
        """Row numbers of what is to be stored: finite, and not there yet."""
        if not len(keys):
            return np.zeros(0, np.int64)
        known = self._index.lookup(self._stored.number, keys, replicas) >= 0
        finite = {name: np.isfinite(rows).reshape(len(rows), -1).all(axis=1) for name, rows in casts.items()}
        names, fresh, seen = list(zip(_split(keys), replicas.tolist(), strict=True)), [], set[tuple[bytes, int]]()
        for i, name in enumerate(names):
            if known[i] or name in seen or name in self._pending:
                self.ignored += 1
            elif bad := [tap for tap, good in finite.items() if not good[i]]:
                self.refused.append((name[0], f"{', '.join(bad)}: features are not finite in {self._layout.dtype}"))
                seen.add(name)
            else:
                fresh.append(i)
                seen.add(name)
        return np.array(fresh, np.int64)

    # ---- committing --------------------------------------------------------------------------------------------------

    @property
    def uncommitted(self) -> int:
        """Rows taken and not committed yet."""
        return self._filled - len(self._kept)

    def commit_if_due(self) -> None:
        """Commit the partial chunk if its first uncommitted row is 30 s old; call it while waiting for more rows."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if not self._closed and self._since is not None and time.monotonic() - self._since >= COMMIT_SECONDS:
                self._commit()

    def flush(self) -> None:
        """Commit every row taken so far."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self.uncommitted and not self._closed:
                self._commit()

    def close(self) -> None:
        """Flush and give the recipe back for another appender; in a forked child this does nothing."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            try:
                self.flush()
            finally:
                self._end()

    def _end(self) -> None:
        self._closed = True
        self._buffers.clear()
        self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commit(self) -> None:
        try:
            with storage_errors(f"{self._paths.root}: writing features failed"):
                self._commit_chunk()
        except BaseException:
            # Whether the transaction came through is for the index to say, when the store is opened next.
            self._end()
            raise

    def _commit_chunk(self) -> None:
        stored, filled, kept = self._stored, self._filled, len(self._kept)
        chunk, full = stored.next_chunk, filled == self._rows
        records = write_chunk(self._paths, stored, chunk, self._buffers, filled)
        first = chunk * self._rows
        keys = _split(self._buffers[KEY][kept:filled])
        replicas = self._buffers[REPLICA][kept:filled].tolist() if REPLICA in self._buffers else [0] * (filled - kept)
        moved = [(row, first + i) for i, row in enumerate(self._kept)]
        added = list(zip(keys, replicas, range(first + kept, first + filled), strict=True))
        self._index.commit(stored, chunk, records, moved, added, full=full)
        step("rows-committed")
        clear_superseded(self._index, self._paths, stored)
        step("superseded-trashed")
        publish_generation(self._index, self._paths)
        step("generation-published")
        self.appended += len(added)
        self._kept = [] if full else [*self._kept, *range(stored.next_row, stored.next_row + len(added))]
        self._filled = len(self._kept)
        self._pending.clear()
        self._since = None
        self._stored = self._load()


def _split(keys: NDArray[np.uint8]) -> list[bytes]:
    blob = keys.tobytes()
    return [blob[i : i + KEY_BYTES] for i in range(0, len(blob), KEY_BYTES)]


def write_chunk(
    paths: StorePaths, stored: StoredRecipe, chunk: int, buffers: Mapping[str, NDArray[Any]], filled: int
) -> dict[str, ChunkRecord]:
    """Write one whole chunk of every array into a free slot, fsynced; it counts from the commit on.

    Args:
        paths: of the store.
        stored: the recipe.
        chunk: the free slot.
        buffers: for every array its rows, (rows per chunk, *row shape); those from `filled` on are set to 0.
        filled: how many rows there are.

    Raises:
        StoreError: there is a file in the way.
    """
    ensure_capacity(paths, stored, chunk + 1)
    arrays = stored.layout.arrays()
    records: dict[str, ChunkRecord] = {}
    for name, spec in arrays.items():
        buffers[name][filled:] = 0
        encoded = spec.encode(buffers[name])
        records[name] = encoded.record
        target = paths.array(stored.recipe.id, name) / spec.chunk_name(chunk)
        if target.exists():  # a committed chunk is never touched, whatever a damaged index says
            raise StoreError(f"{target} is in the way. `featurecache verify {paths.root}` tells what is wrong.")
        staged = paths.incoming / f"{stored.recipe.id}.{name}.{spec.chunk_name(chunk)}"
        write_file(staged, encoded.parts)
        move(staged, target)
        step("chunk-written")
    for name in arrays:
        sync_directory(paths.array(stored.recipe.id, name))
    step("chunks-synced")
    return records


def ensure_capacity(paths: StorePaths, stored: StoredRecipe, chunks: int) -> None:
    """Make every array's shape large enough for so many chunks, all the same: plain Zarr readers go by the shape.

    Raises:
        StoreError: a zarr.json is missing or damaged.
    """
    arrays = stored.layout.arrays()
    capacities = {name: array_capacity(paths, stored, spec) for name, spec in arrays.items()}
    target = grown(max(capacities.values()), chunks)
    for name, spec in arrays.items():
        if capacities[name] != target:
            publish(paths.incoming, paths.array(stored.recipe.id, name) / "zarr.json", to_bytes(spec.document(target)))
            step("shape-grown")


def align_shapes(paths: StorePaths, stored: StoredRecipe) -> None:
    """End the growing of shapes that another writer was cut off at; a damaged zarr.json is left for verify to name."""
    with contextlib.suppress(StoreError):
        ensure_capacity(paths, stored, stored.next_chunk)


def array_capacity(paths: StorePaths, stored: StoredRecipe, spec: ArraySpec) -> int:
    """How many chunks an array's shape has room for."""
    path = paths.array(stored.recipe.id, spec.name) / "zarr.json"
    try:
        found = json.loads(path.read_bytes())
        capacity = int(found["shape"][0]) // spec.rows
        if agrees(found, spec.document(capacity)):
            return capacity
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        pass
    raise StoreError(
        f"{path}: missing or damaged. `featurecache verify {paths.root} --repair` writes it anew; no feature is lost."
    )


def clear_superseded(index: Index, paths: StorePaths, stored: StoredRecipe) -> None:
    """Delete the files of chunks whose rows a commit has re-pointed; each goes to the trash first, in one step."""
    chunks = index.superseded(stored.number)
    if not chunks:
        return
    for name, spec in stored.layout.arrays().items():
        for chunk in chunks:
            path = paths.array(stored.recipe.id, name) / spec.chunk_name(chunk)
            if path.exists():
                trash(path, paths.trash).unlink()
        sync_directory(paths.array(stored.recipe.id, name))  # a power cut must not bring back what nobody looks for
    if paths.trash.is_dir():
        sync_directory(paths.trash)
    index.forget_superseded(stored.number, chunks)


def clear_leftovers(index: Index, paths: StorePaths, stored: StoredRecipe) -> list[Path]:
    """Move chunk files that no commit names, at or after the next free slot, to the trash; returns what was moved."""
    named, moved = index.chunks(stored.number), []
    for name, spec in stored.layout.arrays().items():
        directory = paths.array(stored.recipe.id, name)
        for path in sorted(directory.glob("c.*")) if directory.is_dir() else ():
            part = path.name.split(".")[1]
            chunk = int(part) if part.isdecimal() else -1
            if chunk >= stored.next_chunk and path.name == spec.chunk_name(chunk) and (chunk, name) not in named:
                moved.append(trash(path, paths.trash))
    return moved


def publish_generation(index: Index, paths: StorePaths) -> None:
    """Write the index's generation into features.zarr, always after the index: one that is behind is an old copy."""
    meta = index.meta()
    document = root_document(meta.uuid, meta.generation, meta.required_features)
    publish(paths.incoming, paths.zarr / "zarr.json", to_bytes(document))
