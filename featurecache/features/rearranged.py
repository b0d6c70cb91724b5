"""Features seen otherwise: of some views only, with a view taken away, or with views of other samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.features.features import Block, Features, Stored, as_float32, complete_by_reading, gather, views_of


@dataclass(frozen=True)
class Rearranged(ABC):
    """Features made from others, read as these are: see `featurecache.features.features.Stored`."""

    features: Features

    in_ram = False  # a copy saves rearranging them again

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks as they are."""
        return self.features.blocks

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features of these blocks)."""
        return (self.features.shape[0], self.blocks[-1].stop)

    @property
    def _stored(self) -> Stored | None:
        return self.features if isinstance(self.features, Stored) else None

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return np.dtype(np.float32) if self._stored is None else self._stored.dtype

    @property
    def buffer_rows(self) -> int | None:
        """As it is."""
        return None if self._stored is None else self._stored.buffer_rows

    def chunks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chunks of the features as they were."""
        return np.asarray(rows) // 1024 if self._stored is None else self._stored.chunks(rows)

    def complete(self, rows: NDArray[np.int64]) -> bool:
        """Whether all of these have all of the views."""
        return complete_by_reading(self, rows)

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows in `dtype`."""
        out = np.empty((len(rows), self.shape[1]), self.dtype) if out is None else out
        self._fill(np.asarray(rows), out)
        return out

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows as float32."""
        return as_float32(self.gather(rows))

    @abstractmethod
    def _fill(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Put rows into `out`."""


@dataclass(frozen=True)
class SomeViews(Rearranged):
    """The columns of some views, in the order of the blocks."""

    views: tuple[str, ...]

    @cached_property
    def _sources(self) -> tuple[Block, ...]:
        return tuple(block for block in self.features.blocks if block.view in self.views)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of these views, without gaps."""
        found: list[Block] = []
        for block in self._sources:
            start = found[-1].stop if found else 0
            found.append(replace(block, start=start, stop=start + block.stop - block.start))
        return tuple(found)

    def _fill(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        x = gather(self.features, rows)
        for source, block in zip(self._sources, self.blocks, strict=True):
            out[:, block.start : block.stop] = x[:, source.start : source.stop]


@dataclass(frozen=True)
class WithoutView(Rearranged):
    """All columns, with one view missing in every sample."""

    view: str

    def _fill(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        gather(self.features, rows, out)
        for block in self.blocks:
            if block.view == self.view:
                out[:, block.start : block.stop] = np.nan


@dataclass(frozen=True)
class OtherPartners(Rearranged):
    """Each sample keeps its first view; its other views are those of other samples.

    Attributes:
        features: as they are.
        order: view -> (n_samples,) int64: the sample whose view each one gets.
    """

    order: Mapping[str, NDArray[np.int64]]

    def _fill(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        gather(self.features, rows, out)
        for view, order in self.order.items():
            other = gather(self.features, order[rows])
            for block in self.blocks:
                if block.view == view:
                    out[:, block.start : block.stop] = other[:, block.start : block.stop]


def shuffle_partners(features: Features, sides: Sequence[NDArray[np.int64]], *, seed: int) -> OtherPartners:
    """Draw new partners for all views but the first, within each side, so that no side gets features of another.

    Args:
        features: of two views or more.
        sides: rows of train, valid and test; all other rows keep their own.
        seed: of the draw.
    """
    order = {}
    for number, view in enumerate(views_of(features.blocks)[1:]):
        drawn = np.arange(features.shape[0], dtype=np.int64)
        for side, rows in enumerate(sides):
            drawn[rows] = np.random.default_rng((seed, number, side)).permutation(rows)
        order[view] = drawn
    return OtherPartners(features, order)
