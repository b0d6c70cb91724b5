"""predictions.csv of dense runs: per sample the mask that was written and the pixels of each class, right or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.rundir.predictions import TEXT, Predictions, Threshold, numbers, read_text, refusing, text_columns
from featurecache.rundir.predictions import read_predictions as read_plain

__all__ = ["DensePredictions", "Predictions", "read_predictions"]

COUNTS = ("pixels", "said", "right")


@dataclass(frozen=True)
class DensePredictions(Predictions):
    """What a model said about the pixels of n samples.

    Attributes:
        true: (n, classes) float64: pixels of each class, NaN where the sample has no mask.
        scores: (n, classes, 2) float64: pixels that were said to be of the class, and of these the right ones; pixels
            without a known class are in neither.
        masks: (n,) text: the file of the predicted mask, relative to predictions.csv; '' where none was written.
    """

    masks: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, np.str_))

    def known(self) -> NDArray[np.bool_]:
        """(n,) whether the sample has a mask."""
        return np.asarray(~np.isnan(self.true).all(axis=1))

    def questions(self, *, every: bool = False) -> list[tuple[str, int, NDArray[np.int64], NDArray[np.bool_]]]:
        """None: there is a decision per pixel, and no score per sample."""
        return []

    def confidences(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """None, for the same reason."""
        return np.empty(0), np.empty(0, bool)

    def decisions(self, threshold: Threshold = None) -> NDArray[Any]:
        """(n,) int64, the class that most pixels were said to be of."""
        return np.asarray(self.scores[..., 0].argmax(axis=1), dtype=np.int64)

    def overlap(self, name: str) -> NDArray[np.float64]:
        """`iou` or `dice` of each sample and class (n, classes); NaN where a class is neither there nor said."""
        said, right = self.scores[..., 0], self.scores[..., 1]
        top, bottom = (right, self.true + said - right) if name == "iou" else (2 * right, self.true + said)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(bottom > 0, top / bottom, np.nan)

    def table(self, threshold: Threshold = None) -> pl.DataFrame:
        """sample_id, group, split, views, mask, then per class pixels, said, right, iou and dice."""
        columns = self._text() | {"mask": pl.Series(self.masks.tolist(), dtype=pl.String)}
        counts = [self.true, self.scores[..., 0], self.scores[..., 1]]
        shares = {name: self.overlap(name) for name in ("iou", "dice")}
        for number, label in enumerate(self.classes):
            for name, values in zip(COUNTS, counts, strict=True):
                columns[f"{name}:{label}"] = pl.Series(values[:, number]).fill_nan(None).cast(pl.Int64)
            for name, share in shares.items():
                columns[f"{name}:{label}"] = pl.Series(share[:, number]).fill_nan(None)
        return pl.DataFrame(columns)


def read_predictions(directory: Path, record: Mapping[str, Any]) -> Predictions:
    """The arrays behind the predictions.csv of a directory, of any task; see `featurecache.rundir.predictions`.

    Raises:
        RunError: it is missing, lacks a column or holds what it can't hold.
    """
    if record.get("task") != "dense":
        return read_plain(directory, record)
    with refusing(directory) as path:
        table = read_text(path)
        names, classes = tuple(record["targets"]), tuple(record["classes"])
        true, said, right = (numbers(table, [f"{name}:{label}" for label in classes]) for name in COUNTS)
        ids, groups, splits, views, masks = text_columns(table, (*TEXT, "mask"))
    scores = np.stack([said, right], axis=2)
    return DensePredictions("dense", names, classes, true, scores, ids, groups, splits, views, masks=masks)
