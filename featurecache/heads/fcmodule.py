"""The FC head as a torch module, for cached features and for joint training: its settings, its layers, its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from featurecache import config
from featurecache.data.targets import Target
from featurecache.features.features import Block, views_of
from featurecache.fusion import drop_views, get_fusion
from featurecache.heads.losses import ClassWeight, PositiveWeight, n_outputs, regression_scale

Fraction = Annotated[float, Field(ge=0, lt=1)]


class FCSettings(config.Settings):
    """Settings of the FC head.

    `dropout` stands before the last layer, half of it before each earlier one, as in fastai. `batch_size` auto is a
    fiftieth of the training rows, as a power of two between 32 and 512. `lr` is the peak of the one-cycle schedule.
    `pool` reduces features that are maps, (channels, height, width) or (channels, height), to a value a channel, or to
    two: `avgmax` is fastai's AdaptiveConcatPool. `pos_weight` is torch's: what positives count, for all labels or by
    label. `mixup` is alpha of the Beta distribution that says how much of a row comes from another.
    `fusion` is how the views are joined; what of it learns, learns with the head.
    Training ends when the validation loss has not improved for `patience` epochs, counted at the earliest from the
    peak of `lr`; the best epoch is kept.
    """

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (512,)
    dropout: Fraction = 0.5
    batch_norm: bool = True
    epochs: Annotated[int, Field(ge=1)] = 30
    patience: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    class_weight: ClassWeight = None
    pos_weight: PositiveWeight = None
    label_smoothing: Fraction = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    view_dropout: Fraction = 0.0
    pool: Literal["none", "avg", "max", "avgmax"] = "none"
    fusion: str = "concat"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.class_weight is not None and self.pos_weight is not None:
            raise ValueError("class_weight and pos_weight weigh the same rows twice: give one of them")
        get_fusion(self.fusion)  # refuses a name that it does not know
        return self


class MapPool(nn.Module):
    """Maps among flattened features, a channel each by their mean, maximum, or both; vectors stay as they are.

    Args:
        blocks: the columns of the input.
        pool: `none`, `avg`, `max` or `avgmax` (maxima first, as in fastai).

    Attributes:
        blocks: the columns of the output.
    """

    def __init__(self, blocks: Sequence[Block], pool: str) -> None:
        super().__init__()
        self._inputs, self._pool = tuple(blocks), pool
        self.blocks: tuple[Block, ...] = tuple(blocks)
        if pool != "none":
            stop, found = 0, []
            for block in blocks:
                shape = block.shape
                if len(shape) > 1:
                    shape = (shape[0] * (2 if pool == "avgmax" else 1),)
                found.append(Block(block.view, block.tap, stop, stop + math.prod(shape), shape))
                stop += math.prod(shape)
            self.blocks = tuple(found)

    def forward(self, x: Tensor) -> Tensor:
        """(n, columns of the input) -> (n, columns of the output); NaN where any of a map is."""
        if self._pool == "none":
            return x
        return torch.cat([self._reduce(x[:, block.start : block.stop], block) for block in self._inputs], dim=1)

    def _reduce(self, x: Tensor, block: Block) -> Tensor:
        if len(block.shape) == 1:
            return x
        maps = x.reshape(len(x), block.shape[0], -1)
        parts = {"avg": (maps.mean(dim=2),), "max": (maps.amax(dim=2),), "avgmax": (maps.amax(dim=2), maps.mean(dim=2))}
        return torch.cat(parts[self._pool], dim=1)


class PresentBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics come from the samples that have the view; what is missing becomes 0 after it.

    A column that is constant in a batch leaves the running variance as it is. Many features of a ReLU body are zero for
    nearly all images: their running variance would fall towards 0 batch by batch, and the first new sample in which
    they are not zero would come out hundreds of standard deviations large.
    """

    def forward(self, x: Tensor, missing: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: (n, d) float32, finite.
            missing: (n, d) bool, or None where nothing is; then this is `nn.BatchNorm1d`.
        """
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        if missing is None:
            if not self.training:
                return super().forward(x)
            after = var.clone()
            out = functional.batch_norm(x, mean, after, self.weight, self.bias, True, self.momentum or 0.1, self.eps)
            with torch.no_grad():
                var.copy_(torch.where((x == x[:1]).all(dim=0), var, after))
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
            return out
        keep = ~missing
        if self.training:
            count = keep.sum(dim=0)
            safe = count.clamp(min=1)
            here = torch.where(keep, x, 0).sum(dim=0) / safe
            spread = torch.where(keep, x - here, 0).square().sum(dim=0) / safe
            enough = count > 1  # one sample has no variance: such columns fall back on the running statistics
            with torch.no_grad():
                step = enough * (self.momentum or 0.1)
                mean.lerp_(here, step)
                lowest, highest = (
                    torch.where(keep, x, math.inf).amin(dim=0),
                    torch.where(keep, x, -math.inf).amax(dim=0),
                )
                var.lerp_(spread * safe / (safe - 1).clamp(min=1), step * (lowest < highest))
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
            mean, var = torch.where(enough, here, mean), torch.where(enough, spread, var)
        return torch.where(keep, (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias, 0)


class FCModule(nn.Module):
    """Fusion, then BatchNorm, dropout, linear, ReLU, BatchNorm, dropout, linear.

    Missing views are zeros plus an indicator, unless the fusion has its own way with them.

    Args:
        blocks: the columns of the input.
        n_out: outputs.
        settings: sizes and dropout.
        indicators: adds an input per view that is 1 where the view is missing. Without them a missing view is a zero
            (the mean, after BatchNorm) and nothing tells.

    `forward` takes float (n, d), NaN in the blocks of missing views, and gives float (n, n_out): logits, for regression
    values in the target's unit (`out_mean`, `out_scale` are buffers).
    """

    first: Tensor
    view_of: Tensor
    inner_first: Tensor
    inner_view_of: Tensor
    out_mean: Tensor
    out_scale: Tensor

    def __init__(self, blocks: Sequence[Block], n_out: int, settings: FCSettings, *, indicators: bool) -> None:
        super().__init__()
        views = views_of(tuple(blocks))
        self.pool = MapPool(blocks, settings.pool)
        self.fusion = get_fusion(settings.fusion)(self.pool.blocks)
        n_in = self.fusion.width
        for prefix, some in (("", blocks), ("inner_", self.fusion.blocks)):
            first, view_of = _view_columns(some)
            self.register_buffer(f"{prefix}first", first, persistent=False)
            self.register_buffer(f"{prefix}view_of", view_of, persistent=False)
        self.register_buffer("out_mean", torch.zeros(n_out))
        self.register_buffer("out_scale", torch.ones(n_out))
        self.indicators = indicators
        self.norm = PresentBatchNorm(n_in) if settings.batch_norm else None
        sizes = [n_in, *settings.hidden]
        self.drop = nn.Dropout(settings.dropout / 2 if settings.hidden else settings.dropout)
        layers: list[nn.Module] = []
        extra = len(views) if indicators else 0
        for i, size in enumerate(settings.hidden):
            layers += [nn.Linear(sizes[i] + (extra if i == 0 else 0), size), nn.ReLU()]
            layers += [nn.BatchNorm1d(size)] if settings.batch_norm else []
            layers += [nn.Dropout(settings.dropout if i == len(settings.hidden) - 1 else settings.dropout / 2)]
        layers.append(nn.Linear(sizes[-1] + (0 if settings.hidden else extra), n_out))
        self.layers = nn.Sequential(*layers)

    @property
    def n_in(self) -> int:
        """Columns of the input."""
        return len(self.view_of)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.float()
        missing = x[:, self.first].isnan()
        x = self.fusion.join(self.pool(x), ~missing)
        hidden = None
        if bool(missing.any()):
            hidden = x[:, self.inner_first].isnan()[:, self.inner_view_of]
            x = torch.where(hidden, 0, x)
        if self.norm is not None:
            x = self.norm(x, hidden)
        x = self.drop(x)
        if self.indicators:
            x = torch.cat([x, missing.to(x.dtype)], dim=1)
        outputs: Tensor = self.layers(x)
        return outputs.float() * self.out_scale + self.out_mean


def _view_columns(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """First column of each view (n_views,), and the view of each column (n_columns,)."""
    views = views_of(tuple(blocks))
    view_of = np.concatenate([np.full(b.stop - b.start, views.index(b.view)) for b in blocks])
    first = [next(b.start for b in blocks if b.view == view) for view in views]
    return torch.tensor(first), torch.as_tensor(view_of)


def build_fc(blocks: Sequence[Block], target: Target, settings: FCSettings, *, indicators: bool) -> FCModule:
    """A fresh module for a task, with regression targets standardised on `target`, the training rows.

    The weights are drawn from torch's global generator: seed it before.
    """
    module = FCModule(blocks, n_outputs(target), settings, indicators=indicators)
    if target.task == "regression":
        mean, scale = regression_scale(target)
        module.out_mean.copy_(torch.as_tensor(mean))
        module.out_scale.copy_(torch.as_tensor(scale))
    return module


def hide_views(x: Tensor, module: FCModule, p: float, generator: torch.Generator | None = None) -> Tensor:
    """View dropout on fused features: NaN in the blocks of views hidden at random, never in all that a row has."""
    there = ~x[:, module.first].isnan()
    kept = drop_views(there, p, generator)
    return torch.where(kept[:, module.view_of], x, torch.nan)


def mix_rows(
    x: Tensor, alpha: float, rng: np.random.Generator, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, float]:
    """Mixup (Zhang et al., 2018) on features: each row becomes part itself, part another row.

    A view that the other row lacks stays the row's own; one that the row lacks stays missing.

    Returns:
        The mixed rows, the partners' positions (n,), and the part, in [0, 1], that is the row's own.
    """
    own = float(rng.beta(alpha, alpha))
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    mixed = own * x + (1 - own) * x[partner]
    return torch.where(mixed.isnan(), x, mixed), partner, own
