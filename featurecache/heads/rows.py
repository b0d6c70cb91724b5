"""Feature rows as torch batches: from a tensor in RAM where they fit, else read from the features batch by batch."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from featurecache.features import present
from featurecache.heads.base import Fold
from featurecache.heads.losses import target_tensor


class Rows(Protocol):
    """The rows of a fold by position."""

    @property
    def missing(self) -> bool:
        """Whether any row lacks a view."""

    def __len__(self) -> int:
        """Number of rows."""

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) float32 with NaN for missing views, and targets, on the device, for int64 positions (n,)."""


class TensorRows:
    """All rows in one tensor: float32, or float16 where that saves needed room and loses nothing."""

    def __init__(self, x: Tensor, y: Tensor, device: torch.device, *, missing: bool) -> None:
        self._x, self._y, self._device = x, y, device
        self.missing = missing

    def __len__(self) -> int:
        """See `Rows`."""
        return len(self._x)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rows`."""
        index = index.to(self._x.device)
        return self._x.index_select(0, index).to(self._device, torch.float32), self._y[index].to(self._device)


class FeatureRows:
    """Rows read by fancy indexing for each batch."""

    def __init__(self, fold: Fold, device: torch.device, *, missing: bool) -> None:
        self._fold, self._device = fold, device
        self._y = target_tensor(fold.target)
        self.missing = missing

    def __len__(self) -> int:
        """See `Rows`."""
        return len(self._fold)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rows`."""
        x = self._fold.features[self._fold.rows[index.numpy()]]
        return torch.from_numpy(x).to(self._device), self._y[index].to(self._device)


def open_rows(fold: Fold, device: torch.device, memory: int | None = None) -> Rows:
    """The rows of a fold, in RAM if they fit.

    Args:
        fold: the rows and their targets.
        device: where batches go.
        memory: bytes that the features may take; None is half of what is free.
    """
    n, d = len(fold), fold.features.shape[1]
    budget = free_memory() // 2 if memory is None else memory
    dtype = np.float32 if 4 * n * d <= budget else np.float16
    x = np.empty((n, d), dtype=dtype) if 2 * n * d <= budget else None
    missing = False
    for where, chunk in fold.chunks():
        missing = missing or not present(chunk, fold.features.blocks).all()
        if x is None:
            if missing:
                break
            continue
        if dtype == np.float16:
            with np.errstate(over="ignore"):
                x[where] = chunk
            if not np.array_equal(x[where], chunk, equal_nan=True):
                x = None  # float16 would lose digits
        else:
            x[where] = chunk
    if x is None:
        return FeatureRows(fold, device, missing=missing)
    tensor, y = torch.from_numpy(x), target_tensor(fold.target)
    if device.type == "cuda" and x.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        tensor, y = tensor.to(device), y.to(device)
    return TensorRows(tensor, y, device, missing=missing)


def free_memory() -> int:
    """Bytes of RAM that can be had without swapping; 4 GiB where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 4 * 2**30
