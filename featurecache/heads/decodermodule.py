"""The decoder as a torch module: maps of several depths in, a class per pixel out; its settings and its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from featurecache import config
from featurecache.data.dense import IGNORE, DenseTarget, foreground
from featurecache.errors import InputError
from featurecache.features.features import Block
from featurecache.heads.losses import ClassWeight, class_weights

FEWEST = 16  # channels of a block
COUNTED = 256  # masks at a time, of which pixels are counted
Size = tuple[int, int]
Upsampling = Literal["shuffle", "transposed"]


class DecoderSettings(config.Settings):
    """Settings of the decoder.

    `width` is the number of channels at the coarsest map; each finer one has half as many, at least 16. `up` enlarges a
    map by sub-pixel convolution (Shi et al., 2016, with ICNR initialisation) or by transposed convolution. The loss of
    a sample is its mean cross-entropy over the known pixels plus `dice` times one minus its soft Dice. `batch_size`
    auto is an eighth of the training rows, between 4 and 16. `lr` is the peak of the one-cycle schedule; training ends
    as that of the FC head does.
    """

    width: Annotated[int, Field(ge=FEWEST)] = 128
    up: Upsampling = "shuffle"
    batch_norm: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dice: Annotated[float, Field(ge=0)] = 1.0
    class_weight: ClassWeight = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Annotated[int, Field(ge=1)] = 20
    patience: Annotated[int, Field(ge=1)] = 6
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class Enlarge(nn.Module):
    """Twice the height and width, from `n_in` to `n_out` channels."""

    def __init__(self, n_in: int, n_out: int, how: Upsampling) -> None:
        super().__init__()
        if how == "transposed":
            self.layers: nn.Module = nn.ConvTranspose2d(n_in, n_out, 2, stride=2)
            return
        conv = nn.Conv2d(n_in, 4 * n_out, 1)
        with torch.no_grad():  # ICNR (Aitken et al., 2017): all four pixels begin alike, so there is no checkerboard
            conv.weight.copy_(nn.init.kaiming_normal_(torch.empty(n_out, n_in, 1, 1)).repeat_interleave(4, dim=0))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(conv, nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, n_in, h, w) -> (n, n_out, 2h, 2w)."""
        found: Tensor = self.layers(x)
        return found


class Level(nn.Module):
    """One step up: the map enlarged to the size of the next finer one, joined with that, two convolutions over both.

    Args:
        n_in: channels from below.
        n_skip: of the finer map; 0 where there is none.
        n_out: channels that it gives.
        scale: how much larger the finer map is.
        settings: of the decoder.
    """

    def __init__(self, n_in: int, n_skip: int, n_out: int, scale: float, settings: DecoderSettings) -> None:
        super().__init__()
        doublings = max(round(math.log2(scale)), 1) if scale > 1 else 0
        sizes = [n_in, *[n_out] * doublings]
        self.up = nn.Sequential(*(Enlarge(a, b, settings.up) for a, b in pairwise(sizes)))
        self.norm = nn.BatchNorm2d(n_skip) if n_skip and settings.batch_norm else nn.Identity()
        self.layers = nn.Sequential(
            *convolution(sizes[-1] + n_skip, n_out, settings), *convolution(n_out, n_out, settings)
        )

    def forward(self, x: Tensor, skip: Tensor | None, size: Size) -> Tensor:
        """(n, n_in, h, w) and (n, n_skip, *size) -> (n, n_out, *size)."""
        x = self.up(x)
        if x.shape[2:] != size:  # odd sizes: 5 -> 11
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        found: Tensor = self.layers(x if skip is None else torch.cat([x, self.norm(skip)], dim=1))
        return found


def convolution(n_in: int, n_out: int, settings: DecoderSettings) -> list[nn.Module]:
    """3 x 3 convolution, BatchNorm, ReLU."""
    norm = [nn.BatchNorm2d(n_out)] if settings.batch_norm else []
    return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=not settings.batch_norm), *norm, nn.ReLU()]


class DecoderModule(nn.Module):
    """A U-Net's right side (Ronneberger et al., 2015) on taps of any body.

    `forward` takes rows (n, columns of the blocks), as the cache and joint training give them, and gives logits
    (n, n_out, *size).

    Args:
        blocks: maps of one view; their order does not matter.
        n_out: classes.
        settings: sizes.
        size: (height, width) of what it predicts.

    Raises:
        InputError: a block is no map.
    """

    def __init__(self, blocks: Sequence[Block], n_out: int, settings: DecoderSettings, size: Size) -> None:
        super().__init__()
        self.size = size
        levels = maps_by_size(blocks)
        self.levels = [(shape, tuple(some)) for shape, some in levels.items()]  # coarsest first
        channels = [sum(block.shape[0] for block in some) for some in levels.values()]
        width = settings.width
        norm = [nn.BatchNorm2d(channels[0])] if settings.batch_norm else []
        self.bottom = nn.Sequential(*norm, *convolution(channels[0], width, settings))
        sizes, made = [*levels, size], []
        for number, (coarse, fine) in enumerate(pairwise(sizes)):
            n_out_here = max(width // 2, FEWEST)
            n_skip = channels[number + 1] if number + 1 < len(channels) else 0
            scale = math.sqrt(fine[0] * fine[1] / (coarse[0] * coarse[1]))
            made.append(Level(width, n_skip, n_out_here, scale, settings))
            width = n_out_here
        self.up = nn.ModuleList(made)
        self.last = nn.Sequential(nn.Dropout(settings.dropout), nn.Conv2d(width, n_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.float()
        maps = [
            torch.cat([x[:, b.start : b.stop].reshape(len(x), *b.shape) for b in some], dim=1)
            for _, some in self.levels
        ]
        found: Tensor = self.bottom(maps[0])
        sizes = [*(size for size, _ in self.levels[1:]), self.size]
        for level, skip, size in zip(self.up, [*maps[1:], None], sizes, strict=True):
            found = level(found, skip, size)
        found = self.last(found)
        return found


def maps_by_size(blocks: Sequence[Block]) -> dict[Size, list[Block]]:
    """Blocks by (height, width), the coarsest first.

    Raises:
        InputError: one is no map.
    """
    found: dict[Size, list[Block]] = {}
    for block in blocks:
        if len(block.shape) != 3:
            name = block.tap.partition("@")[0]
            raise InputError(
                f"head 'decoder': tap {block.tap!r} of view {block.view!r} has the shape {block.shape}, not a map. "
                f"Extract it unpooled (--tap {name}:none), and several depths: `featurecache bodies show` lists them."
            )
        found.setdefault((block.shape[1], block.shape[2]), []).append(block)
    return dict(sorted(found.items(), key=lambda item: item[0][0] * item[0][1]))


class DenseLoss(nn.Module):
    """Cross-entropy and soft Dice (Milletari et al., 2016) of each sample, over its known pixels; samples count alike.

    Args:
        target: of the training rows; all masks can be asked for.
        class_weight: of classes in the cross-entropy; `balanced` by their pixels.
        dice: what the soft Dice counts.
        label_smoothing: of the cross-entropy, in training mode only.
    """

    weights: Tensor

    def __init__(
        self, target: DenseTarget, *, class_weight: ClassWeight = None, dice: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self._masks, self._dice, self._smoothing = target.values, dice, label_smoothing
        self._kept = foreground(target.classes)
        weights = np.ones(len(target.classes))
        if isinstance(class_weight, Mapping):
            weights = class_weights(target, class_weight)  # type: ignore[assignment]
        elif class_weight == "balanced":
            counts = class_pixels(target)
            weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32), persistent=False)

    def masks(self, rows: Tensor) -> Tensor:
        """(n, height, width) int64 on the device of the loss: the masks of rows (n,)."""
        return torch.from_numpy(self._masks[rows.cpu().numpy()]).to(self.weights.device).long()

    def sums(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of the samples, and how many have a known pixel.

        Args:
            outputs: (n, classes, height, width) logits.
            targets: (n,) int64 as `target_tensor` gives them, or masks (n, height, width).
        """
        outputs = outputs.float()
        targets = self.masks(targets) if targets.ndim == 1 else targets.long()
        known = targets != IGNORE
        index = torch.where(known, targets, 0)
        smoothing = self._smoothing if self.training else 0.0
        losses = F.cross_entropy(outputs, index, self.weights, reduction="none", label_smoothing=smoothing) * known
        loss = losses.sum(dim=(1, 2)) / (self.weights[index] * known).sum(dim=(1, 2)).clamp(min=1e-6)
        if self._dice:
            p = outputs.softmax(dim=1)[:, self._kept] * known[:, None]
            hot = F.one_hot(index, outputs.shape[1]).movedim(3, 1)[:, self._kept] * known[:, None]
            both, sizes = (p * hot).sum(dim=(2, 3)), (p + hot).sum(dim=(2, 3))
            loss = loss + self._dice * (1 - ((2 * both + 1) / (sizes + 1)).mean(dim=1))
        there = known.flatten(1).any(dim=1)
        return torch.where(there, loss, 0).sum(), there.sum().to(loss.dtype)


def class_pixels(target: DenseTarget) -> NDArray[np.float64]:
    """(classes,) known pixels of each class."""
    counts = np.zeros(256)
    for start in range(0, len(target), COUNTED):
        counts += np.bincount(target.values[target.rows[start : start + COUNTED]].reshape(-1), minlength=256)
    return counts[: len(target.classes)]
