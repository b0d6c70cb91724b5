"""How two views differ and agree: for pairs, such as the same person or not, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featurecache.errors import InputError
from featurecache.features.features import Block
from featurecache.fusion.base import Fusion, masked


class DifferenceProduct(Fusion):
    """|a - b| and a * b side by side: the same whichever of the two comes first; NaN where one is missing."""

    name = "difference-product"
    needs_all = True

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        if len(self.views) != 2:
            raise InputError(f"fusion {self.name!r} compares two views, found {len(self.views)}: {self.views}")
        self.blocks = self.one_block(2 * self.common_width())

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        a, b = (masked(x, present[:, i], 0.0) for i, x in enumerate(views))
        return masked(torch.cat([(a - b).abs(), a * b], dim=1), present.all(dim=1), torch.nan)
