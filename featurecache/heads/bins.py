"""Where XGBoost's bins lie, found for some columns at a time: sketches of all at once take more than the binned rows.

XGBoost keeps a sketch of every column while it goes through the rows (of 0.6 MB for 100,000 activations and 256 bins),
and has no way to sketch fewer columns than a matrix has. A column's bins depend on that column alone. So they are asked
for in groups, and handed over as a matrix of a few hundred rows that has just these bins.

Having found a group's bins, XGBoost would go on to sort its rows into them, which takes as long and which nobody needs:
from then on it gets rows without any values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featurecache.heads.fold import Fold
from featurecache.machine.interrupts import Held
from featurecache.machine.memory import give_back

MOST_GROUPS = 16  # each is a pass over the rows
_FACTOR = 8  # `WQSketch::kFactor`: bins are chosen among so many times as many values
_ENTRY, _QUEUED = 16, 8  # bytes of a summarised value, and of one that waits to be
# It goes through the rows to count them, to sketch them, and twice to sort them (`IterativeDMatrix::InitFromCPU`), in
# the versions in which that was tried. Any other gets the same rows again and again.
_TO_BINS = 2 if xgb.__version__.split(".")[:2] in (["3", "0"], ["3", "1"], ["3", "2"]) else math.inf


def sketch_bytes(n: int, max_bin: int) -> int:
    """Bytes of XGBoost's sketch of a column with `n` values, all different: see `WQuantileSketch::LimitSizeLevel`."""
    if n < 1:
        return 0
    finest, levels = _FACTOR * min(n, max_bin), 1
    while (limit := min(n, levels * finest + 1)) << levels < n:
        levels += 1
    return limit * (2 * _QUEUED + 2 * _ENTRY + levels * _ENTRY)


def column_groups(n: int, width: int, max_bin: int, allowed: int) -> list[slice]:
    """Columns that are sketched together so that this takes about `allowed` bytes.

    One group where XGBoost's own way takes no more, and where groups would not take less than half of it: with millions
    of rows their values outweigh the sketches.
    """
    sketch = sketch_bytes(n, max_bin)
    column = sketch + 4 * n  # the values in float32
    groups = min(math.ceil(width * column / max(allowed, 1)), MOST_GROUPS, width)
    if width * sketch <= allowed or 2 * column > groups * sketch:
        groups = 1
    edges = np.linspace(0, width, groups + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def with_bins(fold: Fold, max_bin: int, *, nthread: int, allowed: int, held: Held) -> xgb.QuantileDMatrix | None:
    """A matrix with the bins of a fold's rows, for the `ref` of the one with the rows.

    Args:
        fold: the rows.
        max_bin: of all matrices.
        nthread: 0 is all cores.
        allowed: bytes that the search may take.
        held: whether to stop.

    Returns:
        None where XGBoost may as well look for the bins itself: one group does, or its bins would not be the same.
    """
    width = fold.features.shape[1]
    groups = column_groups(len(fold), width, max_bin, allowed)
    if len(groups) == 1:
        return None
    found: list[_Column] = []
    for group in groups:
        values = np.empty((len(fold), group.stop - group.start), np.float32)
        for where, x in fold.chunks(columns=group):
            held.check()
            values[where] = x
        matrix = xgb.QuantileDMatrix(_ToSketch(values), max_bin=max_bin, nthread=nthread or None)
        found += _columns(matrix, values)
        del matrix, values
        give_back()
    rows = max(len(column.values) for column in found)
    few = np.stack([np.pad(column.values, (0, rows - len(column.values)), mode="edge") for column in found], axis=1)
    reference = xgb.QuantileDMatrix(few, max_bin=max_bin, nthread=nthread or None)
    same = all(np.array_equal(ours, theirs.cuts) for ours, theirs in zip(_cuts(reference), found, strict=True))
    return reference if same else None


class _ToSketch(xgb.DataIter):
    """Hands XGBoost the rows of an array until it has their bins, and then as many without values.

    A row of missing values comes first, so that it takes the matrix for one with gaps from the beginning; it has no
    part in the bins.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._values, self._passed, self._next = values, 0, 0
        super().__init__(release_data=True)

    def next(self, input_data: Callable[..., Any]) -> bool:
        """The missing row, then the array; False after that."""
        part = [np.full((1, self._values.shape[1]), np.nan, np.float32), self._values][self._next : self._next + 1]
        for rows in part:
            input_data(data=rows if self._passed < _TO_BINS else csr_array(rows.shape, dtype=np.float32))
        self._next += 1
        return bool(part)

    def reset(self) -> None:
        """Start again; XGBoost also calls this before the first time."""
        self._passed += self._next > 0
        self._next = 0


class _Column:
    """The cuts of a column, and the values that have these cuts: its least one, the cuts between, its greatest one."""

    def __init__(self, cuts: NDArray[np.float32], least: np.float32, greatest: np.float32) -> None:
        self.cuts = cuts
        # What XGBoost gives first and last are no values: they lie beyond the least and the greatest.
        self.values = np.unique(np.concatenate([[least], cuts[1:-1], [greatest]]).astype(np.float32))


def _columns(matrix: xgb.QuantileDMatrix, values: NDArray[np.float32]) -> list[_Column]:
    least, greatest = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
    return [_Column(*found) for found in zip(_cuts(matrix), least, greatest, strict=True)]


def _cuts(matrix: xgb.QuantileDMatrix) -> list[NDArray[np.float32]]:
    starts, values = matrix.get_quantile_cut()
    return np.split(values, starts[1:-1].astype(np.int64))
