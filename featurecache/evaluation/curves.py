"""What figures are drawn from: ROC, precision-recall and net benefit with bands by bootstrap; reliability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.evaluation.bootstrap import group_weights, numbered
from featurecache.evaluation.metrics import BINS, bin_of, calibration_error
from featurecache.evaluation.weighted import Array, ratio

GRID = np.linspace(0, 1, 51)  # of the false positive rate, and of the recall
CUTS = np.arange(1, 100) / 100  # probabilities from which on one would act
DIGITS = 4


def curve_data(
    positive: NDArray[np.bool_], score: Array, groups: Sequence[Any] | NDArray[Any], *, n: int = 500, seed: int = 0
) -> dict[str, Any]:
    """What a figure of a yes-or-no question is drawn from, as plain lists rounded to four digits.

    Args:
        positive: (m,) which rows are; both kinds must be there.
        score: (m,) probability of being so.
        groups: (m,) what is drawn; see `bootstrap_intervals`.
        n: resamples; 0 for no bands.
        seed: of the resampling.

    Returns:
        `n`, `events`; `roc`: `fpr` and the band `low`, `high` of the sensitivity there; `pr`: `recall` and the band of
        the precision; `benefit`: `threshold`, the `model`'s net benefit with its band, and that of treating `all`
        (Vickers and Elkin 2006; treating none has 0): true positives less false ones weighted by the odds of the
        threshold, per sample.
    """
    curves = _Curves(positive, score)
    once = curves(np.ones((1, len(score))))
    bands: dict[str, list[Array]] = {name: [] for name in ("roc", "pr", "benefit")}
    codes = numbered(np.asarray(groups))
    for weights in group_weights(codes, n, seed):
        for name, values in curves(weights).items():
            if name in bands:
                bands[name].append(values)
    ends = {name: _ends(np.concatenate(values)) for name, values in bands.items() if values}
    return {
        "n": len(score),
        "events": int(positive.sum()),
        "roc": {"fpr": _plain(GRID), **ends.get("roc", {})},
        "pr": {"recall": _plain(GRID), **ends.get("pr", {})},
        "benefit": {
            "threshold": _plain(CUTS),
            "model": _plain(once["benefit"][0]),
            "all": _plain(once["all"][0]),
            **ends.get("benefit", {}),
        },
    }


def reliability_data(confidence: Array, right: NDArray[np.bool_]) -> dict[str, Any]:
    """What a reliability diagram is drawn from, over the bins of the calibration error.

    Args:
        confidence: (m,) probabilities, one or more.
        right: (m,) whether what they were given for came true.

    Returns:
        Per bin `count`, and the mean `probability` and the `frequency` there, None where it is empty; `gap`, the
        calibration error.
    """
    which = bin_of(confidence)
    count = np.bincount(which, minlength=BINS)
    sums = {"probability": confidence, "frequency": right.astype(float)}
    means = {name: ratio(np.asarray(np.bincount(which, of, minlength=BINS), float), count) for name, of in sums.items()}
    lists = {name: _plain(values) for name, values in means.items()}
    return {"count": count.tolist(), **lists, "gap": calibration_error(confidence, right)}


class _Curves:
    """Weights (n_sets, m) -> curves (n_sets, points), NaN where a set lacks one of both kinds."""

    def __init__(self, positive: NDArray[np.bool_], score: Array) -> None:
        self.order = np.argsort(-score, kind="stable")
        ranked = score[self.order]
        self.truth = positive[self.order]
        self.ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
        self.above = np.searchsorted(-ranked, -CUTS, side="right")  # rows with at least that probability

    def __call__(self, weights: Array) -> dict[str, Array]:
        weights = weights[:, self.order]
        start = np.zeros((len(weights), 1))
        hits = np.hstack([start, np.cumsum(weights * self.truth, axis=1)])
        alarms = np.hstack([start, np.cumsum(weights * ~self.truth, axis=1)])
        events, others = hits[:, -1:], alarms[:, -1:]
        total = events + others
        odds = CUTS / (1 - CUTS)
        ends = np.append(0, self.ends + 1)
        tpr, fpr = ratio(hits[:, ends], events), ratio(alarms[:, ends], others)
        precision = ratio(hits, hits + alarms)[:, ends[1:]]
        return {
            "roc": np.stack([np.interp(GRID, x, y) for x, y in zip(fpr, tpr, strict=True)]),
            "pr": np.stack([_at_recall(x[1:], y) for x, y in zip(tpr, precision, strict=True)]),
            "benefit": ratio(hits[:, self.above] - alarms[:, self.above] * odds, total),
            "all": ratio(events - others * odds, total),
        }


def _at_recall(recall: Array, precision: Array) -> Array:
    """The precision at the first cut that reaches each recall of the grid."""
    if np.isnan(recall).any():
        return np.full(len(GRID), np.nan)
    return precision[np.minimum(np.searchsorted(recall, GRID - 1e-12), len(recall) - 1)]


def _ends(values: Array) -> dict[str, list[float | None]]:
    """The 95 % band of (n_sets, points), over the sets in which a point is defined."""
    kept = values[~np.isnan(values).any(axis=1)]
    if len(kept) < 0.5 * len(values) or not len(kept):
        return {}
    low, high = np.percentile(kept, [2.5, 97.5], axis=0)
    return {"low": _plain(low), "high": _plain(high)}


def _plain(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), DIGITS) for value in values]
