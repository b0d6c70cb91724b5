"""StoreFeatures: rows of a store joined across views; mapped, held in RAM, or streamed by whole chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featurecache.features.features import GROUP_BYTES, Block, as_float32, spare_threads
from featurecache.machine.memory import free_memory
from featurecache.store import windows
from featurecache.store.catalogue import RecipeInfo
from featurecache.store.files import file_system, is_network
from featurecache.store.store import FeatureStore

Memory = int | Literal["auto"]
Mode = Literal["mapped", "ram", "streamed"]
RAM_SHARE = 0.5  # of the free memory, for features held in RAM under memory="auto"
BUFFER_SHARE = 0.4  # of the budget, for a shuffle buffer, at least GROUP_BYTES; a second is filled meanwhile
SLICE_ROWS = 4096  # read of all views before those that follow, so that a chunk that holds several is decoded once


@dataclass(frozen=True)
class ViewRows:
    """Where the rows of one view lie: `rows` is (n_samples, n_ordinals) row ids, -1 where there is none."""

    view: str
    info: RecipeInfo
    taps: dict[str, tuple[int, ...]]  # name -> shape of a row
    rows: NDArray[np.int64]
    pending: NDArray[np.int64]  # samples with an image that is not yet extracted
    failed: NDArray[np.int64]  # samples with an image that could not be read


class StoreFeatures:
    """Features of samples, (n_samples, n_features), joined across views; see `featurecache.features.features.Features`.

    Attributes:
        mode: `mapped`: rows are copied out of mapped files, each chunk checked at first touch. `ram`: all rows are held
            as stored. `streamed`: random rows are slow, so whoever goes through all of them takes whole chunks.
        nbytes: of the distinct rows, as stored.
        blocks, dims: which columns belong to which view and tap, and the names of a row's dimensions there.
        dtype: float16 where all views are stored so and none is averaged, else float32.
    """

    def __init__(self, store: FeatureStore, parts: Sequence[ViewRows], multi: str, memory: Memory = "auto") -> None:
        self._store, self._parts, self._multi = store, tuple(parts), multi
        blocks, start = [], 0
        for part in self._parts:
            for tap, shape in part.taps.items():
                width = math.prod(shape)
                blocks.append(Block(part.view, tap, start, start + width, shape))
                start += width
        self.blocks: tuple[Block, ...] = tuple(blocks)
        self.dims: tuple[tuple[str, ...], ...] = tuple(
            tuple(part.info.taps[tap].dims) for part in self._parts for tap in part.taps
        )
        self.shape: tuple[int, int] = (len(self._parts[0].rows), start)
        self.nbytes = sum(self._view_bytes(part) for part in self._parts)
        exact = multi != "mean" or all(part.rows.shape[1] == 1 for part in self._parts)
        half = exact and all(stored_dtype(part.info) == np.float16 for part in self._parts)
        self.dtype: np.dtype[Any] = np.dtype(np.float16 if half else np.float32)
        mappable = windows.AVAILABLE and all(part.info.codec == "none" for part in self._parts)
        mappable = mappable and not is_network(file_system(store.path))
        self.mode: Mode = choose_mode(self.nbytes, memory, mappable=mappable)
        self._budget = int(RAM_SHARE * free_memory()) if memory == "auto" else memory
        self._chunks: NDArray[np.int64] | None = None
        self._ram: dict[tuple[str, str], NDArray[Any]] = {}
        self._positions: dict[str, NDArray[np.int64]] = {}

    @staticmethod
    def _view_bytes(part: ViewRows) -> int:
        width = sum(math.prod(shape) for shape in part.taps.values())
        return len(np.unique(part.rows[part.rows >= 0])) * width * stored_dtype(part.info).itemsize

    @property
    def buffer_rows(self) -> int | None:
        """See `featurecache.features.features.Stored`."""
        if self.mode != "streamed":
            return None
        bytes_ = max(int(BUFFER_SHARE * self._budget), GROUP_BYTES)
        return max(bytes_ // (self.dtype.itemsize * self.shape[1]), 1)

    @property
    def in_ram(self) -> bool:
        """See `featurecache.features.features.Stored`."""
        return self.mode == "ram"

    def complete(self, rows: NDArray[np.int64]) -> bool:
        """See `featurecache.features.features.Stored`."""
        return all(bool((part.rows[rows] >= 0).any(axis=1).all()) for part in self._parts)

    def chunks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chunk of each sample's first view that is there; chunks of another recipe have numbers of their own."""
        if self._chunks is None:  # rows may move later, which costs time and nothing else
            self._chunks = self._find_chunks(np.arange(self.shape[0]))
        return self._chunks[rows]

    def _find_chunks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(len(rows), -1, dtype=np.int64)
        base = 0
        recipes: dict[str, int] = {}
        for part in self._parts:
            ids = part.rows[rows].max(axis=1)
            lacking = np.flatnonzero((found < 0) & (ids >= 0))
            chunks = self._store.slots(part.info.id, ids[lacking]) // part.info.rows_per_chunk
            first = recipes.setdefault(part.info.id, base)
            found[lacking] = first + chunks
            base = max(base, first + int(chunks.max(initial=-1)) + 1)
        return found

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), n_features) float32; all of a block is NaN where the sample lacks that view."""
        return as_float32(self.gather(rows))

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See `featurecache.features.features.Stored`."""
        spare_threads()
        rows = np.asarray(rows)
        out = np.empty((len(rows), self.shape[1]), self.dtype) if out is None else out
        for start in range(0, len(rows), SLICE_ROWS):
            here = slice(start, start + SLICE_ROWS)
            blocks = iter(self.blocks)
            for part in self._parts:
                self._hold(part)
                wanted = self._positions.get(part.view, part.rows)[rows[here]]
                for tap in part.taps:
                    block = next(blocks)
                    self._fill(out[here, block.start : block.stop], part, tap, wanted)
        return out

    def _fill(self, out: NDArray[Any], part: ViewRows, tap: str, wanted: NDArray[np.int64]) -> None:
        """One block of a batch; several images of a view are joined by mean or max over those that are there."""
        held = wanted >= 0
        if wanted.shape[1] == 1 or self._multi == "first":
            some = held[:, 0]
            if some.all():
                self._read(part, tap, wanted[:, 0], out)
                return
            out[~some] = np.nan
            found = np.empty((int(some.sum()), out.shape[1]), out.dtype)
            self._read(part, tap, wanted[some, 0], found)
            out[some] = found
            return
        values = np.full((*wanted.shape, out.shape[1]), np.nan, dtype=np.float32)
        found = np.empty((int(held.sum()), out.shape[1]), np.float32)
        self._read(part, tap, wanted[held], found)
        values[held] = found
        some = np.asarray(held.any(axis=1))
        out[~some] = np.nan
        reduce = np.nanmax if self._multi == "max" else np.nanmean
        out[some] = reduce(values[some], axis=1)

    def _read(self, part: ViewRows, tap: str, wanted: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill (len(wanted), width) of `out`: by position in RAM, else by row id from the store."""
        array, dtype = self._ram.get((part.view, tap)), stored_dtype(part.info)
        found = out if out.dtype == dtype else np.empty(out.shape, dtype)
        if array is not None:
            gather_rows(array, wanted, found)
        else:
            self._store.read(part.info.id, tap, wanted, found, gather_rows)
        if found is not out:
            copy_rows(out, found)

    def _hold(self, part: ViewRows) -> None:
        """Read all rows of a view into RAM, if that is the mode."""
        # Not in a DataLoader's worker: a copy of all features in each would take n times the RAM.
        if self.mode != "ram" or part.view in self._positions or torch.utils.data.get_worker_info() is not None:
            return
        distinct = np.unique(part.rows[part.rows >= 0])
        for tap in part.taps:
            found = self._store.read(part.info.id, tap, distinct)
            self._ram[part.view, tap] = found.reshape(len(distinct), math.prod(part.taps[tap]))
        self._positions[part.view] = np.where(part.rows >= 0, np.searchsorted(distinct, part.rows), -1)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is in RAM: whoever unpickles reads it again."""
        return {**self.__dict__, "_ram": {}, "_positions": {}}


def choose_mode(nbytes: int, memory: Memory, *, mappable: bool) -> Mode:
    """How features are read.

    Args:
        nbytes: of the rows, as stored.
        memory: bytes of features to hold in RAM, above which they are streamed; `auto` goes by what is free: files that
            can be mapped are, while the page cache can hold them; others are held in RAM up to half of it.
        mappable: uncompressed chunks on a local disk.
    """
    if memory != "auto":
        return "ram" if nbytes <= memory else "streamed"
    free = free_memory()
    if mappable:
        return "mapped" if nbytes <= free else "streamed"
    return "ram" if nbytes <= RAM_SHARE * free else "streamed"


def stored_dtype(info: RecipeInfo) -> np.dtype[Any]:
    """The dtype of a recipe's features on disk."""
    return np.dtype(info.recipe.storage_dtype)


def gather_rows(source: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """`out[i] = source[index[i]]`, each row copied once, by all of torch's threads."""
    torch.index_select(torch.from_numpy(source), 0, torch.from_numpy(index), out=torch.from_numpy(out))


def copy_rows(out: NDArray[Any], values: NDArray[Any]) -> None:
    """Copy with conversion; by torch, whose conversion of float16 is 16 times as fast as numpy's."""
    torch.from_numpy(out).copy_(torch.from_numpy(values))
