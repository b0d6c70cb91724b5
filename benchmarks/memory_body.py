"""A body that takes no time, for the benchmark of memory: maps of 1024 x 7 x 7 from images of 28 x 28."""

from __future__ import annotations

import torch
from torch import nn


class Wide(nn.Module):
    """One convolution, the average of its maps, a classifier that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 1024, 4, stride=4)
        self.fc = nn.Linear(1024, 2)
        self.preprocessing = {"resize": 28, "crop": 28, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 28, 28) to (n, 2)."""
        return self.fc(self.maps(x).mean((2, 3)))


def wide() -> Wide:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wide()
