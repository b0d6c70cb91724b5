"""Takes rows and recipes out of a store: what survives is rewritten, what does not is deleted; kill-proof."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.progress import Reporter
from featurecache.store.appender import clear_superseded, write_chunk
from featurecache.store.chunks import ChunkReader
from featurecache.store.files import step, storage_errors
from featurecache.store.format import KEY, REPLICA, StorePaths
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.recipe import KEY_BYTES
from featurecache.store.schema import LAST_RECIPE, REMOVED, next_generation
from featurecache.store.settle import SCRUB, clear_removed

TASK = "dropping rows"


def affected_chunks(index: Index, stored: StoredRecipe, rows: NDArray[np.int64]) -> tuple[list[int], int]:
    """The chunks that hold any of these rows, and the bytes that these rows take in their files."""
    n, slots = stored.layout.rows_per_chunk, index.slots(stored.number)
    slots_dropped = slots[rows]
    chunks, dropped = np.unique(slots_dropped[slots_dropped >= 0] // n, return_counts=True)
    if not len(chunks):
        return [], 0
    held = np.bincount(slots[slots >= 0] // n)
    sizes = np.zeros(int(chunks[-1]) + 1, np.int64)
    for (chunk, _), record in index.chunks(stored.number).items():
        if chunk < len(sizes):
            sizes[chunk] += record.size
    share = np.where(dropped == held[chunks], 1.0, dropped / n)  # a chunk that isn't full has its file's full size
    return chunks.tolist(), int(np.sum(sizes[chunks] * share))


def drop_rows(
    index: Index, paths: StorePaths, stored: StoredRecipe, rows: NDArray[np.int64], reporter: Reporter
) -> None:
    """Drop rows, their bytes included.

    A committed chunk is never touched: the rows of a chunk that survive are copied into the next free slots and
    re-pointed there by the transaction that drops the others, then the files of the chunk are deleted. So at any
    instant each row is there once, whole, or gone; called again after a kill, it drops what is left.

    Args:
        index: open for writing.
        paths: of the store.
        stored: the recipe as it is now.
        rows: ids of the rows; what is not there is left out.
        reporter: told of the chunks done.

    Raises:
        CorruptionError: a chunk with rows to keep is damaged; repair the store first.
        StoreError: writing failed. Some of the rows are dropped, the others are as they were.
    """
    chunks, _ = affected_chunks(index, stored, rows)
    rewriting = _Rewriting(index, paths, stored, rows)
    reporter.begin(TASK, len(chunks), "chunks")
    with storage_errors(f"{paths.root}: dropping rows failed"):
        for chunk in chunks:
            rewriting.take(chunk)
            reporter.advance(TASK)
        if rewriting.filled and rewriting.partial is not None and rewriting.partial not in chunks:
            rewriting.take(rewriting.partial)  # a recipe has at most one partial chunk
        rewriting.commit()
    reporter.end(TASK)


class _Rewriting:
    """The rows that survive, gathered in the buffers of the next chunk, and the chunks that they leave."""

    def __init__(self, index: Index, paths: StorePaths, stored: StoredRecipe, rows: NDArray[np.int64]) -> None:
        self._index, self._paths, self._stored = index, paths, stored
        self._reader = ChunkReader(index, paths, map_files=False)
        self._dropped = np.zeros(stored.next_row, np.bool_)
        self._dropped[rows] = True
        self._rows = stored.layout.rows_per_chunk
        self._buffers: dict[str, NDArray[Any]] = {}
        self._held: list[int] = []  # row ids in the buffers
        self._left: list[int] = []  # chunks whose last surviving row is in the buffers
        self._next = stored.next_chunk
        self.partial = stored.partial

    @property
    def filled(self) -> int:
        """Rows in the buffers."""
        return len(self._held)

    def take(self, chunk: int) -> None:
        """Copy what survives of a chunk, and commit whenever the buffers are full."""
        found = self._index.rows_of(self._stored, chunk)
        kept = [row for row in found if not self._dropped[row[0]]]
        if kept:
            self._copy(kept)
        self._left.append(chunk)
        if not self.filled:
            self.commit()  # nothing of it has to be written: it can go at once

    def _copy(self, kept: list[tuple[int, bytes, int, int]]) -> None:
        if not self._buffers:
            arrays = self._stored.layout.arrays().items()
            self._buffers = {name: np.zeros(spec.chunk_shape, spec.dtype) for name, spec in arrays}
        ids = np.array([row[0] for row in kept], np.int64)
        values = {name: self._reader.read(self._stored, name, ids) for name in self._stored.layout.taps}
        values[KEY] = np.frombuffer(b"".join(row[1] for row in kept), np.uint8).reshape(-1, KEY_BYTES)
        if REPLICA in self._buffers:
            values[REPLICA] = np.array([row[2] for row in kept], np.int32)
        done = 0
        while done < len(ids):
            now = slice(done, done + self._rows - self.filled)
            count = len(ids[now])
            for name, buffer in self._buffers.items():
                buffer[self.filled : self.filled + count] = values[name][now]
            self._held += ids[now].tolist()
            done += count
            if self.filled == self._rows:
                self.commit()

    def commit(self) -> None:
        """One transaction: the buffers are a chunk, its rows lie there, and the chunks that all rows left are gone."""
        if not self.filled and not self._left:
            return
        stored, number, chunk, filled = self._stored, self._stored.number, self._next, self.filled
        records = write_chunk(self._paths, stored, chunk, self._buffers, filled) if filled else {}
        if self.partial in self._left:
            self.partial = None
        if 0 < filled < self._rows:
            self.partial = chunk
        self._next += bool(filled)
        with self._index.writing() as connection:
            connection.executemany(
                "UPDATE rows SET slot = ? WHERE recipe = ? AND row = ?",
                ((chunk * self._rows + at, number, row) for at, row in enumerate(self._held)),
            )
            for left in self._left:
                values = (number, left * self._rows, (left + 1) * self._rows)
                connection.execute("DELETE FROM rows WHERE recipe = ? AND slot >= ? AND slot < ?", values)
                connection.execute("DELETE FROM chunks WHERE recipe = ? AND chunk = ?", (number, left))
                connection.execute("INSERT INTO superseded (recipe, chunk) VALUES (?, ?)", (number, left))
            connection.executemany(
                "INSERT INTO chunks (recipe, chunk, array, size, crc32c, sha256) VALUES (?, ?, ?, ?, ?, ?)",
                ((number, chunk, name, *record) for name, record in records.items()),
            )
            connection.execute(
                "UPDATE recipes SET next_chunk = ?, partial = ? WHERE number = ?", (self._next, self.partial, number)
            )
            connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, 1)", (SCRUB,))
            next_generation(connection)
        step("rows-dropped")
        clear_superseded(self._index, self._paths, stored)
        step("dropped-chunks-deleted")
        self._held, self._left = [], []


def drop_recipe(index: Index, paths: StorePaths, stored: StoredRecipe) -> None:
    """Drop a recipe with its rows and failures: one transaction, then its group is deleted.

    No dataset may name it any more. Its number and its row ids are not used again.
    """
    with index.writing() as connection:
        largest = connection.execute("SELECT MAX(number) FROM recipes").fetchone()[0]
        (before,) = connection.execute(
            "SELECT COALESCE(MAX(value), 0) FROM meta WHERE name = ?", (LAST_RECIPE,)
        ).fetchone()
        for table in ("rows", "chunks", "superseded", "failures"):
            connection.execute(f"DELETE FROM {table} WHERE recipe = ?", (stored.number,))
        connection.execute("DELETE FROM recipes WHERE number = ?", (stored.number,))
        connection.executemany(
            "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)",
            [(LAST_RECIPE, max(largest, before)), (REMOVED + stored.recipe.id, stored.next_row), (SCRUB, 1)],
        )
        next_generation(connection)
    step("recipe-dropped")
    with storage_errors(f"{paths.root}: deleting recipe {stored.recipe.id} failed"):
        clear_removed(index, paths)
