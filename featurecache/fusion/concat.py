"""The views side by side: what heads train on unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featurecache.fusion.base import Fusion, masked


class Concat(Fusion):
    """The views side by side; the block of a missing view is NaN."""

    name = "concat"

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        return torch.cat([masked(x, present[:, i], torch.nan) for i, x in enumerate(views)], dim=1)

    def join(self, x: Tensor, present: Tensor) -> Tensor:
        """Rows of a cache are concatenated as they are."""
        return x
