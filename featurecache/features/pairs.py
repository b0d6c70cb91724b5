"""Pairs of samples of the same or different classes, from cached rows: for Siamese training on frozen bodies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features.features import Features

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Partners:
    """Draws for each of n samples a partner of its class and one of another, each of those there are alike.

    Args:
        classes: (n,) int64, all known.
    """

    def __init__(self, classes: NDArray[np.int64]) -> None:
        self._classes = classes
        # Sorted by class: partners of a class are a range, and those of the others all but that range.
        self._sorted = np.argsort(classes, kind="stable")
        counts = np.bincount(classes, minlength=1)
        self._count, self._start = counts[classes], (np.cumsum(counts) - counts)[classes]

    @property
    def has_same(self) -> NDArray[np.bool_]:
        """(n,) whether there is another of the class."""
        return np.asarray(self._count > 1)

    @property
    def has_other(self) -> NDArray[np.bool_]:
        """(n,) whether there is one of another class."""
        return np.asarray(self._count < len(self._classes))

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions of partners: (n,) of the same class, oneself where there is no other, and (n,) of another class."""
        n = len(self._classes)
        place = np.empty(n, dtype=np.int64)
        place[self._sorted] = np.arange(n)
        # A step from one's own place within the class, of 1 to count - 1, reaches every other one alike.
        step = (rng.random(n) * np.maximum(self._count - 1, 1)).astype(np.int64) + 1
        same = self._start + (place - self._start + step) % self._count
        other = (self._start + self._count + (rng.random(n) * (n - self._count)).astype(np.int64)) % n
        return self._sorted[same], self._sorted[other]


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
        if len(np.unique(self._classes)) < 2:
            raise InputError(f"pairs need rows of two classes; {', '.join(target.names)} has one here")
        self._partners = Partners(self._classes)
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
        same, other = self._partners.draw(rng)
        alike = (rng.random(len(self)) < self._same) & self._partners.has_same
        return np.where(alike | (self._same == 1), same, other)

    def __getitem__(self, index: int) -> Pair:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Pair]:
        """Several pairs by one read: what a DataLoader calls for a batch."""
        first = np.asarray(indices, dtype=np.int64)
        second = self.partners()[first]
        x = torch.from_numpy(self._features[self._rows[np.concatenate([first, second])]])
        alike = torch.from_numpy((self._classes[first] == self._classes[second]).astype(np.float32))
        return list(zip(x[: len(first)], x[len(first) :], alike, strict=True))
