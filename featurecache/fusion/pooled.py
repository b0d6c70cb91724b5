"""The mean or the maximum over the views that a sample has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featurecache.features.features import Block
from featurecache.fusion.base import Fusion, masked


class _Pooled(Fusion):
    """Base of the fusions that give one vector of the width that all views have."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        self.blocks = self.one_block(self.common_width())


class Mean(_Pooled):
    """The mean over the views that a sample has."""

    name = "mean"

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        total = torch.stack([masked(x, present[:, i], 0.0) for i, x in enumerate(views)]).sum(dim=0)
        count = present.sum(dim=1, keepdim=True)
        return masked(total / count.clamp(min=1), count[:, 0] > 0, torch.nan)


class Max(_Pooled):
    """The maximum over the views that a sample has."""

    name = "max"

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        highest = torch.stack([masked(x, present[:, i], -torch.inf) for i, x in enumerate(views)]).amax(dim=0)
        return masked(highest, present.any(dim=1), torch.nan)
