"""Dense targets: the class of every pixel, at the size that the body sees; rows of a file, not an array in RAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target

DENSE: Final = "dense"
IGNORE = 255  # in `values`: the pixel counts nowhere
BACKGROUND = "0"  # the class that means over classes leave out
MOST_CLASSES = 64


@dataclass(frozen=True, eq=False)
class DenseTarget(Target):
    """The masks of n samples.

    Attributes:
        task: `dense`.
        names: the column of mask images, one.
        classes: pixel values as text, in numeric order.
        values: uint8 (m, height, width), index into `classes`, IGNORE where unknown; mapped from a file.
        rows: int64 (n,), which of `values` belong to the samples.
        has: bool (m,), whether a sample has a mask.
        filled: bool (m,), whether anything but background is in it.
    """

    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    has: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    filled: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))

    @property
    def known(self) -> NDArray[np.bool_]:
        """Samples (n, bool) with a mask."""
        return np.asarray(self.has[self.rows])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the masks."""
        return int(self.values.shape[1]), int(self.values.shape[2])

    def subset(self, rows: np.ndarray) -> DenseTarget:
        """The masks of these rows (indices or a mask); nothing is read."""
        return replace(self, rows=self.rows[rows])

    def strata(self) -> NDArray[np.int64]:
        """(n,) 1 where anything but background is in the mask, 0 elsewhere."""
        return np.asarray(self.filled[self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)


def foreground(classes: Sequence[str]) -> list[int]:
    """The classes over which means are taken: all but the background, where there is one."""
    return [number for number, name in enumerate(classes) if name != BACKGROUND]


def pixel_counts(true: NDArray[np.uint8], said: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """How many pixels of each sample and class there are, by what they are and what they were said to be.

    Args:
        true: (n, height, width) class indices, IGNORE where unknown: these pixels are not counted.
        said: (n, height, width) class indices.
        classes: how many there are.

    Returns:
        (n, classes, 3): truly of the class, said to be, and both.
    """
    n = len(true)
    pair = true.astype(np.int64) * classes + said
    pair += (np.arange(n) * classes**2)[:, None, None]
    table = np.bincount(pair[true != IGNORE], minlength=n * classes**2).reshape(n, classes, classes)
    right = np.diagonal(table, axis1=1, axis2=2)
    return np.stack([table.sum(axis=2), table.sum(axis=1), right], axis=2)
