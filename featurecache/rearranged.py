"""Features seen otherwise: of some views only, with a view taken away, or with views of other samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featurecache.features import Block, Features, views_of


@dataclass(frozen=True)
class SomeViews:
    """The columns of some views, in the order of the blocks."""

    features: Features
    views: tuple[str, ...]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of these views, without gaps."""
        found: list[Block] = []
        for block in self.features.blocks:
            if block.view in self.views:
                start = found[-1].stop if found else 0
                found.append(replace(block, start=start, stop=start + block.stop - block.start))
        return tuple(found)

    @cached_property
    def _columns(self) -> NDArray[np.int64]:
        return np.concatenate([np.arange(b.start, b.stop) for b in self.features.blocks if b.view in self.views])

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features of these views)."""
        return (self.features.shape[0], self.blocks[-1].stop)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows as float32."""
        return self.features[rows][:, self._columns]


@dataclass(frozen=True)
class WithoutView:
    """All columns, with one view missing in every sample."""

    features: Features
    view: str

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks as they are."""
        return self.features.blocks

    @property
    def shape(self) -> tuple[int, int]:
        """As it is."""
        return self.features.shape

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows as float32, NaN in the blocks of the view."""
        x = np.array(self.features[rows], copy=True)
        for block in self.blocks:
            if block.view == self.view:
                x[:, block.start : block.stop] = np.nan
        return x


@dataclass(frozen=True)
class OtherPartners:
    """Each sample keeps its first view; its other views are those of other samples.

    Attributes:
        features: as they are.
        order: view -> (n_samples,) int64: the sample whose view each one gets.
    """

    features: Features
    order: Mapping[str, NDArray[np.int64]]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks as they are."""
        return self.features.blocks

    @property
    def shape(self) -> tuple[int, int]:
        """As it is."""
        return self.features.shape

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows as float32."""
        x = np.array(self.features[rows], copy=True)
        for view, order in self.order.items():
            other = self.features[order[rows]]
            for block in self.blocks:
                if block.view == view:
                    x[:, block.start : block.stop] = other[:, block.start : block.stop]
        return x


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
