"""The probability from which on a case counts as positive: chosen on validation, stored in the run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.evaluation.metrics import checked_scores


def choose_threshold(target: Target, scores: NDArray[np.float64], *, chosen_on: str = "valid") -> dict[str, Any]:
    """Youden's J: the threshold with the highest sensitivity + specificity - 1.

    Args:
        target: of the rows to choose on, aligned with `scores`.
        scores: probabilities (n, 2) or (n, n_labels).
        chosen_on: name of the split, as recorded.

    Returns:
        `value`: a float, or a float per label, as `compute_metrics` takes it; None where a class is chosen as the most
        probable one, or the target is a number. `rule`: `youden`, `default` (0.5: only one side known), `argmax` or
        `none`; with several labels `youden`, those with one side only having 0.5. `chosen_on`.
    """
    scores = checked_scores(target, scores)
    if target.task in ("multiclass", "regression"):
        return {"value": None, "rule": "argmax" if target.task == "multiclass" else "none", "chosen_on": None}
    if target.task == "binary":
        known = target.values >= 0
        value = youden(target.values[known], scores[known, 1])
        return {
            "value": 0.5 if value is None else value,
            "rule": "default" if value is None else "youden",
            "chosen_on": chosen_on,
        }
    values = {}
    for i, name in enumerate(target.names):
        known = ~np.isnan(target.values[:, i])
        value = youden(target.values[known, i], scores[known, i])
        values[name] = 0.5 if value is None else value
    return {"value": values, "rule": "youden", "chosen_on": chosen_on}


def youden(y: NDArray[Any], p: NDArray[np.float64]) -> float | None:
    """The threshold on `p` (n,) that separates 0 from 1 in `y` (n,) best; None where it can't be told.

    It lies halfway between two neighbouring scores; of equally good ones the nearest to 0.5 is taken.
    """
    positives = int((y == 1).sum())
    if positives in (0, len(y)) or np.isnan(p).any():
        return None
    order = np.argsort(-p, kind="stable")
    ranked, truth = p[order], y[order] == 1
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], False))  # a cut lies between two different scores
    if not len(ends):
        return None
    hits = np.cumsum(truth)[ends]
    j = hits / positives - (ends + 1 - hits) / (len(y) - positives)
    if j.max() <= 0:
        return None
    cuts = (ranked[ends] + ranked[ends + 1]) / 2
    best = cuts[np.isclose(j, j.max(), rtol=0, atol=1e-12)]
    return float(best[np.abs(best - 0.5).argmin()])
