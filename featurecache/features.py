"""What stage two trains on: rows of concatenated features, whatever they are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True)
class ArrayFeatures:
    """Features held in RAM: `x` is (n_samples, n_features)."""

    x: NDArray[Any]
    blocks: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""
        return (self.x.shape[0], self.x.shape[1])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows as float32."""
        return np.asarray(self.x[rows], dtype=np.float32)


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
