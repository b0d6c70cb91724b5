"""How views are joined into one feature vector: modules for live bodies; a head takes their output as cached rows.

One representation holds everywhere: a row of fused features is float (d,), and what a missing view would have filled is
NaN. Cached rows look like that when they are read, `Concat` makes them look like that from live bodies, and the head
turns NaN into its own idea (see `heads.fc`). So joint training sees what stage two saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featurecache.errors import InputError, did_you_mean
from featurecache.features import Block, views_of


class Fusion(nn.Module):
    """Joins the features of the views of a batch.

    Args:
        blocks: the columns of the concatenated features, view by view, as a dataset describes them.

    Attributes:
        views: names of the views, in the order in which `forward` takes them.
        widths: features per view.
        blocks: the columns of the output; `heads.fc.build_fc` takes these.
    """

    blocks: tuple[Block, ...]

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.views = views_of(tuple(blocks))
        self.widths = tuple(sum(b.stop - b.start for b in blocks if b.view == view) for view in self.views)
        position = 0
        for block in sorted(blocks, key=lambda b: self.views.index(b.view)):
            if block.start != position:
                raise InputError(f"fusion: the columns of view {block.view!r} are not contiguous (tap {block.tap!r})")
            position = block.stop
        self.blocks = tuple(blocks)

    @property
    def width(self) -> int:
        """Features of the fused vector."""
        return self.blocks[-1].stop

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """Fuse.

        Args:
            views: per view a float tensor (n, width of the view); rows of absent views may hold anything.
            present: (n, n_views) bool.

        Returns:
            (n, `width`) float, NaN where nothing is known.
        """
        raise NotImplementedError


class Concat(Fusion):
    """The views side by side; the block of a missing view is NaN. What stage two trains on."""

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        return torch.cat([_masked(x, present[:, i], torch.nan) for i, x in enumerate(views)], dim=1)


class _Pooled(Fusion):
    """Base of the fusions that need views of one width and give one vector of that width."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        if len(set(self.widths)) > 1:
            found = ", ".join(f"{view}: {width}" for view, width in zip(self.views, self.widths, strict=True))
            raise InputError(
                f"fusion {type(self).__name__.lower()!r} needs views of one width, found {found}. Use 'concat'."
            )
        width = self.widths[0]
        self.blocks = (Block("+".join(self.views), type(self).__name__.lower(), 0, width, (width,)),)


class Mean(_Pooled):
    """The mean over the views that a sample has."""

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        total = torch.stack([_masked(x, present[:, i], 0.0) for i, x in enumerate(views)]).sum(dim=0)
        count = present.sum(dim=1, keepdim=True)
        return _masked(total / count.clamp(min=1), count[:, 0] > 0, torch.nan)


class Max(_Pooled):
    """The maximum over the views that a sample has."""

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        highest = torch.stack([_masked(x, present[:, i], -torch.inf) for i, x in enumerate(views)]).amax(dim=0)
        return _masked(highest, present.any(dim=1), torch.nan)


_FUSIONS: dict[str, type[Fusion]] = {"concat": Concat, "mean": Mean, "max": Max}


def fusion_names() -> tuple[str, ...]:
    """The names that `get_fusion` knows."""
    return tuple(_FUSIONS)


def get_fusion(name: str) -> type[Fusion]:
    """The fusion of that name.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name not in _FUSIONS:
        raise InputError(f"unknown fusion {name!r}.{did_you_mean(name, _FUSIONS)} Known: {', '.join(_FUSIONS)}.")
    return _FUSIONS[name]


def drop_views(present: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Hide views at random, so that a head learns to do without them; each sample keeps at least one that it has.

    Args:
        present: (n, n_views) bool, on any device.
        p: probability that a present view is hidden, in [0, 1).
        generator: a CPU generator; draws are made on the CPU, so that they are the same on every device.

    Returns:
        (n, n_views) bool on the device of `present`.
    """
    draws = torch.rand(present.shape, generator=generator).to(present.device).masked_fill(~present, -1.0)
    kept = draws >= p
    return kept | (present & (draws == draws.amax(dim=1, keepdim=True)) & ~kept.any(dim=1, keepdim=True))


def _masked(x: Tensor, keep: Tensor, fill: float) -> Tensor:
    """`x` where `keep` (n,) holds, else `fill`; hidden rows get a zero gradient, whatever they hold."""
    return torch.where(keep[:, None], x, torch.full((), fill, dtype=x.dtype, device=x.device))
