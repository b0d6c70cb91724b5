"""Rows to train on with their targets, and what they say too little about to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features.features import Features, Stored, as_float32, chunk_rows, gather, reading_order
from featurecache.features.stream import read_ahead


@dataclass(frozen=True)
class Fold:
    """Some rows of the features with their targets.

    Attributes:
        features: all rows.
        rows: int64 (n,), which of them are meant.
        target: `target.values[i]` belongs to `rows[i]`.
    """

    features: Features
    rows: NDArray[np.int64]
    target: Target

    def __len__(self) -> int:
        return len(self.rows)

    def known(self) -> Fold:
        """The rows that have a target (multilabel and several regression targets: at least one)."""
        known = np.asarray(self.target.known)
        if known.all():
            return self
        keep = np.flatnonzero(known)
        return Fold(self.features, self.rows[keep], self.target.subset(keep))

    def chunks(
        self, size: int | None = None, columns: slice | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Positions within the fold and their features, (up to `size`, n_features) float32 at a time.

        Where the features are streamed, the next rows are read meanwhile.

        Args:
            size: rows at a time.
            columns: of the features; None is all of them.
        """

        def read(rows: NDArray[np.int64]) -> NDArray[np.float32]:
            return self.features[rows] if columns is None else as_float32(gather(self.features, rows)[:, columns])

        size = size or chunk_rows(self.features.shape[1])
        places = [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        if isinstance(self.features, Stored) and self.features.buffer_rows is not None:
            parts = read_ahead(read, [self.rows[where] for where in places])
            yield from zip(places, parts, strict=True)
            return
        for where in places:
            yield where, read(self.rows[where])

    def to_read(self) -> Fold:
        """The same in the order in which rows are best read; see `featurecache.features.features.reading_order`."""
        order = reading_order(self.features, self.rows)
        if np.array_equal(order, np.arange(len(order))):
            return self
        return Fold(self.features, self.rows[order], self.target.subset(order))


def with_target(fold: Fold, what: str) -> Fold:
    """The fold's rows with a target, refused where there are none."""
    if len(fold.rows) != len(fold.target):
        raise InputError(f"{what}: {len(fold.rows)} rows but {len(fold.target)} targets")
    known = fold.known()
    if not len(known):
        raise InputError(f"{what}: none of the {len(fold)} rows has a known target")
    return known


def untrainable(target: Target) -> tuple[str, ...]:
    """Labels, targets or classes that the training rows say nothing about.

    Args:
        target: of the training rows; those without a known target do not count.

    Raises:
        InputError: there is nothing left to train.
    """
    values = target.values
    if target.task == "dense":
        return ()
    if target.task in ("binary", "multiclass"):
        counts = np.bincount(values[values >= 0], minlength=len(target.classes))
        if np.count_nonzero(counts) < 2:
            only = target.classes[int(counts.argmax())]
            raise InputError(
                f"training rows of {target.names[0]!r} hold only the class {only!r}: nothing to tell apart"
            )
        return tuple(name for name, count in zip(target.classes, counts, strict=True) if not count)
    if target.task == "multilabel":
        trainable = (values == 0).any(axis=0) & (values == 1).any(axis=0)
        why = "no label has both a known positive and a known negative"
    else:
        trainable, why = ~np.isnan(values).all(axis=0), "no target has a known value"
    if not trainable.any():
        raise InputError(f"training rows of {', '.join(target.names)}: {why}")
    return tuple(name for name, good in zip(target.names, trainable, strict=True) if not good)
