"""Mixup and CutMix over the samples of a batch, all views of a sample with those of the same other sample.

torchvision's own mix one tensor with one class per sample. Here a sample has several views, some of them absent, and
its labels may be unknown: so the loss takes both samples' targets, each with its part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.joint.images import Batch

MIXINGS = ("mixup", "cutmix")
ALPHA = {"mixup": 0.2, "cutmix": 1.0}  # of the Beta distributions, as in Zhang et al. (2018) and Yun et al. (2019)


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        batch: the images, mixed.
        partner: (n,) int64, the position of the sample that each one is mixed with.
        own: the part, in [0, 1], that is the sample's own.
    """

    batch: Batch
    partner: NDArray[np.int64]
    own: float


def mix(batch: Batch, names: Sequence[str], rng: np.random.Generator) -> Mixed:
    """Mix every sample of a batch with another one, by one of the named ways, drawn for this batch.

    CutMix pastes the same rectangle, in relative coordinates, into all views. A view that the other sample lacks stays
    as it is; one that the sample lacks stays absent.

    Args:
        batch: of at least two samples.
        names: `mixup`, `cutmix` or both.
        rng: of this step.
    """
    name = names[int(rng.integers(len(names)))]
    own = float(rng.beta(ALPHA[name], ALPHA[name]))
    partner = rng.permutation(len(batch.samples)).astype(np.int64)
    x, y = rng.uniform(size=2)
    box = _box(own, float(x), float(y))
    if name == "cutmix":
        own = 1 - (box[2] - box[0]) * (box[3] - box[1])
    images = {}
    for view, tensor in batch.images.items():
        other = tensor[_others(batch.owner[view].numpy(), partner).to(tensor.device)]
        images[view] = _paste(tensor, other, box) if name == "cutmix" else _blend(tensor, other, own)
    return Mixed(replace(batch, images=images), partner, own)


def _others(owner: NDArray[np.int64], partner: NDArray[np.int64]) -> Tensor:
    """Per image the position of the one that it is mixed with: the partner's of the same number, else itself."""
    held: dict[int, list[int]] = {}
    for position, sample in enumerate(owner.tolist()):
        held.setdefault(sample, []).append(position)
    found = np.arange(len(owner))
    for sample, own in held.items():
        theirs = held.get(int(partner[sample]), [])
        for number, position in enumerate(own):
            if theirs:
                found[position] = theirs[number % len(theirs)]
    return torch.from_numpy(found)


def _box(own: float, x: float, y: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in 0..1: a rectangle of area 1 - own around (x, y), cut off at the edges."""
    half = math.sqrt(1 - own) / 2
    return max(x - half, 0.0), max(y - half, 0.0), min(x + half, 1.0), min(y + half, 1.0)


def _paste(tensor: Tensor, other: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    height, width = tensor.shape[-2:]
    left, right = round(box[0] * width), round(box[2] * width)
    top, bottom = round(box[1] * height), round(box[3] * height)
    pasted = tensor.clone()
    pasted[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return pasted


def _blend(tensor: Tensor, other: Tensor, own: float) -> Tensor:
    if tensor.dtype == torch.uint8:
        tensor, other = tensor.float() / 255, other.float() / 255
    return own * tensor + (1 - own) * other
