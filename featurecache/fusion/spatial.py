"""Views stacked row by row: the vertical axis that they share is kept until the views have been compared along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featurecache.errors import InputError
from featurecache.features.features import Block
from featurecache.fusion.base import Fusion, masked

WIDTH = 256  # channels of the convolutions, or fewer where the maps have fewer
FIELDS = ("resize", "crop", "resize_mode")  # of preprocessing: what says which row of an image a row of a map is


class Spatial(Fusion):
    """Maps averaged over their width, (channels, height), stacked to (channels, n_views, height), then convolved.

    The first convolution spans all views and three rows, the second three rows; mean and maximum over the rows follow.
    Frontal and lateral X-rays share the vertical axis, so that what lies at one height is seen together. Each view's
    map is normalised by itself before, over channels and rows; a missing view is zeros there, as the mean is.

    The maps come from a tap with the pooling `rows`, or `none`, in which case they are averaged here.
    """

    name = "spatial"

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__(blocks)
        shapes = {block.view: block.shape for block in blocks}
        flat = [f"{b.view}: {b.tap} {b.shape}" for b in blocks if len(b.shape) not in (2, 3)]
        if flat or len(blocks) > len(self.views):
            found = flat or [f"{b.view}: {b.tap}" for b in blocks]
            raise InputError(
                f"fusion 'spatial' needs one map per view, (channels, height), found {', '.join(found)}. "
                "Tap a module with the pooling rows (--tap layer4:rows), and leave the head's setting pool at none."
            )
        if len({shape[:2] for shape in shapes.values()}) > 1:
            found = [f"{view}: {shape}" for view, shape in shapes.items()]
            raise InputError(
                f"fusion 'spatial' needs maps of the same channels and height in all views, found {', '.join(found)}. "
                "Give all views one body, tap and image size."
            )
        self.shapes = tuple(shapes.values())
        channels, height = self.shapes[0][:2]
        width, rows = min(WIDTH, channels), 3 if height >= 3 else 1
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for _ in self.views)
        self.across = nn.Conv2d(channels, width, (len(self.views), rows), padding=(0, rows // 2))
        self.along = nn.Conv2d(width, width, (1, rows), padding=(0, rows // 2))
        self.blocks = self.one_block(2 * width)

    @classmethod
    def check_preprocessing(cls, preprocessing: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse views whose rows don't correspond.

        Raises:
            InputError: they are brought to size in different ways, or by cutting off what is too high.
        """
        found = {view: tuple(fields[name] for name in FIELDS) for view, fields in preprocessing.items()}
        if len(set(found.values())) > 1 or any(mode not in ("squash", "pad") for _, _, mode in found.values()):
            listed = [
                f"{view}: " + ", ".join(f"{name} {value}" for name, value in zip(FIELDS, values, strict=True))
                for view, values in found.items()
            ]
            raise InputError(
                "fusion 'spatial' compares the views row by row, so all of them need the same image size and "
                f"--resize-mode squash or pad (crop cuts off other rows of each image); found {'; '.join(listed)}"
            )

    def forward(self, views: Sequence[Tensor], present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        maps = []
        for i, (x, norm) in enumerate(zip(views, self.norms, strict=True)):
            rows = masked(x, present[:, i], 0.0).reshape(len(x), *self.shapes[i])
            rows = rows.mean(dim=3) if rows.ndim == 4 else rows
            maps.append(masked(norm(rows), present[:, i], 0.0))
        x = self.along(self.across(torch.stack(maps, dim=2)).relu()).relu()
        pooled = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return masked(pooled, present.any(dim=1), torch.nan)
