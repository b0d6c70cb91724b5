"""Calibration: how often what was given a probability came true."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.evaluation.metrics import BINS, bin_of, calibration_error, checked_scores


@dataclass(frozen=True)
class Reliability:
    """A reliability curve; arrays hold one value per bin that is not empty.

    Attributes:
        confidence: mean probability in the bin.
        frequency: share that came true.
        count: rows in the bin.
        ece: expected calibration error over all rows.
    """

    confidence: NDArray[np.float64]
    frequency: NDArray[np.float64]
    count: NDArray[np.int64]
    ece: float


def reliability(target: Target, scores: NDArray[np.float64], *, bins: int = BINS) -> dict[str, Reliability]:
    """Reliability curves over rows with a known target.

    Binary: the positive class's probability. Several classes: the highest probability, true where that class was right.
    Multilabel: each label on its own.

    Args:
        target: aligned with `scores`.
        scores: probabilities (n, n_classes) or (n, n_labels).
        bins: equal-width bins of [0, 1].

    Returns:
        target or label name -> curve; labels that were not trained or have no known row are left out, and so is a
        regression, which has none.
    """
    scores = checked_scores(target, scores)
    values = target.values
    pairs: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    if target.task in ("binary", "multiclass"):
        known = values >= 0
        y, p = values[known], scores[known]
        binary = target.task == "binary"
        confidence = p[:, 1] if binary else p.max(axis=1)
        pairs[target.names[0]] = (confidence, (y == 1 if binary else p.argmax(axis=1) == y).astype(np.float64))
    elif target.task == "multilabel":
        for i, name in enumerate(target.names):
            known = ~np.isnan(values[:, i])
            pairs[name] = (scores[known, i], values[known, i].astype(np.float64))
    return {
        name: _curve(confidence, outcome, bins)
        for name, (confidence, outcome) in pairs.items()
        if len(confidence) and not np.isnan(confidence).any()
    }


def _curve(confidence: NDArray[np.float64], outcome: NDArray[np.float64], bins: int) -> Reliability:
    where = bin_of(confidence, bins)
    count = np.bincount(where, minlength=bins)
    there = count > 0
    mean, share = (np.bincount(where, weights=w, minlength=bins)[there] / count[there] for w in (confidence, outcome))
    return Reliability(mean, share, count[there], calibration_error(confidence, outcome, bins=bins))
