"""Which metric counts, which way is better, and what a paired difference shows, in words."""

from __future__ import annotations

from featurecache.evaluation.metrics import check_metric

# Those by which models are ranked unless another is named.
FIRST = {"binary": "roc_auc", "multiclass": "accuracy", "multilabel": "roc_auc", "regression": "r2", "dense": "iou"}
LOW_IS_GOOD = frozenset({"log_loss", "brier", "ece", "rmse", "mae"})


def ranking_metric(task: str, metric: str | None) -> str:
    """The metric by which models of a task are ranked.

    Raises:
        InputError: the task has no such metric.
    """
    if metric is None:
        return FIRST[task]
    check_metric(task, metric)
    return metric


def goodness(metric: str, value: float) -> float:
    """The value with its sign turned where low is good, so that more is better."""
    return -value if metric in LOW_IS_GOOD else value


def verdict(metric: str, low: float, high: float) -> str:
    """`better`, `worse`, or `no gain shown` where the 95 % interval of a difference holds 0."""
    low, high = sorted((goodness(metric, low), goodness(metric, high)))
    return "better" if low > 0 else "worse" if high < 0 else "no gain shown"
