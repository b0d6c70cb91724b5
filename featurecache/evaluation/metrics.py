"""Metrics per task as plain numbers; what a single class or too few rows leave undefined is None."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from featurecache.data.targets import Target
from featurecache.errors import InputError, did_you_mean
from featurecache.evaluation import dense
from featurecache.rundir.cut import Threshold, threshold_of

BINS = 15  # of the calibration error, as in Guo et al. (2017)
SPECIFICITY = 0.9  # at which the sensitivity is read off the ROC curve
AT_SPECIFICITY = "sensitivity_at_90_specificity"
CLASSIFICATION = (
    "accuracy",
    "balanced_accuracy",
    "roc_auc",
    "average_precision",
    "log_loss",
    "brier",
    "f1_macro",
    "mcc",
    "ece",
)
BINARY = (*CLASSIFICATION, "sensitivity", "specificity", "ppv", "npv", "f1", AT_SPECIFICITY)
REGRESSION = ("r2", "rmse", "mae")


def metric_names(task: str) -> tuple[str, ...]:
    """The metrics of a task, those of a single label for `multilabel`."""
    return {"multiclass": CLASSIFICATION, "regression": REGRESSION, "dense": dense.NAMES}.get(task, BINARY)


def check_metric(task: str, metric: str) -> None:
    """Refuse what is no metric of the task.

    Raises:
        InputError: it is unknown; names the nearest.
    """
    known = metric_names(task)
    if metric not in known:
        raise InputError(
            f"unknown metric {metric!r} of task {task}.{did_you_mean(metric, known)} Known: {', '.join(known)}."
        )


def compute_metrics(target: Target, scores: NDArray[Any], *, threshold: Threshold = None) -> dict[str, Any]:
    """All metrics of a task over the rows whose target is known.

    - Several classes: `roc_auc` and `average_precision` are means over the classes of one against the rest, over those
      that have both sides; `brier` sums over classes; `ece` bins the highest probability.
    - Binary: the second class is the positive one; `ece` bins its probability; `sensitivity_at_90_specificity` is read
      off the ROC curve, whatever the threshold.
    - Dense: see `featurecache.evaluation.dense`; `scores` are pixel counts (n, n_classes, 2).
    - Multilabel and several regression targets: means over those where a metric is defined, and each under `labels`.

    Args:
        target: aligned with `scores`.
        scores: probabilities (n, n_classes) or (n, n_labels), regression values (n, n_targets); NaN where a label was
            not trained.
        threshold: from which probability on a binary target or label counts as positive: one, or one per label, for all
            rows or (n,) for each; None is 0.5. Several classes take the most probable.

    Returns:
        the metrics as floats or None; `n`, rows with a known target; `events`, positives (None where there are no two
        sides); `class_counts` for several classes; `labels` as said.

    Raises:
        InputError: the shape of `scores` does not fit the target.
    """
    scores = checked_scores(target, scores)
    names, values = target.names, target.values
    if target.task == "dense":
        return dense.dense_metrics(target, scores)
    if target.task == "binary":
        known = values >= 0
        return _binary(values[known], scores[known, 1], threshold_of(threshold, names[0], known))
    if target.task == "multiclass":
        return _multiclass(target, scores)
    labels = {}
    for i, name in enumerate(names):
        known = ~np.isnan(values[:, i])
        y, p = values[known, i], scores[known, i]
        labels[name] = (
            _regression(y, p) if target.task == "regression" else _binary(y, p, threshold_of(threshold, name, known))
        )
    if target.task == "regression" and len(names) == 1:
        return labels[names[0]]
    found: dict[str, Any] = {
        "n": int((~np.isnan(values)).any(axis=1).sum()),
        "events": sum(label["events"] for label in labels.values()) if target.task == "multilabel" else None,
    }
    for metric in metric_names(target.task):
        defined = [label[metric] for label in labels.values() if label[metric] is not None]
        found[metric] = float(np.mean(defined)) if defined else None
    return found | {"labels": labels}


def checked_scores(target: Target, scores: NDArray[Any]) -> NDArray[np.float64]:
    """Scores as float64 in the shape that the task needs.

    Raises:
        InputError: they have another shape.
    """
    scores = np.asarray(scores, dtype=np.float64)
    columns = len(target.classes) if target.task in ("binary", "multiclass") else len(target.names)
    shape = (len(target.values), len(target.classes), 2) if target.task == "dense" else (len(target.values), columns)
    if scores.shape != shape:
        raise InputError(f"scores of shape {scores.shape} for a {target.task} target, expected {shape}")
    return scores


def bin_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of BINS equal parts of [0, 1] a probability lies in; 1 belongs to the last."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def calibration_error(confidence: NDArray[np.float64], outcome: NDArray[Any]) -> float:
    """Expected calibration error: mean over equal-width bins, by size, of |mean confidence - share of outcomes|."""
    gap = np.bincount(bin_of(confidence), weights=confidence - outcome, minlength=BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _binary(y: NDArray[Any], p: NDArray[np.float64], threshold: float | NDArray[np.float64]) -> dict[str, Any]:
    """Metrics of the positive class's probability `p` (n,) against 0/1 (n,); None without rows or probabilities."""
    y = y.astype(np.int64)
    found: dict[str, Any] = {"n": len(y), "events": int(y.sum())}
    if not len(y) or np.isnan(p).any():
        return found | dict.fromkeys(BINARY)
    both = np.stack([1 - p, p], axis=1)
    predicted = (p >= threshold).astype(np.int64)
    positive, said = y == 1, predicted == 1
    defined = positive.any() and not positive.all()
    return found | {
        "accuracy": float(sk.accuracy_score(y, predicted)),
        "balanced_accuracy": _balanced_accuracy(y, predicted),
        "roc_auc": float(sk.roc_auc_score(y, p)) if defined else None,
        "average_precision": float(sk.average_precision_score(y, p)) if defined else None,
        "log_loss": _log_loss(y, both),
        "brier": float(np.mean((p - y) ** 2)),
        "f1_macro": float(sk.f1_score(y, predicted, average="macro", zero_division=0)),
        "mcc": float(sk.matthews_corrcoef(y, predicted)) if defined else None,
        "ece": calibration_error(p, y),
        "sensitivity": float(predicted[positive].mean()) if positive.any() else None,
        "specificity": float(1 - predicted[~positive].mean()) if not positive.all() else None,
        "ppv": float(positive[said].mean()) if said.any() else None,
        "npv": float(1 - positive[~said].mean()) if not said.all() else None,
        "f1": float(sk.f1_score(y, predicted, zero_division=0)) if (positive | said).any() else None,
        AT_SPECIFICITY: _sensitivity_at(positive, p) if defined else None,
    }


def _sensitivity_at(positive: NDArray[np.bool_], p: NDArray[np.float64]) -> float:
    """The highest sensitivity that any threshold reaches at a specificity of SPECIFICITY or more."""
    alarms, hits, _ = sk.roc_curve(positive, p, drop_intermediate=False)
    return float(hits[alarms <= 1 - SPECIFICITY + 1e-9].max())


def _multiclass(target: Target, scores: NDArray[np.float64]) -> dict[str, Any]:
    known = target.values >= 0
    y, p = target.values[known], scores[known]
    counts = np.bincount(y, minlength=len(target.classes))
    found: dict[str, Any] = {
        "n": len(y),
        "events": None,
        "class_counts": {name: int(count) for name, count in zip(target.classes, counts, strict=True)},
    }
    if not len(y) or np.isnan(p).any():
        return found | dict.fromkeys(CLASSIFICATION)
    predicted = p.argmax(axis=1)
    sides = [(y == c, p[:, c]) for c in range(len(counts)) if 0 < counts[c] < len(y)]
    return found | {
        "accuracy": float(sk.accuracy_score(y, predicted)),
        "balanced_accuracy": _balanced_accuracy(y, predicted),
        "roc_auc": float(np.mean([sk.roc_auc_score(*side) for side in sides])) if sides else None,
        "average_precision": float(np.mean([sk.average_precision_score(*side) for side in sides])) if sides else None,
        "log_loss": _log_loss(y, p),
        "brier": float(np.mean(((p - np.eye(len(counts))[y]) ** 2).sum(axis=1))),
        "f1_macro": float(sk.f1_score(y, predicted, average="macro", zero_division=0)),
        "mcc": float(sk.matthews_corrcoef(y, predicted)) if sides else None,
        "ece": calibration_error(p.max(axis=1), predicted == y),
    }


def _regression(y: NDArray[Any], value: NDArray[np.float64]) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(y), "events": None}
    if not len(y) or np.isnan(value).any():
        return found | dict.fromkeys(REGRESSION)
    y = y.astype(np.float64)
    return found | {
        "r2": float(sk.r2_score(y, value)) if len(y) > 1 and np.ptp(y) > 0 else None,
        "rmse": float(np.sqrt(sk.mean_squared_error(y, value))),
        "mae": float(sk.mean_absolute_error(y, value)),
    }


def _balanced_accuracy(y: NDArray[np.int64], predicted: NDArray[np.int64]) -> float | None:
    """Mean recall over the classes that are there, None for one; scikit-learn warns where others are predicted."""
    classes = np.unique(y)
    return float(np.mean([np.mean(predicted[y == c] == c) for c in classes])) if len(classes) > 1 else None


def _log_loss(y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Mean of -log p of the true class, clipped as in scikit-learn, which warns where rounding leaves sums beside 1."""
    eps = np.finfo(np.float64).eps
    return float(-np.log(np.clip(p[np.arange(len(y)), y], eps, 1 - eps)).mean())
