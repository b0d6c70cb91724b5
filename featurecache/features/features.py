"""What stage two trains on: rows of concatenated features, whatever they are read from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

Permutation = Callable[[int], NDArray[np.int64]]
CHUNK_BYTES = 16 << 20  # of float32 rows at a time where all of them are gone through
MOST_ROWS = 4096
GROUP_BYTES = 64 << 20  # of rows as stored that are shuffled among each other in an epoch, unless a head chooses
_PROCESS = os.getpid()  # which has imported this


@dataclass(frozen=True)
class Block:
    """The columns `start:stop` of a feature row that one tap of one view fills; `shape` is theirs before flattening."""

    view: str
    tap: str
    start: int
    stop: int
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as saved beside a head."""
        return {"view": self.view, "tap": self.tap, "start": self.start, "stop": self.stop, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Block:
        """The block that `to_json` described."""
        return cls(values["view"], values["tap"], int(values["start"]), int(values["stop"]), tuple(values["shape"]))


class Features(Protocol):
    """Feature rows of samples, (n_samples, n_features), in RAM or not."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Which columns belong to which view and tap, without gaps, in order."""

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), n_features) float32; all of a block is NaN where the sample lacks that view."""


@runtime_checkable
class Stored(Protocol):
    """What features that lie in files can say besides; without it, rows are taken to be cheap to read in any order."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest of float16 and float32 that loses nothing."""

    @property
    def buffer_rows(self) -> int | None:
        """Rows that may be held to shuffle among; None where random rows are read as fast as neighbours."""

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The same as indexing, in `dtype`; put into `out`, (len(rows), n_features), if given."""

    @property
    def in_ram(self) -> bool:
        """Whether they are held in RAM already, so that a copy gains nothing."""

    def chunks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(rows),) int64: what is read together has the same number, what lies later a higher one."""

    def complete(self, rows: NDArray[np.int64]) -> bool:
        """Whether all of these have all views."""


@dataclass(frozen=True)
class ArrayFeatures:
    """Features held in RAM: `x` is (n_samples, n_features)."""

    x: NDArray[Any]
    blocks: tuple[Block, ...]
    in_ram = True

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""
        return (self.x.shape[0], self.x.shape[1])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows as float32."""
        return as_float32(self.x[rows])


def spare_threads() -> None:
    """Keep torch to one thread in a forked process: OpenMP would wait for those of the parent, which are not there."""
    if os.getpid() != _PROCESS:
        torch.set_num_threads(1)


def as_float32(x: NDArray[Any]) -> NDArray[np.float32]:
    """The same values as float32; half precision through torch, which is 16 times as fast there as numpy."""
    if x.dtype == np.float16:
        return torch.from_numpy(np.ascontiguousarray(x)).float().numpy()
    return np.asarray(x, dtype=np.float32)


def gather(features: Features, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Rows in the dtype that they are stored in, where the features say so, else float32; in `out` if given."""
    if isinstance(features, Stored):
        return features.gather(rows, out)
    if out is None:
        return features[rows]
    out[:] = features[rows]
    return out


def chunk_rows(width: int) -> int:
    """Rows of `width` features that are in float32 at a time."""
    return min(max(CHUNK_BYTES // (4 * width), 1), MOST_ROWS)


def group_rows(features: Features) -> int:
    """Rows that are shuffled among each other: the same however the features are read, so that the order is too."""
    stored = features if isinstance(features, Stored) else None
    row_bytes = features.shape[1] * (4 if stored is None else stored.dtype.itemsize)
    found = max(GROUP_BYTES // row_bytes, 1)
    return found if stored is None or stored.buffer_rows is None else min(found, stored.buffer_rows)


def complete(features: Features, rows: NDArray[np.int64]) -> bool:
    """Whether all of these rows have all views; asked, or else found out by reading them."""
    return features.complete(rows) if isinstance(features, Stored) else complete_by_reading(features, rows)


def complete_by_reading(features: Features, rows: NDArray[np.int64]) -> bool:
    """Whether all of these rows have all views."""
    size = chunk_rows(features.shape[1])
    rows = np.sort(rows)
    return all(bool(present(features[rows[i : i + size]], features.blocks).all()) for i in range(0, len(rows), size))


def reading_order(features: Features, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in `rows` in the order to go through them: as they are, unless that reads chunks over and over.

    What is fitted should not depend on how the store happens to lie, so this changes nothing while each chunk is read
    about once, or while rows are read one by one anyhow.
    """
    same = np.arange(len(rows), dtype=np.int64)
    if not isinstance(features, Stored) or features.buffer_rows is None or not len(rows):
        return same
    chunks = features.chunks(rows)
    changes = 1 + np.count_nonzero(np.diff(chunks))
    return np.argsort(chunks, kind="stable") if changes > 4 * len(np.unique(chunks)) else same


def shuffled_groups(chunks: NDArray[np.int64], buffer: int, permutation: Permutation) -> list[NDArray[np.int64]]:
    """An epoch's order where random rows are slow: every position once, in groups that are read and shuffled as one.

    Whole chunks are drawn in random order until a group holds `buffer` rows; then the rows of a group are shuffled. A
    buffer for all rows makes this a plain permutation of them.

    Args:
        chunks: (n,) which chunk each position lies in.
        buffer: rows of a group, exceeded by less than a chunk.
        permutation: gives the numbers below n in random order; the epoch's order follows from it.

    Returns:
        Groups of positions, (any number,) int64 each.
    """
    n = len(chunks)
    if buffer >= n:
        return [permutation(n)] if n else []
    order = np.argsort(chunks, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1)
    groups: list[NDArray[np.int64]] = []
    held: list[NDArray[np.int64]] = []
    for number in permutation(len(parts)):
        held.append(parts[number])
        if sum(map(len, held)) >= buffer:
            groups.append(np.concatenate(held))
            held = []
    if held:
        groups.append(np.concatenate(held))
    return [group[permutation(len(group))] for group in groups]


def views_of(blocks: tuple[Block, ...]) -> tuple[str, ...]:
    """The views of the blocks, each once, in order."""
    return tuple(dict.fromkeys(block.view for block in blocks))


def present(x: NDArray[np.float32], blocks: tuple[Block, ...]) -> NDArray[np.bool_]:
    """(n, n_views) bool: which views a sample has, told from the first column of each view's first block."""
    first = [next(block.start for block in blocks if block.view == view) for view in views_of(blocks)]
    return ~np.isnan(x[:, first])


def feature_names(blocks: tuple[Block, ...]) -> list[str]:
    """One name a column: view, tap and index, as in `frontal.penultimate@none.17`."""
    return [f"{block.view}.{block.tap}.{i}" for block in blocks for i in range(block.stop - block.start)]
