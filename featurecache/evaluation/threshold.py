"""The probability from which on a case counts as positive: chosen on validation, stored in the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.evaluation.metrics import checked_scores


class At(NamedTuple):
    """A decision at a fixed sensitivity or specificity, as in `sensitivity=0.95`."""

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"

    @classmethod
    def parse(cls, text: str) -> At:
        """`sensitivity=0.95` -> At("sensitivity", 0.95).

        Raises:
            InputError: another name, or no number between 0 and 1.
        """
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in ("sensitivity", "specificity") or not equals or not 0 < value <= 1:
            raise InputError(f"--at {text}: give sensitivity=VALUE or specificity=VALUE, above 0 and up to 1")
        return cls(name, value)

    def check_task(self, task: str) -> None:
        """Refuse a task that has no such decision.

        Raises:
            InputError: several classes, or numbers.
        """
        if task in ("multiclass", "regression", "dense"):
            raise InputError(f"--at {self}: a {task} target has no threshold; it is for yes-or-no questions")


def choose_threshold(
    target: Target, scores: NDArray[np.float64], *, chosen_on: str = "valid", at: At | None = None
) -> dict[str, Any]:
    """Youden's J, the threshold with the highest sensitivity + specificity - 1; or one that reaches a wanted figure.

    Args:
        target: of the rows to choose on, aligned with `scores`.
        scores: probabilities (n, 2) or (n, n_labels).
        chosen_on: name of the split, as recorded.
        at: the highest threshold with at least this sensitivity, or the lowest with at least this specificity.

    Returns:
        `value`: a float, or a float per label, as `compute_metrics` takes it; None where a class is chosen as the most
        probable one, or the target is a number. `rule`: `youden`, `sensitivity=...`, `specificity=...`, `default` (0.5:
        only one side known), `argmax` or `none`; with several labels those with one side only have 0.5. `chosen_on`.

    Raises:
        InputError: `at` for a task that has no such decision.
    """
    scores = checked_scores(target, scores)
    rule = "youden" if at is None else str(at)
    find: Callable[[NDArray[Any], NDArray[np.float64]], float | None] = youden if at is None else partial(reaching, at)
    if at is not None:
        at.check_task(target.task)
    if target.task in ("multiclass", "regression", "dense"):
        return {"value": None, "rule": "none" if target.task == "regression" else "argmax", "chosen_on": None}
    if target.task == "binary":
        known = target.values >= 0
        value = find(target.values[known], scores[known, 1])
        return {
            "value": 0.5 if value is None else value,
            "rule": "default" if value is None else rule,
            "chosen_on": chosen_on,
        }
    values = {}
    for i, name in enumerate(target.names):
        known = ~np.isnan(target.values[:, i])
        value = find(target.values[known, i], scores[known, i])
        values[name] = 0.5 if value is None else value
    return {"value": values, "rule": rule, "chosen_on": chosen_on}


def reaching(at: At, y: NDArray[Any], p: NDArray[np.float64]) -> float | None:
    """The threshold on `p` (n,) that just reaches a sensitivity or specificity on `y` (n,) of 0 and 1.

    It lies halfway to the neighbouring score, or at that score where there is none. None without a positive (for a
    sensitivity) or a negative one (for a specificity).
    """
    side = p[y == 1] if at.name == "sensitivity" else p[y == 0]
    if not len(side) or np.isnan(p).any():
        return None
    ranked = np.unique(p)
    needed = max(1, int(np.ceil(at.value * len(side) - 1e-9)))
    if at.name == "sensitivity":  # `needed` positives at or above the threshold
        lowest = np.sort(side)[-needed]
        below = ranked[ranked < lowest]
        return float((lowest + below[-1]) / 2) if len(below) else float(lowest)
    highest = np.sort(side)[needed - 1]  # `needed` negatives below the threshold
    above = ranked[ranked > highest]
    return float((highest + above[0]) / 2) if len(above) else float(np.nextafter(highest, 2))


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
