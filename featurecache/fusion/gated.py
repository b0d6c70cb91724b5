"""A learned weight per view and sample: an attention over the views that are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from featurecache.features.features import Block
from featurecache.fusion.base import Fusion, masked


class Gated(Fusion):
    """The weighted mean over the views that a sample has; what a view shows says how much it counts.

    Each view has a linear gate on its standardised features; a softmax over the views that are there turns the gates
    into weights. Gates start at zero, so training starts from the mean. After Ilse et al., "Attention-based deep
    multiple instance learning" (2018), with views for instances.
    """

    name = "gated"

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        width = self.common_width()
        self.blocks = self.one_block(width)
        self.gates = nn.ModuleList(nn.Linear(width, 1) for _ in self.views)
        for gate in self.gates:
            for parameter in gate.parameters():
                nn.init.zeros_(parameter)

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        known = torch.stack([masked(x, present[:, i], 0.0) for i, x in enumerate(views)], dim=1)
        weights = self.weights(known, present)
        return masked((weights[..., None] * known).sum(dim=1), present.any(dim=1), torch.nan)

    def weights(self, known: Tensor, present: Tensor) -> Tensor:
        """(n, n_views) weights that sum to 1 over the views that are there; `known` is (n, n_views, width), finite."""
        seen = layer_norm(known, known.shape[-1:])
        gates = torch.cat([gate(seen[:, i]) for i, gate in enumerate(self.gates)], dim=1)
        lowest = torch.finfo(gates.dtype).min  # not -inf: a sample without any view would give NaN, gradients too
        return gates.masked_fill(~present, lowest).softmax(dim=1)
