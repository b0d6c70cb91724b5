"""A head from elsewhere, in one file: the class whose mean is nearest. A missing view has no say."""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from featurecache import config
from featurecache.heads.base import Fold, Head


class CentroidSettings(config.Settings):
    sharpness: Annotated[float, Field(gt=0)] = 1.0


class CentroidHead(Head):
    name = "centroid"
    Settings = CentroidSettings
    file = "head.npy"

    def _fit(self, train: Fold, valid: Fold | None) -> None:
        sums, counts = np.zeros((2, len(self.classes_), self.n_features))
        for where, x in train.chunks():
            for k in range(len(self.classes_)):
                rows = x[train.target.values[where] == k]
                sums[k] += np.nansum(rows, axis=0, dtype=np.float64)
                counts[k] += (~np.isnan(rows)).sum(axis=0)
        self.means = sums / np.maximum(counts, 1)
        self._report(train_loss=self._loss(train), valid_loss=None if valid is None else self._loss(valid))

    def _loss(self, fold: Fold) -> float:
        total = 0.0
        for where, x in fold.chunks():
            p = self._scores(x)[np.arange(len(x)), fold.target.values[where]]
            total -= float(np.log(np.maximum(p, 1e-15)).sum())
        return total / len(fold)

    def _scores(self, x: np.ndarray) -> np.ndarray:
        distance = np.nanmean((x[:, None, :] - self.means) ** 2, axis=2)
        p = np.exp(-self.settings.sharpness * (distance - distance.min(axis=1, keepdims=True)))
        return p / p.sum(axis=1, keepdims=True)

    def _write(self, path: Path) -> None:
        np.save(path, self.means, allow_pickle=False)

    def _read(self, path: Path) -> None:
        self.means = np.load(path, allow_pickle=False)
