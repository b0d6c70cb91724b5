"""Feature rows as torch batches: from a tensor in RAM where they fit, else read batch by batch or by whole chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from featurecache.features.features import Stored, chunk_rows, complete, gather, shuffled_groups
from featurecache.features.stream import read_ahead, read_groups
from featurecache.heads.base import Fold
from featurecache.heads.losses import target_tensor
from featurecache.machine.memory import free_memory

Bounds = Sequence[tuple[int, int]]
Batch = tuple[Tensor, Tensor]


class Rows(ABC):
    """The rows of a fold.

    Attributes:
        missing: whether any row lacks a view.
        nbytes: of RAM that they take.
    """

    missing: bool
    nbytes: int = 0

    def __init__(self, fold: Fold, device: torch.device) -> None:
        self._fold, self._device = fold, device
        self._y = target_tensor(fold.target)
        self.missing = not complete(fold.features, fold.rows)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._fold)

    def epoch(self, bounds: Bounds, generator: torch.Generator) -> Iterator[Batch]:
        """All rows once in random order: features (n, d) float32 with NaN for missing views, and targets.

        Args:
            bounds: start and stop of each batch in the order drawn.
            generator: what the order follows from.
        """
        order = torch.randperm(len(self), generator=generator)
        return (self.batch(order[start:stop]) for start, stop in bounds)

    def in_order(self, size: int | None = None) -> Iterator[Batch]:
        """All rows as they are, `size` or else some thousand at a time."""
        size = size or chunk_rows(self._fold.features.shape[1])
        return (self.batch(torch.arange(start, min(start + size, len(self)))) for start in range(0, len(self), size))

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """The rows at int64 positions (n,), on the device."""


class TensorRows(Rows):
    """All rows in one tensor, of the dtype in which they are stored."""

    def __init__(self, fold: Fold, device: torch.device, place: torch.device) -> None:
        super().__init__(fold, device)
        first = gather(fold.features, fold.rows[:0])
        dtype = torch.from_numpy(first).dtype
        self._x = torch.empty((len(fold), fold.features.shape[1]), dtype=dtype, device=place)
        size = chunk_rows(fold.features.shape[1])
        parts = [slice(start, start + size) for start in range(0, len(fold), size)]
        if place.type == "cpu":
            for part in parts:
                gather(fold.features, fold.rows[part], self._x[part].numpy())
        else:
            read = read_ahead(partial(gather, fold.features), [fold.rows[part] for part in parts])
            for part, x in zip(parts, read, strict=True):
                self._x[part] = torch.from_numpy(x)
        self._y = self._y.to(place)
        self.nbytes = 0 if place.type == "cuda" else self._x.nbytes

    def batch(self, index: Tensor) -> Batch:
        """See `Rows`."""
        index = index.to(self._x.device)
        x = self._x.index_select(0, index)
        return x.to(self._device, torch.float32), self._y[index].to(self._device)


class FeatureRows(Rows):
    """Rows gathered for each batch: they are in RAM already, or mapped."""

    def batch(self, index: Tensor) -> Batch:
        """See `Rows`."""
        x = torch.from_numpy(gather(self._fold.features, self._fold.rows[index.numpy()]))
        return x.to(self._device).float(), self._y[index].to(self._device)


class StreamRows(FeatureRows):
    """Whole chunks in random order, shuffled in a buffer; a buffer for all rows gives the order of `TensorRows`."""

    def epoch(self, bounds: Bounds, generator: torch.Generator) -> Iterator[Batch]:
        """See `Rows`."""
        features = self._fold.features
        assert isinstance(features, Stored)
        groups = shuffled_groups(
            features.chunks(self._fold.rows),
            features.buffer_rows or len(self),
            lambda n: torch.randperm(n, generator=generator).numpy(),
        )
        return self._batches(bounds, groups)

    def _batches(self, bounds: Bounds, groups: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Iterator[Batch]:
        takes = read_groups(self._fold.features, [self._fold.rows[group] for group in groups])
        order, ends = torch.from_numpy(np.concatenate(groups)), iter(np.cumsum([len(group) for group in groups]))
        first = last = 0
        for start, stop in bounds:
            parts, at = [], start
            while at < stop:
                if at == last:
                    take, first, last = next(takes), last, int(next(ends))
                parts.append(take(at - first, min(stop, last) - first))
                at = min(stop, last)
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield x.to(self._device).float(), self._y[order[start:stop]].to(self._device)


def open_rows(fold: Fold, device: torch.device, memory: int | None = None) -> Rows:
    """The rows of a fold, in the fastest way there is room for.

    Args:
        fold: the rows and their targets.
        device: where batches go.
        memory: bytes that they may take in RAM; None is half of what is free.
    """
    features = fold.features
    nbytes = len(fold) * features.shape[1] * gather(features, fold.rows[:0]).itemsize
    if device.type == "cuda" and nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return TensorRows(fold, device, device)
    if getattr(features, "in_ram", False):
        return FeatureRows(fold, device)
    if nbytes <= (free_memory() // 2 if memory is None else memory):
        return TensorRows(fold, device, torch.device("cpu"))
    streamed = isinstance(features, Stored) and features.buffer_rows is not None
    return StreamRows(fold, device) if streamed else FeatureRows(fold, device)
