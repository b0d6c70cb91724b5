"""The metrics once more, for rows with weights, many sets of weights at a time: what a bootstrap needs.

With every weight 1 they equal `metrics.compute_metrics`; a test holds them to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featurecache.data.targets import Target
from featurecache.evaluation.dense import dense_classes, dense_part
from featurecache.evaluation.metrics import AT_SPECIFICITY, BINS, SPECIFICITY, bin_of, checked_scores
from featurecache.rundir.cut import Threshold, threshold_of

Array = NDArray[np.float64]
Table = dict[str, Array]
Part = Callable[[Array], Table]
"""Weights (n_sets, n_known_rows) -> metric -> (n_sets,), NaN where undefined."""


def weighted_parts(
    target: Target, scores: NDArray[np.float64], threshold: Threshold, wanted: Iterable[str]
) -> list[Part]:
    """One function for the target, or one per label or regression target; weights are of rows with a known target."""
    wanted = frozenset(wanted)
    known = np.asarray(target.known)
    values, scores = target.values[known], checked_scores(target, scores)[known]
    if target.task == "binary":
        return [_classes(values, scores, threshold_of(threshold, target.names[0], known), wanted)]
    if target.task == "dense":
        return [dense_part(target.subset(known), scores)]
    if target.task == "multiclass":
        return [_classes(values, scores, None, wanted)]
    parts = []
    for i, name in enumerate(target.names):
        rows = np.flatnonzero(~np.isnan(values[:, i]))
        y, p = values[rows, i], scores[rows, i]
        if target.task == "regression":
            part = _regression(y.astype(np.float64), p)
        else:
            both = np.stack([1 - p, p], axis=1)
            part = _classes(
                y.astype(np.int64), both, threshold_of(threshold, name, np.flatnonzero(known)[rows]), wanted
            )
        parts.append(_on_rows(part, rows, len(values)))
    return parts


COUNTS = ("n", "predicted", "right")
CLASS_FIGURES = ("sensitivity", "specificity", "ppv", "npv", "f1", "roc_auc", "average_precision", "iou", "dice")


def per_class(target: Target, scores: NDArray[np.float64], threshold: Threshold) -> Part:
    """Weights (n_sets, n_known_rows) -> figure -> (n_classes, n_sets): each class against the rest."""
    known = np.asarray(target.known)
    y, p = target.values[known], checked_scores(target, scores)[known]
    if target.task == "dense":
        return dense_classes(target.subset(known), p)
    classes = len(target.classes)
    broken = bool(np.isnan(p).any()) or not len(y)
    limit = threshold_of(threshold, target.names[0], known)
    said = (p[:, 1] >= limit).astype(np.int64) if target.task == "binary" else np.nan_to_num(p).argmax(axis=1)
    cells = _one_hot(y * classes + said, classes**2, np.ones(len(y)))
    ranked = [] if broken else [_ranked(y == c, p[:, c]) for c in range(classes)]

    def part(weights: Array) -> Table:
        table = (cells @ weights.T).reshape(classes, classes, len(weights))
        total, true, called = table.sum(axis=(0, 1)), table.sum(axis=1), table.sum(axis=0)
        hits = np.stack([table[c, c] for c in range(classes)])
        clear = total - true - called + hits
        found = {
            "n": true,
            "predicted": called,
            "right": hits,
            "prevalence": ratio(true, np.broadcast_to(total, true.shape)),
            "sensitivity": ratio(hits, true),
            "specificity": ratio(clear, total - true),
            "ppv": ratio(hits, called),
            "npv": ratio(clear, total - called),
            "f1": ratio(2 * hits, true + called),
        }
        curves = [curve(weights) for curve in ranked]
        nothing = np.full(true.shape, np.nan)
        found["roc_auc"] = np.stack([auc for auc, _, _ in curves]) if curves else nothing
        found["average_precision"] = np.stack([precision for _, precision, _ in curves]) if curves else nothing
        return found

    return part


def mean_defined(parts: list[Array]) -> Array:
    """Mean of arrays of one shape over those that are not NaN, by element."""
    stacked = np.stack(parts)
    defined = ~np.isnan(stacked)
    return ratio(np.where(defined, stacked, 0.0).sum(axis=0), defined.sum(axis=0))


def ratio(numerator: Array, denominator: NDArray[np.generic]) -> Array:
    """The quotient, NaN where the denominator is not positive."""
    positive = np.asarray(denominator) > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1), np.nan)


def _on_rows(part: Part, rows: NDArray[np.int64], n: int) -> Part:
    """The same function for weights of all rows."""
    return part if len(rows) == n else lambda weights: part(weights[:, rows])


def _classes(y: NDArray[np.int64], p: Array, threshold: float | Array | None, wanted: frozenset[str]) -> Part:
    """Metrics of class probabilities `p` (n, n_classes); with a threshold the second of two classes is the positive."""
    if np.isnan(p).any() or not len(y):
        return lambda weights: {name: np.full(len(weights), np.nan) for name in wanted}
    n_classes = p.shape[1]
    binary = threshold is not None
    predicted = p.argmax(axis=1) if threshold is None else (p[:, 1] >= threshold).astype(np.int64)
    eps = np.finfo(np.float64).eps
    log_losses = -np.log(np.clip(p[np.arange(len(y)), y], eps, 1 - eps))
    squares = (p[:, 1] - y) ** 2 if binary else ((p - np.eye(n_classes)[y]) ** 2).sum(axis=1)
    confidence = p[:, 1] if binary else p.max(axis=1)
    gaps = _one_hot(bin_of(confidence), BINS, confidence - (y == 1 if binary else predicted == y))
    cells = _one_hot(y * n_classes + predicted, n_classes**2, np.ones(len(y)))
    ranked = [_ranked(y == c, p[:, c]) for c in ((1,) if binary else range(n_classes))] if wanted & _RANKED else []

    def part(weights: Array) -> Table:
        total = weights.sum(axis=1)
        found = _confusion((cells @ weights.T).reshape(n_classes, n_classes, len(weights)), binary=binary)
        found["log_loss"] = ratio(weights @ log_losses, total)
        found["brier"] = ratio(weights @ squares, total)
        found["ece"] = ratio(np.abs(gaps @ weights.T).sum(axis=0), total)
        if ranked:
            curves = [curve(weights) for curve in ranked]
            found["roc_auc"] = mean_defined([auc for auc, _, _ in curves])
            found["average_precision"] = mean_defined([precision for _, precision, _ in curves])
            if binary:
                found[AT_SPECIFICITY] = curves[0][2]
        return found

    return part


_RANKED = frozenset({"roc_auc", "average_precision", AT_SPECIFICITY})


def _confusion(cells: Array, *, binary: bool) -> Table:
    """Metrics of confusion matrices (true class, predicted class, n_sets)."""
    total = cells.sum(axis=(0, 1))
    hits = np.stack([cells[c, c] for c in range(len(cells))])
    true, predicted = cells.sum(axis=1), cells.sum(axis=0)
    single = (true > 0).sum(axis=0) < 2
    spread = np.sqrt(
        np.maximum(total**2 - (true**2).sum(axis=0), 0) * np.maximum(total**2 - (predicted**2).sum(axis=0), 0)
    )
    mcc = np.nan_to_num(ratio(hits.sum(axis=0) * total - (true * predicted).sum(axis=0), spread), nan=0.0)
    recall = ratio(hits, true)
    found = {
        "accuracy": ratio(hits.sum(axis=0), total),
        "balanced_accuracy": np.where(single, np.nan, mean_defined(list(recall))),
        "f1_macro": mean_defined(list(ratio(2 * hits, true + predicted))),
        "mcc": np.where(single, np.nan, mcc),
    }
    if not binary:
        return found
    return found | {
        "sensitivity": recall[1],
        "specificity": recall[0],
        "ppv": ratio(hits[1], predicted[1]),
        "npv": ratio(hits[0], predicted[0]),
        "f1": ratio(2 * hits[1], true[1] + predicted[1]),
    }


def _ranked(positive: NDArray[np.bool_], p: Array) -> Callable[[Array], tuple[Array, Array, Array]]:
    """Weights -> area under the ROC curve (trapezoids), average precision (steps), sensitivity at SPECIFICITY."""
    order = np.argsort(-p, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(p[order]) != 0, True))
    truth = positive[order]

    def curve(weights: Array) -> tuple[Array, Array, Array]:
        weights = weights[:, order]
        hits = np.cumsum(weights * truth, axis=1)
        alarms = np.cumsum(weights, axis=1)[:, ends]
        hits = hits[:, ends]
        alarms -= hits
        new_hits = np.diff(hits, axis=1, prepend=0)
        new_alarms = np.diff(alarms, axis=1, prepend=0)
        positives, negatives = hits[:, -1], alarms[:, -1]
        auc = ratio((new_alarms * (hits - new_hits / 2)).sum(axis=1), positives * negatives)
        precision = hits / np.maximum(hits + alarms, np.finfo(np.float64).tiny)
        allowed = alarms <= (1 - SPECIFICITY + 1e-9) * negatives[:, None]
        reached = ratio(np.where(allowed, hits, 0).max(axis=1), np.where(negatives > 0, positives, 0))
        area = np.where(negatives > 0, ratio((new_hits * precision).sum(axis=1), positives), np.nan)
        return auc, area, reached

    return curve


def _regression(y: Array, value: Array) -> Part:
    if np.isnan(value).any() or not len(y):
        return lambda weights: {name: np.full(len(weights), np.nan) for name in ("r2", "rmse", "mae")}
    error = value - y
    centred = y - y.mean()

    def part(weights: Array) -> Table:
        total = weights.sum(axis=1)
        residual = weights @ error**2
        spread = weights @ centred**2 - ratio((weights @ centred) ** 2, total)
        varied = np.where(spread > 1e-12 * (weights @ centred**2), spread, 0)  # else rounding of a constant target
        return {
            "r2": 1 - ratio(residual, varied),
            "rmse": np.sqrt(ratio(residual, total)),
            "mae": ratio(weights @ np.abs(error), total),
        }

    return part


def _one_hot(code: NDArray[np.int64], n_codes: int, values: Array) -> csr_array:
    """(n_codes, n) with a value per column."""
    return csr_array((np.asarray(values, dtype=np.float64), (code, np.arange(len(code)))), shape=(n_codes, len(code)))
