"""Metrics by site, device or whatever a column says: each subgroup with size and intervals, small ones flagged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.evaluation.bootstrap import bootstrap_intervals
from featurecache.evaluation.metrics import compute_metrics
from featurecache.rundir.cut import Threshold, at_rows

FEW_GROUPS = 30  # below that a bootstrap's interval is too narrow to be trusted
FEW_EVENTS = 10  # of the rarer answer, or class
SHOWN = 3  # rare answers named
UNKNOWN = ""  # the subgroup of samples where the column is empty


@dataclass(frozen=True)
class Subgroup:
    """What a model reaches on the samples of one value of a column.

    Attributes:
        value: of the column as text; empty where it is unknown.
        n, n_groups: samples with a known target, and their groups.
        metrics: as `compute_metrics`.
        intervals: metric -> [low, high].
        small: why the figures say little, or empty.
    """

    value: str
    n: int
    n_groups: int
    metrics: dict[str, Any]
    intervals: dict[str, list[float]]
    small: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, laid out like a split of metrics.json."""
        own = {"n": self.n, "n_groups": self.n_groups, "small": self.small}
        return {**own, **{k: v for k, v in self.metrics.items() if k not in own}, "intervals": self.intervals}


def by_subgroup(
    target: Target,
    scores: NDArray[np.float64],
    groups: Sequence[Any] | NDArray[Any],
    column: Sequence[str | None],
    *,
    threshold: Threshold = None,
    n: int = 1000,
    seed: int = 0,
) -> list[Subgroup]:
    """Every subgroup of a column, by value; samples without a known target count nowhere.

    Args:
        target: aligned with `scores`.
        scores: as in `compute_metrics`.
        groups: per row, what the bootstrap draws.
        column: per row, the subgroup; None or empty where unknown.
        threshold: as in `compute_metrics`: the run's own, the same for all subgroups.
        n: resamples; 0 for no intervals.
        seed: of the resampling.
    """
    values = np.array([UNKNOWN if value is None else str(value) for value in column], dtype=np.str_)
    groups = np.asarray(groups)
    known = np.asarray(target.known)
    found = []
    for value in sorted(set(values[known].tolist())):
        rows = np.flatnonzero((values == value) & known)
        part = target.subset(rows)
        cut = at_rows(threshold, rows)
        metrics = compute_metrics(part, scores[rows], threshold=cut)
        of_groups = len(np.unique(groups[rows]))
        intervals = bootstrap_intervals(part, scores[rows], groups[rows], n=n, seed=seed, threshold=cut) if n else {}
        found.append(Subgroup(value, len(rows), of_groups, metrics, intervals, _small(part, of_groups)))
    return found


def _small(target: Target, n_groups: int) -> str:
    reasons = []
    if n_groups < FEW_GROUPS:
        reasons.append(f"{n_groups} group{'s' * (n_groups != 1)}")
    if target.task in ("binary", "multiclass"):
        counts = np.bincount(target.values[target.values >= 0], minlength=len(target.classes))
        rarest = int(counts.argmin())
        if counts[rarest] < FEW_EVENTS:
            reasons.append(f"{counts[rarest]} of {target.classes[rarest]!r}")
    elif target.task == "multilabel":
        answers = [
            (int(count), f"{word} {name!r}")
            for side, word in ((1, "of"), (0, "without"))
            for name, count in zip(target.names, (target.values == side).sum(axis=0), strict=True)
        ]
        few = sorted(answer for answer in answers if answer[0] < FEW_EVENTS)
        reasons += [f"{count} {what}" for count, what in few[:SHOWN]]
        if len(few) > SHOWN:
            reasons.append(f"{len(few) - SHOWN} more below {FEW_EVENTS}")
    return ", ".join(reasons)
