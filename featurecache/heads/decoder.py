"""The decoder head: a class for every pixel from cached maps of several depths, the skip connections of a U-Net."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache import config
from featurecache.data.dense import DenseTarget
from featurecache.errors import InputError, RunError
from featurecache.features.features import Features, chunk_rows, reading_order, views_of
from featurecache.heads.base import Fold
from featurecache.heads.decodermodule import DecoderModule, DecoderSettings, DenseLoss, Size
from featurecache.heads.epochs import EpochHead, Sums, batch_bounds
from featurecache.heads.rows import FeatureRows, Rows, StreamRows

OUTPUT_BYTES = 64 << 20  # of logits at a time

__all__ = ["DecoderHead", "DecoderModule", "DecoderSettings", "DenseLoss"]


class DecoderHead(EpochHead[DecoderModule]):
    """See the module; `.module` is the network, a `DecoderModule`. `scores` are the shares of the picture.

    Maps are read batch by batch, never held: a row may have megabytes.
    """

    name: ClassVar[str] = "decoder"
    input: ClassVar[Literal["vector", "maps"]] = "maps"
    tasks: ClassVar[tuple[str, ...]] = ("dense",)
    Settings: ClassVar[type[config.Settings]] = DecoderSettings
    summed: ClassVar[torch.dtype] = torch.float32  # as it always was: a seed gives the same figures again
    settings: DecoderSettings

    @property
    def outputs(self) -> tuple[str, ...]:
        """The classes."""
        return self.classes_

    @property
    def size(self) -> Size:
        """(height, width) of the masks."""
        return self.module.size

    def scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """The share of the picture that each class takes: mean probability over its pixels, (n, classes)."""
        self._check_rows(x)
        size = self.rows_at_once
        parts = [self._scores(x[start : start + size]) for start in range(0, len(x), size)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes_)))

    def masks(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The most probable class of every pixel, (n, height, width), of few enough rows (n, n_features)."""
        self._check_rows(x)
        return self._logits(x).argmax(dim=1).to(torch.uint8).cpu().numpy()

    def mask_rows(self, features: Features) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Rows and their masks, some at a time, in the order in which they are best read."""
        order = reading_order(features, np.arange(features.shape[0]))
        for start in range(0, len(order), self.rows_at_once):
            part = order[start : start + self.rows_at_once]
            yield part, self.masks(features[part])

    @property
    def rows_at_once(self) -> int:
        """Rows whose maps and logits are in memory at a time."""
        logits = 4 * len(self.classes_) * math.prod(self.size)
        return max(1, min(chunk_rows(self.n_features), OUTPUT_BYTES // logits))

    def _train(self, train: Fold, valid: Fold | None, device: torch.device) -> None:
        if len(views_of(self.blocks_)) != 1:
            raise InputError("head 'decoder': masks lie on one view; choose it with --views")
        settings, target = self.settings, train.target
        assert isinstance(target, DenseTarget)
        rows = _open(train, device)
        module = DecoderModule(self.blocks_, len(target.classes), settings, target.size)
        self.module = module.to(device)
        loss = DenseLoss(
            target, class_weight=settings.class_weight, dice=settings.dice, label_smoothing=settings.label_smoothing
        ).to(device)
        checks = partial(_open(valid, device).in_order, self.rows_at_once) if valid is not None else None
        generator = torch.Generator().manual_seed(self.seed)
        bounds = batch_bounds(len(train), _batch_size(settings, len(train)))

        def step(x: Tensor, y: Tensor) -> Sums:
            return loss.sums(module(x), y)

        self._epochs(settings, loss, step, rows, bounds, generator, checks)

    def _facts(self) -> dict[str, Any]:
        return {"size": list(self.size)}

    def _logits(self, x: NDArray[np.float32]) -> Tensor:
        module = self.module.eval()
        device = next(module.parameters()).device
        with torch.inference_mode():
            found: Tensor = module(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device))
        return found

    def _scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        return self._logits(x).double().softmax(dim=1).mean(dim=(2, 3)).cpu().numpy()

    def _read(self, path: Path) -> None:
        size = self.fitted_.get("size")
        if not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and 0 < n < 1 << 15 for n in size)
        ):
            raise RunError(f"{path.parent / 'head.json'}: fitted: 'size' must be two lengths (found {size!r})")

        made = (size[0], size[1])
        self._load(path, lambda: DecoderModule(self.blocks_, len(self.classes_), self.settings, made))


def _open(fold: Fold, device: torch.device) -> Rows:
    """Rows that are read as they are asked for: by random access where they are mapped, else by whole chunks."""
    streamed = getattr(fold.features, "buffer_rows", None) is not None
    return (StreamRows if streamed else FeatureRows)(fold, device)


def _batch_size(settings: DecoderSettings, n: int) -> int:
    return settings.batch_size if settings.batch_size != "auto" else min(16, max(4, n // 8))


def is_dense(kind: type[Any]) -> bool:
    """Whether a head predicts masks and nothing else."""
    return tuple(kind.tasks) == ("dense",)
