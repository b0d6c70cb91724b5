"""The FC head: a small network sized like fastai's `create_head`, for cached features and for joint training."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache import config
from featurecache.errors import RunError
from featurecache.heads.base import Fold
from featurecache.heads.epochs import EpochHead, Sums, batch_bounds
from featurecache.heads.fcmodule import FCModule, FCSettings, PresentBatchNorm, build_fc, hide_views, mix_rows
from featurecache.heads.losses import HeadLoss, scores_from_outputs
from featurecache.heads.rows import open_rows
from featurecache.heads.space import Choice, Space, Span

__all__ = ["FCHead", "FCModule", "FCSettings", "PresentBatchNorm", "build_fc", "hide_views"]


class FCHead(EpochHead[FCModule]):
    """See the module; `.module` is the network, an `FCModule`."""

    name: ClassVar[str] = "fc"
    Settings: ClassVar[type[config.Settings]] = FCSettings
    search_space: ClassVar[Space] = {
        "hidden": Choice(((), (128,), (256,), (512,), (512, 256))),
        "dropout": Span(0.0, 0.7),
        "lr": Span(1e-4, 3e-2, log=True),
        "weight_decay": Span(1e-4, 1.0, log=True),
    }
    settings: FCSettings

    def _train(self, train: Fold, valid: Fold | None, device: torch.device) -> None:
        settings = self.settings
        rows = open_rows(train, device, self.memory)
        left = None if self.memory is None else self.memory - rows.nbytes
        checks = open_rows(valid, device, left).in_order if valid is not None else None
        indicators = settings.view_dropout > 0 or rows.missing
        self.module = build_fc(self.blocks_, train.target, settings, indicators=indicators).to(device)
        loss = HeadLoss(
            train.target,
            class_weight=settings.class_weight,
            pos_weight=settings.pos_weight,
            label_smoothing=settings.label_smoothing,
        ).to(device)
        generator = torch.Generator().manual_seed(self.seed)
        step = partial(self._step, loss, generator, np.random.default_rng(self.seed))
        bounds = batch_bounds(len(train), _batch_size(settings, len(train)))
        self._epochs(settings, loss, step, rows, bounds, generator, checks)

    def _step(self, loss: HeadLoss, generator: torch.Generator, rng: np.random.Generator, x: Tensor, y: Tensor) -> Sums:
        """Losses of a batch, whose views may be hidden and whose rows may be mixed."""
        module, settings = self.module, self.settings
        if settings.view_dropout > 0:
            x = hide_views(x, module, settings.view_dropout, generator)
        if not settings.mixup:
            return loss.sums(module(x), y)
        x, partner, own = mix_rows(x, settings.mixup, rng, generator)
        outputs = module(x)
        both = zip(loss.sums(outputs, y), loss.sums(outputs, y[partner]), strict=True)
        total, weight = (own * mine + (1 - own) * other for mine, other in both)
        return total, weight

    def _facts(self) -> dict[str, Any]:
        return {"indicators": self.module.indicators}

    def _scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        module = self.module.eval()
        with torch.inference_mode():
            outputs = module(torch.from_numpy(np.ascontiguousarray(x)).to(module.out_mean.device))
        found = scores_from_outputs(self.task_, outputs)
        return found if self.task_ in ("binary", "multiclass") else found[:, self.active]

    def _read(self, path: Path) -> None:
        indicators = self.fitted_.get("indicators")
        if not isinstance(indicators, bool):
            raise RunError(
                f"{path.parent / 'head.json'}: fitted: 'indicators' must be true or false (found {indicators!r})"
            )
        self._load(path, lambda: FCModule(self.blocks_, len(self.outputs), self.settings, indicators=indicators))


def _batch_size(settings: FCSettings, n: int) -> int:
    """The batch size of the settings, or the automatic one."""
    if settings.batch_size != "auto":
        return settings.batch_size
    return int(min(512, max(32, 2 ** round(math.log2(max(n / 50, 1))))))
