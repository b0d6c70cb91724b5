"""Bodies and head as one network: images of the views in, the head's logits out, gradient all the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from featurecache.features.features import Block
from featurecache.fusion import Concat


class JointModel(nn.Module):
    """One tapped body per view (or one for several), and the head's module, which begins with the fusion.

    Only images that are there are encoded: a sample without a view costs that body nothing, and its columns are NaN, as
    in the cache: the head can't tell live features from cached ones. Bodies always run in eval mode, also while they
    learn: BatchNorm uses and keeps the statistics that it was pretrained with (batches of fine-tuning are too small to
    estimate better ones, and the cached features that the head starts from were made so), and dropout inside a body
    stays off.

    Args:
        bodies: distinct tapped bodies, or their upper parts; each returns a tuple of tensors, one per tap, first
            dimension the image.
        body_of: for each view, the index of its body in `bodies`.
        blocks: the columns that the views' taps fill, side by side.
        head: takes these columns.
        multi: how several images of a view are joined: `mean` or `max`; otherwise there is one.
        layout: in which the bodies take images; that of stage one in fp32 is contiguous, training is faster in
            channels-last.

    Attributes:
        frozen: while True the bodies run without gradient.
    """

    def __init__(
        self,
        bodies: Sequence[nn.Module],
        body_of: Mapping[str, int],
        blocks: Sequence[Block],
        head: nn.Module,
        *,
        multi: str,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.body_of = dict(body_of)
        self.concat = Concat(blocks)
        self.head = head
        self.multi, self.layout = multi, layout
        self.bodies.to(memory_format=layout)
        self.frozen = False
        self.train(False)

    @property
    def views(self) -> tuple[str, ...]:
        """The views, in the order of the columns of `present`."""
        return self.concat.views

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
        return self.score(self.features(images, present, owner))

    def features(
        self, images: Mapping[str, Tensor], present: Tensor, owner: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The columns of `blocks` (n, width), float32, NaN where a view is missing; arguments as `forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            encoded = dict(self._encode(images))
            columns = []
            for i, (view, width) in enumerate(zip(self.views, self.concat.widths, strict=True)):
                rows = present[:, i].nonzero()[:, 0] if owner is None else owner.get(view)
                columns.append(self._place(encoded.get(view), rows, len(present), width, present.device))
            features: Tensor = self.concat(columns, present)
        return features

    def score(self, features: Tensor) -> Tensor:
        """The head's logits, computed in float32 whatever the bodies run in."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())  # type: ignore[no-any-return]

    def _encode(self, images: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(view, (m, width)) of every view with images; views that share body and size run as one batch."""
        together: dict[tuple[int, torch.Size], list[str]] = {}
        for view in self.views:
            if view in images and len(images[view]):
                together.setdefault((self.body_of[view], images[view].shape[1:]), []).append(view)
        for (body, _), views in together.items():
            batch = images[views[0]] if len(views) == 1 else torch.cat([images[view] for view in views])
            if batch.ndim == 4:
                batch = batch.contiguous(memory_format=self.layout)
            outputs = self.bodies[body](batch)
            flat = torch.cat([output.flatten(1).float() for output in outputs], dim=1)
            parts = torch.split(flat, [len(images[view]) for view in views])
            yield from zip(views, parts, strict=True)

    def _place(self, encoded: Tensor | None, rows: Tensor | None, n: int, width: int, device: torch.device) -> Tensor:
        """(m, width) of images to (n, width) of samples; zeros where a sample has none (masked later)."""
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
