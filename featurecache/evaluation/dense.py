"""IoU and Dice of dense predictions, from pixel counts per sample and class: weighted sums, so a bootstrap is cheap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.dense import foreground
from featurecache.data.targets import Target

Array = NDArray[np.float64]
NAMES = ("iou", "dice", "pixel_accuracy", "sample_iou", "sample_dice")


def overlaps(true: Array, scores: Array) -> dict[str, Array]:
    """IoU and Dice of each sample and class (n, classes); NaN where a class is neither there nor said.

    Args:
        true: (n, classes) pixels of each class.
        scores: (n, classes, 2) pixels that were said to be of it, and of these the right ones.
    """
    said, right = scores[..., 0], scores[..., 1]
    return {"iou": _ratio(right, true + said - right), "dice": _ratio(2 * right, true + said)}


def dense_part(target: Target, scores: Array) -> Callable[[Array], dict[str, Array]]:
    """Weights (n_sets, n_rows) -> metric -> (n_sets,), NaN where undefined.

    `iou` and `dice` of a class are those of all pixels of all samples together; means go over the classes but the
    background. `sample_iou` and `sample_dice` are taken per sample first, so that small objects count as much as large.

    Args:
        target: `values` (n, classes) pixels of each class, all known.
        scores: as in `overlaps`.
    """
    kept = foreground(target.classes)
    true = target.values.astype(np.float64)
    single = {name: nan_mean(values[:, kept]) for name, values in overlaps(true, scores).items()}

    def part(weights: Array) -> dict[str, Array]:
        pooled = overlaps(weights @ true, np.stack([weights @ scores[..., i] for i in range(2)], axis=2))
        found = {name: nan_mean(values[:, kept]) for name, values in pooled.items()}
        found["pixel_accuracy"] = _ratio(weights @ scores[..., 1].sum(axis=1), weights @ true.sum(axis=1))
        for name, values in single.items():
            there = ~np.isnan(values)
            found[f"sample_{name}"] = _ratio(weights[:, there] @ values[there], weights[:, there].sum(axis=1))
        return found

    return part


def dense_classes(target: Target, scores: Array) -> Callable[[Array], dict[str, Array]]:
    """Weights (n_sets, n_rows) -> figure -> (n_classes, n_sets): pixels of each class, IoU, Dice, recall, precision."""
    true = target.values.astype(np.float64)

    def part(weights: Array) -> dict[str, Array]:
        n, said, right = true.T @ weights.T, scores[..., 0].T @ weights.T, scores[..., 1].T @ weights.T
        both = overlaps(n, np.stack([said, right], axis=2))
        share = _ratio(n, np.broadcast_to(n.sum(axis=0), n.shape))
        counts = {"n": n, "predicted": said, "right": right}
        return {**counts, "prevalence": share, **both, "sensitivity": _ratio(right, n), "ppv": _ratio(right, said)}

    return part


def dense_metrics(target: Target, scores: Array) -> dict[str, Any]:
    """The metrics of the samples with a known mask, and `n` of these; None where undefined."""
    known = np.asarray(target.known)
    once = dense_part(target.subset(known), scores[known])(np.ones((1, int(known.sum()))))
    values = {name: float(found[0]) for name, found in once.items()}
    found = {name: value if np.isfinite(value) else None for name, value in values.items()}
    return {"n": int(known.sum()), "events": None, **{name: found[name] for name in NAMES}}


def nan_mean(values: Array) -> Array:
    """The mean over the last axis of what is defined; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows without a defined value
        return np.asarray(np.nanmean(values, axis=-1))


def _ratio(top: Array, bottom: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(bottom > 0, top / bottom, np.nan))
