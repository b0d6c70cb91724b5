"""Pairs of samples of the same or different classes, from cached rows: for Siamese training on frozen bodies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features import Features

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PairDataset(torch.utils.data.Dataset[Pair]):
    """Each row of a fold with a drawn partner: of the same class for a share of them, else of another.

    Items are (features, features of the partner, 1.0 if of the same class), float32 (d,), (d,) and (). Each row comes
    once an epoch as the first of a pair. Partners are drawn anew when `set_epoch` is called, unless `fixed`.

    Args:
        features: what is read.
        rows: int64 (n,), those of one side of the split: partners come from these alone.
        target: `target.values[i]` belongs to `rows[i]`; binary or multiclass. Rows of unknown class are left out.
        same: share of pairs of one class.
        seed: of the draw.
        fixed: the pairs of every epoch are those of the first: for validation.

    Raises:
        InputError: the target has no classes, fewer than two classes are there, or `same` is no share.
    """

    def __init__(
        self,
        features: Features,
        rows: NDArray[np.int64],
        target: Target,
        *,
        same: float = 0.5,
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        if target.task not in ("binary", "multiclass"):
            raise InputError(f"pairs need a binary or multiclass target; {', '.join(target.names)} is {target.task}")
        if not 0 <= same <= 1:
            raise InputError(f"same={same}: must be a share from 0 to 1")
        known = np.flatnonzero(target.known)
        self._features, self._rows, self._classes = features, np.asarray(rows)[known], target.values[known]
        self._same, self._seed, self._fixed = same, seed, fixed
        # Rows sorted by class: partners of a class are a range, and those of the others all but that range.
        self._sorted = np.argsort(self._classes, kind="stable")
        counts = np.bincount(self._classes, minlength=len(target.classes))
        if np.count_nonzero(counts) < 2:
            raise InputError(f"pairs need rows of two classes; {', '.join(target.names)} has one here")
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        # Shared with the workers of a DataLoader, persistent ones too, which hold a copy of all else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Draw other partners; where the pairs are fixed, keep them."""
        self._epoch.fill_(0 if self._fixed else epoch)

    def partners(self) -> NDArray[np.int64]:
        """(n,) int64: the position of each row's partner in this epoch, never its own unless its class has no other."""
        epoch = int(self._epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(np.random.default_rng([self._seed, epoch])))
        return self._drawn[1]

    def _draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        n = len(self)
        start, count = self._starts[self._classes], self._counts[self._classes]
        place = np.empty(n, dtype=np.int64)
        place[self._sorted] = np.arange(n)
        # A step from one's own place within the class, of 1 to count - 1, reaches every other one alike.
        step = (rng.random(n) * np.maximum(count - 1, 1)).astype(np.int64) + 1
        same = start + (place - start + step) % count
        other = (start + count + (rng.random(n) * (n - count)).astype(np.int64)) % n
        alike = (rng.random(n) < self._same) & (count > 1)
        alike |= np.full(n, self._same == 1)
        found: NDArray[np.int64] = self._sorted[np.where(alike, same, other)]
        return found

    def __getitem__(self, index: int) -> Pair:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Pair]:
        """Several pairs by one read: what a DataLoader calls for a batch."""
        first = np.asarray(indices, dtype=np.int64)
        second = self.partners()[first]
        x = torch.from_numpy(self._features[self._rows[np.concatenate([first, second])]])
        alike = torch.from_numpy((self._classes[first] == self._classes[second]).astype(np.float32))
        return list(zip(x[: len(first)], x[len(first) :], alike, strict=True))
