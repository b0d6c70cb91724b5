"""Reading rows: row id to slot to chunk, mapped or decoded; every chunk is checked against the index at first touch."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from featurecache.errors import CorruptionError, InputError, StoreError
from featurecache.store import windows
from featurecache.store.binding import name_samples
from featurecache.store.format import CHECKSUM_BYTES, KEY, REPLICA, ArraySpec, ChunkRecord, StorePaths
from featurecache.store.index import Index, StoredRecipe

MOST_MAPS = 4096  # Linux allows a process 65,530 by default; a map and the gap behind it count as two
DECODED_BYTES = 64 * 2**20


class _Missing(Exception):
    """A chunk is not where the row was last seen: it may have been superseded since."""


class _NoMaps(Exception):
    """The platform or file system doesn't map files: chunks are read whole instead."""


class _RecipeState:
    """What was last read from the index of one recipe, and what was checked since."""

    def __init__(self, stored: StoredRecipe) -> None:
        self.stored = stored
        self.arrays = stored.layout.arrays()
        self.rows_per_chunk = stored.layout.rows_per_chunk
        self.slots = np.zeros(0, np.int64)
        self.records: dict[tuple[int, str], ChunkRecord] = {}
        self.windows: dict[str, windows.Window] = {}
        self.checked: set[tuple[int, str]] = set()  # (chunk, array) whose bytes are those of the index
        self.keyed: set[int] = set()  # chunks whose key array agrees with the index


class ChunkReader:
    """Reads rows of all recipes of a store, for one process. Safe to use from several threads.

    A row id stays with a row for good, while the slot that the row lies in changes when a partial chunk is rewritten.
    So slots are looked up here, in a vector that is read from the index once, and again when a row or a chunk isn't
    found.
    """

    def __init__(self, index: Index, paths: StorePaths, *, map_files: bool = True) -> None:
        """Prepare to read; nothing is opened. A file that is mapped keeps its place on the disk when it is deleted."""
        self.index = index
        self.paths = paths
        self.pid = os.getpid()
        self._states: dict[int, _RecipeState] = {}
        self._decoded: OrderedDict[tuple[int, str, int], NDArray[Any]] = OrderedDict()
        self._maps = 0
        self._tick = 0
        self._map_files = map_files and windows.AVAILABLE
        self._lock = threading.RLock()

    def read(
        self,
        stored: StoredRecipe,
        array: str,
        rows: ArrayLike,
        out: NDArray[Any] | None = None,
        gather: windows.Gather = windows.gather_rows,
    ) -> NDArray[Any]:
        """Copies of rows, (n, *row shape), in the storage dtype; or `out`, (n, values of a row), filled with them.

        Raises:
            InputError: no row of the recipe ever had this id.
            StoreError: a row is no longer in the store.
            CorruptionError: stored bytes are missing or not those that were committed; names array, chunk and samples.
        """
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and len(wanted)):
            raise InputError(f"rows: need a vector of integer row ids, found {wanted.dtype} of shape {wanted.shape}")
        wanted = wanted.astype(np.int64, copy=False)
        with self._lock:
            state = self._state(stored)
            spec = state.arrays[array]
            if out is None:
                found = np.empty((len(wanted), *spec.row_shape), spec.dtype)
                self.read(stored, array, wanted, found.reshape(len(wanted), math.prod(spec.row_shape)), gather)
                return found
            if not len(wanted):
                return out
            if int(wanted.min()) < 0:
                raise InputError(
                    f"rows: {int((wanted < 0).sum())} of {len(wanted)} ids are negative: these rows are not there"
                )
            if int(wanted.max()) >= len(state.slots):
                self._refresh(state)
            with suppress(_Missing):
                self._gather(state, spec, self._locate(state, wanted), out, gather)
                return out
            self._refresh(state)
            self._gather_again(state, spec, wanted, out, gather)
            return out

    def _gather_again(
        self,
        state: _RecipeState,
        spec: ArraySpec,
        wanted: NDArray[np.int64],
        out: NDArray[Any],
        gather: windows.Gather,
    ) -> None:
        """The second look at an index just read: what is missing now is lost."""
        try:
            self._gather(state, spec, self._locate(state, wanted), out, gather)
        except _Missing:
            raise self._damage(state, spec, *self._first_missing(state, spec, wanted)) from None

    def slots(self, stored: StoredRecipe, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows lie now; sorting by it makes reading sequential."""
        with self._lock:
            state = self._state(stored)
            self._refresh(state)
            return self._locate(state, rows)

    def chunk(self, stored: StoredRecipe, array: str, chunk: int) -> NDArray[Any]:
        """All rows of one chunk, checked; read-only."""
        with self._lock:
            state = self._state(stored)
            self._refresh(state)
            try:
                return self._decode(state, state.arrays[array], chunk)
            except _Missing:
                raise self._damage(state, state.arrays[array], chunk, "the file is missing") from None

    def _state(self, stored: StoredRecipe) -> _RecipeState:
        return self._states.setdefault(stored.number, _RecipeState(stored))

    def _refresh(self, state: _RecipeState) -> None:
        with self.index.reading():
            state.slots = self.index.slots(state.stored.number)
            state.records = self.index.chunks(state.stored.number)

    def _locate(self, state: _RecipeState, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if int(rows.max(initial=-1)) >= len(state.slots):
            raise InputError(
                f"recipe {state.stored.recipe.id}: no row {int(rows.max())}; it ever had {len(state.slots)} rows"
            )
        slots = state.slots[rows]
        if int(slots.min(initial=0)) < 0:
            gone = rows[slots < 0]
            raise StoreError(
                f"recipe {state.stored.recipe.id}: {len(gone)} of {len(rows)} rows are no longer in the store "
                f"(the first: row {int(gone[0])}). Look the keys up again, or run extract to compute what is missing."
            )
        return slots

    # ---- gathering ---------------------------------------------------------------------------------------------------

    def _gather(
        self,
        state: _RecipeState,
        spec: ArraySpec,
        slots: NDArray[np.int64],
        out: NDArray[Any],
        gather: windows.Gather,
    ) -> None:
        chunks, offsets = np.divmod(slots, state.rows_per_chunk)
        if spec.codec == "none" and self._map_files:
            try:
                window = self._window(state, spec, int(chunks.max()))
                self._take(state, spec, window, chunks, offsets, out, gather)
                return
            except _NoMaps:
                self._map_files = False
        order = np.argsort(chunks, kind="stable")
        starts = np.flatnonzero(np.diff(chunks[order], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            picked = order[start:stop]
            decoded = self._decode(state, spec, int(chunks[picked[0]])).reshape(spec.rows, -1)
            out[as_slice(picked)] = decoded[as_slice(offsets[picked])]

    def _take(
        self,
        state: _RecipeState,
        spec: ArraySpec,
        window: windows.Window,
        chunks: NDArray[np.int64],
        offsets: NDArray[np.int64],
        out: NDArray[Any],
        gather: windows.Gather,
    ) -> None:
        missing = np.unique(chunks[~window.mapped[chunks]])
        if len(missing):
            distinct = np.unique(chunks)
            if len(distinct) > MOST_MAPS:  # more chunks than maps are allowed: in parts
                for start in range(0, len(distinct), MOST_MAPS):
                    part = np.flatnonzero(np.isin(chunks, distinct[start : start + MOST_MAPS]))
                    found = np.empty((len(part), out.shape[1]), out.dtype)
                    self._take(state, spec, window, chunks[part], offsets[part], found, gather)
                    out[part] = found
                return
        self._tick += 1
        window.used[chunks] = self._tick
        for chunk in missing.tolist():
            self._map(state, spec, window, chunk)
        window.take(chunks, offsets, out, gather)

    def _window(self, state: _RecipeState, spec: ArraySpec, chunk: int) -> windows.Window:
        window = state.windows.get(spec.name)
        if window is None or chunk >= window.capacity:
            if window is not None:
                self._maps -= int(window.mapped.sum())
            try:
                window = windows.Window(spec, max(64, 1 << (chunk + 1).bit_length()))
            except OSError as error:  # the address space is limited (ulimit -v)
                raise _NoMaps from error
            state.windows[spec.name] = window
        return window

    def _map(self, state: _RecipeState, spec: ArraySpec, window: windows.Window, chunk: int) -> None:
        record = self._record(state, spec, chunk)
        try:
            descriptor = os.open(self._path(state, spec, chunk), os.O_RDONLY)
        except FileNotFoundError:
            raise _Missing from None
        try:
            size = os.fstat(descriptor).st_size
            tail = os.pread(descriptor, CHECKSUM_BYTES, max(size - CHECKSUM_BYTES, 0))
            if problem := _tail_problem(record, size, tail):
                raise self._damage(state, spec, chunk, problem)
            self._make_room()
            try:
                window.map(chunk, descriptor)
            except OSError as error:
                raise _NoMaps from error
            self._maps += 1
        finally:
            os.close(descriptor)
        if (chunk, spec.name) not in state.checked:
            try:
                self._check(state, spec, chunk, window.content(chunk), record)
            except BaseException:
                window.unmap(chunk)
                self._maps -= 1
                raise

    def _make_room(self) -> None:
        """Unmap what was not used for longest, a quarter of all maps at a time; what this batch uses stays."""
        if self._maps < MOST_MAPS:
            return
        candidates = [
            (int(window.used[chunk]), window, int(chunk))
            for state in self._states.values()
            for window in state.windows.values()
            for chunk in np.flatnonzero(window.mapped & (window.used < self._tick))
        ]
        for _, window, chunk in sorted(candidates, key=lambda entry: entry[0])[: MOST_MAPS // 4]:
            window.unmap(chunk)
            self._maps -= 1

    def _decode(self, state: _RecipeState, spec: ArraySpec, chunk: int) -> NDArray[Any]:
        name = (state.stored.number, spec.name, chunk)
        if name in self._decoded:
            self._decoded.move_to_end(name)
            return self._decoded[name]
        record = self._record(state, spec, chunk)
        try:
            content = self._path(state, spec, chunk).read_bytes()
        except FileNotFoundError:
            raise _Missing from None
        if problem := _tail_problem(record, len(content), content[-CHECKSUM_BYTES:]):
            raise self._damage(state, spec, chunk, problem)
        self._check(state, spec, chunk, np.frombuffer(content, np.uint8)[:-CHECKSUM_BYTES], record)
        rows = spec.decode(content)
        self._decoded[name] = rows
        while len(self._decoded) > 1 and sum(array.nbytes for array in self._decoded.values()) > DECODED_BYTES:
            self._decoded.popitem(last=False)
        return rows

    # ---- checking ----------------------------------------------------------------------------------------------------

    def _path(self, state: _RecipeState, spec: ArraySpec, chunk: int) -> Path:
        return self.paths.array(state.stored.recipe.id, spec.name) / spec.chunk_name(chunk)

    def _record(self, state: _RecipeState, spec: ArraySpec, chunk: int) -> ChunkRecord:
        record = state.records.get((chunk, spec.name))
        if record is None:
            raise _Missing
        return record

    def _check(
        self, state: _RecipeState, spec: ArraySpec, chunk: int, content: NDArray[np.uint8], record: ChunkRecord
    ) -> None:
        if google_crc32c.value(content) != record.crc32c:
            raise self._damage(state, spec, chunk, "its bytes were changed (the checksum differs)")
        if spec.name not in (KEY, REPLICA) and chunk not in state.keyed:
            self._check_keys(state, chunk)
        state.checked.add((chunk, spec.name))

    def _check_keys(self, state: _RecipeState, chunk: int) -> None:
        keys = self._decode(state, state.arrays[KEY], chunk)
        replicas = self._decode(state, state.arrays[REPLICA], chunk) if REPLICA in state.arrays else None
        if not self.index.keys_agree(state.stored, chunk, keys, replicas):
            raise self._damage(state, state.arrays[KEY], chunk, "the keys in it are not those of the index")
        state.keyed.add(chunk)

    def _first_missing(self, state: _RecipeState, spec: ArraySpec, rows: NDArray[np.int64]) -> tuple[int, str]:
        for chunk in np.unique(state.slots[rows] // state.rows_per_chunk).tolist():
            for name in (spec.name, KEY):
                if (chunk, name) not in state.records:
                    return chunk, "the index has rows in it, but no record of the file"
                if not self._path(state, state.arrays[name], chunk).is_file():
                    return chunk, "the file is missing" if name == spec.name else "the file of its keys is missing"
        return int(state.slots[rows[0]] // state.rows_per_chunk), "the file is missing"

    def _damage(self, state: _RecipeState, spec: ArraySpec, chunk: int, problem: str) -> CorruptionError:
        rows = self.index.rows_of(state.stored, chunk)
        return CorruptionError(
            f"{self._path(state, spec, chunk)}: {problem}. Array {spec.name}, chunk {chunk} of recipe "
            f"{state.stored.recipe.id} holds {len(rows)} rows: {name_samples(self.index, {row[1] for row in rows})}. "
            f"`featurecache verify {self.paths.root} --repair` drops them, and the next extract computes them again."
        )


def as_slice(index: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """A slice where that is the same: rows of a chunk that follow each other are then copied once, not twice."""
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and bool((np.diff(index) == 1).all()):
        return slice(first, last + 1)
    return index


def _tail_problem(record: ChunkRecord, size: int, tail: bytes) -> str:
    if size != record.size:
        return f"it has {size} bytes instead of {record.size}"
    if int.from_bytes(tail, "little") != record.crc32c:
        return "it is not the chunk that was committed (its last four bytes differ from the index)"
    return ""
