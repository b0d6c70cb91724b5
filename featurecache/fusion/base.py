"""What a fusion is: a module that joins the views of a sample, on live features and on cached ones alike.

One representation holds everywhere: a row of features is float (d,), and what a missing view would have filled is NaN.
Cached rows look like that when they are read, `JointModel` makes them look like that from live bodies, and a fusion
gives rows of the same kind, which the head turns into its own idea (see `heads.fcmodule`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from featurecache.errors import InputError
from featurecache.features.features import Block, views_of


class Fusion(nn.Module):
    """Joins the features of the views of a batch.

    A new one is a file of its own: subclass this, set `name`, `blocks` and `forward`, and list it in `fusion/__init__`.

    Args:
        blocks: the columns of the concatenated features, view by view, as a dataset describes them.

    Attributes:
        views: names of the views, in the order in which `forward` takes them.
        widths: features per view.
        blocks: the columns of the output.
        needs_all: whether a sample that lacks a view has nothing to say, so that hiding views teaches nothing.
    """

    name: ClassVar[str]
    needs_all: ClassVar[bool] = False
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

    @classmethod
    def check_preprocessing(cls, preprocessing: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse views whose images don't correspond as this fusion needs them to.

        Args:
            preprocessing: per view, as a recipe holds it.
        """

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

    def join(self, x: Tensor, present: Tensor) -> Tensor:
        """The same from rows of concatenated features, (n, columns of all views), as they come from a cache."""
        fused: Tensor = self(torch.split(x, list(self.widths), dim=1), present)
        return fused

    def one_block(self, width: int) -> tuple[Block, ...]:
        """The columns of an output in which the views can't be told apart any more."""
        return (Block("+".join(self.views), self.name, 0, width, (width,)),)

    def common_width(self) -> int:
        """Features of each view.

        Raises:
            InputError: they differ.
        """
        if len(set(self.widths)) > 1:
            found = ", ".join(f"{view}: {width}" for view, width in zip(self.views, self.widths, strict=True))
            raise InputError(f"fusion {self.name!r} needs views of one width, found {found}. Use 'concat'.")
        return self.widths[0]


def masked(x: Tensor, keep: Tensor, fill: float) -> Tensor:
    """`x` (n, ...) where `keep` (n,) holds, else `fill`; hidden rows get a zero gradient, whatever they hold."""
    keep = keep.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(keep, x, torch.full((), fill, dtype=x.dtype, device=x.device))


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
