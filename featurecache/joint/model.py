"""Bodies, fusion and head as one network: images of the views in, the head's logits out, gradient all the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from featurecache.fusion import Fusion


class JointModel(nn.Module):
    """One tapped body per view (or one for several), a fusion, and the head's module.

    Only images that are there are encoded: a sample without a view costs that body nothing, and the fusion marks its
    columns with NaN, as in the cache. Bodies always run in eval mode, also while they learn: BatchNorm uses and keeps
    the statistics that it was pretrained with (batches of fine-tuning are too small to estimate better ones, and the
    cached features that the head starts from were made so), and dropout inside a body stays off.

    Args:
        bodies: distinct tapped bodies; each returns a tuple of tensors, one per tap, first dimension the image.
        body_of: for each view of `fusion.views`, the index of its body in `bodies`.
        fusion: joins (n, width) per view.
        head: takes what `fusion` gives.
        multi: how several images of a view are joined: `mean` or `max`; otherwise there is one.

    Attributes:
        frozen: while True the bodies run without gradient.
    """

    def __init__(
        self, bodies: Sequence[nn.Module], body_of: Mapping[str, int], fusion: Fusion, head: nn.Module, *, multi: str
    ) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.body_of = dict(body_of)
        self.fusion = fusion
        self.head = head
        self.multi = multi
        self.frozen = False
        self.train(False)

    @property
    def views(self) -> tuple[str, ...]:
        """The views, in the order of the columns of `present`."""
        return self.fusion.views

    def train(self, mode: bool = True) -> JointModel:
        """As `nn.Module.train`, but bodies stay in eval mode."""
        super().train(mode)
        for body in self.bodies:
            body.train(False)
        return self

    def forward(
        self, images: Mapping[str, Tensor], present: Tensor, owner: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits of a batch.

        Args:
            images: per view the images that are there, float32 (m, channels, height, width), normalised.
            present: (n, n_views) bool.
            owner: per view int64 (m,), which sample each image belongs to; by default image i belongs to the i-th
                sample that has the view.

        Returns:
            What the head's module gives, (n, outputs).
        """
        return self.score(self.fuse(images, present, owner))

    def fuse(self, images: Mapping[str, Tensor], present: Tensor, owner: Mapping[str, Tensor] | None = None) -> Tensor:
        """The fused features (n, width), float32, NaN where a view is missing; arguments as `forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            encoded = dict(self._encode(images))
            columns = []
            for i, (view, width) in enumerate(zip(self.views, self.fusion.widths, strict=True)):
                rows = present[:, i].nonzero()[:, 0] if owner is None else owner.get(view)
                columns.append(self._place(encoded.get(view), rows, len(present), width, present.device))
        # Outside of that: a fusion with weights learns while the bodies do not.
        fused: Tensor = self.fusion(columns, present)
        return fused

    def score(self, fused: Tensor) -> Tensor:
        """The head's logits, computed in float32 whatever the bodies run in."""
        with torch.autocast(fused.device.type, enabled=False):
            return self.head(fused.float())  # type: ignore[no-any-return]

    def _encode(self, images: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(view, (m, width)) of every view with images; views that share body and size run as one batch."""
        together: dict[tuple[int, torch.Size], list[str]] = {}
        for view in self.views:
            if view in images and len(images[view]):
                together.setdefault((self.body_of[view], images[view].shape[1:]), []).append(view)
        for (body, _), views in together.items():
            batch = images[views[0]] if len(views) == 1 else torch.cat([images[view] for view in views])
            outputs = self.bodies[body](batch.contiguous(memory_format=torch.channels_last))
            flat = torch.cat([output.flatten(1).float() for output in outputs], dim=1)
            parts = torch.split(flat, [len(images[view]) for view in views])
            yield from zip(views, parts, strict=True)

    def _place(self, encoded: Tensor | None, rows: Tensor | None, n: int, width: int, device: torch.device) -> Tensor:
        """(m, width) of images to (n, width) of samples; zeros where a sample has none (the fusion masks them)."""
        placed = torch.zeros((n, width), device=device)
        if encoded is None or rows is None:
            return placed
        if len(encoded) == n and self.multi not in ("mean", "max"):
            return encoded  # every sample has its one image, in order
        if self.multi == "max":
            index = rows[:, None].expand_as(encoded)
            return placed.scatter_reduce(0, index, encoded, "amax", include_self=False)
        total = placed.index_add(0, rows, encoded)
        if self.multi != "mean":
            return total
        count = torch.zeros(n, device=device).index_add(0, rows, torch.ones(len(rows), device=device))
        return total / count.clamp(min=1)[:, None]
