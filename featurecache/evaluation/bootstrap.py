"""Intervals by bootstrap over groups: what the metrics would be on other patients, not on other images of these.

A resample is a weight per row, how often its group was drawn, and every metric is written for a block of such weights
at once: 1,000 resamples cost a few matrix products and one sort per class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.evaluation.metrics import check_metric, metric_names
from featurecache.evaluation.weighted import (
    CLASS_FIGURES,
    COUNTS,
    Array,
    Part,
    Table,
    mean_defined,
    per_class,
    weighted_parts,
)
from featurecache.rundir.cut import Threshold

BLOCK = 4_000_000  # weights held at a time
ENOUGH = 0.5  # an interval needs at least this share of resamples in which the metric is defined


def bootstrap_intervals(
    target: Target,
    scores: NDArray[Any],
    groups: Sequence[Any] | NDArray[Any] | None,
    *,
    n: int = 1000,
    seed: int = 0,
    threshold: Threshold = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, list[float]]:
    """95 % percentile intervals of the metrics of `compute_metrics`.

    Args:
        target: aligned with `scores`.
        scores: as in `compute_metrics`.
        groups: per row; a resample draws whole groups, with replacement. None: every row is one.
        n: resamples.
        seed: the same seed gives the same intervals.
        threshold: as in `compute_metrics`.
        metrics: which; None is all of the task.

    Returns:
        metric -> [low, high]; a metric that is undefined in most resamples is left out.
    """
    found = replicates(target, scores, groups, n=n, seed=seed, threshold=threshold, metrics=metrics)
    return {name: interval for name, values in found.items() if (interval := percentile_interval(values)) is not None}


def label_intervals(
    target: Target,
    scores: NDArray[Any],
    groups: Sequence[Any] | NDArray[Any] | None,
    *,
    n: int = 1000,
    seed: int = 0,
    threshold: Threshold = None,
) -> dict[str, dict[str, list[float]]]:
    """The same per label or regression target: name -> metric -> [low, high]."""
    wanted = metric_names(target.task)
    tables = _sample(weighted_parts(target, scores, threshold, wanted), wanted, target, groups, n, seed)
    found = {}
    for name, table in zip(target.names, tables, strict=True):
        pairs = ((metric, percentile_interval(values)) for metric, values in table.items())
        found[name] = {metric: interval for metric, interval in pairs if interval is not None}
    return found


def paired_differences(
    target: Target,
    scores_a: NDArray[Any],
    scores_b: NDArray[Any],
    groups: Sequence[Any] | NDArray[Any] | None,
    *,
    n: int = 1000,
    seed: int = 0,
    threshold_a: Threshold = None,
    threshold_b: Threshold = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Differences a - b of two models on the same rows, both measured on the same resamples.

    Returns:
        metric -> `a`, `b`, `difference`, `low`, `high` (95 %); metrics undefined on the rows or in most resamples are
        left out. The interval holds 0: no difference shown.
    """
    options: dict[str, Any] = {"n": n, "seed": seed, "metrics": metrics}
    draws_a = replicates(target, scores_a, groups, threshold=threshold_a, **options)
    draws_b = replicates(target, scores_b, groups, threshold=threshold_b, **options)
    once_a = _observed(target, scores_a, threshold_a, metrics)
    once_b = _observed(target, scores_b, threshold_b, metrics)
    found = {}
    for metric, draws in draws_a.items():
        a, b = once_a[metric], once_b[metric]
        interval = percentile_interval(draws - draws_b[metric])
        if interval is not None and np.isfinite(a - b):
            found[metric] = {"a": a, "b": b, "difference": a - b, "low": interval[0], "high": interval[1]}
    return found


def replicates(
    target: Target,
    scores: NDArray[Any],
    groups: Sequence[Any] | NDArray[Any] | None,
    *,
    n: int = 1000,
    seed: int = 0,
    threshold: Threshold = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, Array]:
    """Each metric on each resample, (n,), NaN where undefined; the same seed and groups draw the same resamples."""
    wanted = _wanted(target, metrics)
    tables = _sample(weighted_parts(target, scores, threshold, wanted), wanted, target, groups, n, seed)
    return {name: mean_defined([table[name] for table in tables]) for name in wanted}


@dataclass(frozen=True)
class Said:
    """What one model said about the test rows of a division: scores as in `compute_metrics`, and its threshold."""

    scores: NDArray[Any]
    threshold: Threshold = None


@dataclass(frozen=True)
class Repeat:
    """The test rows of one division of the samples (a seed's, or a fold) and what several models said about them.

    Attributes:
        rows: int64 (m,), positions among all samples.
        target: of these rows, (m,).
        said: by model, aligned with `rows`; every repeat holds the same models.
    """

    rows: NDArray[np.int64]
    target: Target
    said: Mapping[str, Said]


def repeated(repeats: Sequence[Repeat], metric: str) -> dict[str, float]:
    """A metric of each model, averaged over the divisions in which it is defined; NaN where it never is."""
    found = {}
    for name in repeats[0].said:
        values = [
            _observed(repeat.target, repeat.said[name].scores, repeat.said[name].threshold, [metric])[metric]
            for repeat in repeats
        ]
        found[name] = float(mean_defined([np.array([value]) for value in values])[0])
    return found


def repeated_replicates(
    repeats: Sequence[Repeat], groups: Sequence[Any] | NDArray[Any], metric: str, *, n: int = 1000, seed: int = 0
) -> dict[str, Array]:
    """The same on resamples of the groups of all samples, (n,) per model, NaN where undefined.

    A group that is in the test rows of several divisions is drawn for all of them at once, so that the repeats do not
    pass for more data than there are. Differences of two models' replicates are paired.

    Args:
        repeats: divisions of the same samples.
        groups: (n_samples,) what is drawn, with replacement.
        metric: of the task.
        n: resamples.
        seed: the same seed draws the same resamples.
    """
    wanted = _wanted(repeats[0].target, [metric])
    parts = []
    for repeat in repeats:
        rows = repeat.rows[np.asarray(repeat.target.known)]
        for name, said in repeat.said.items():
            parts.append((rows, name, weighted_parts(repeat.target, said.scores, said.threshold, wanted)))
    codes = numbered(np.asarray(groups))
    blocks: dict[str, list[Array]] = {name: [] for name in repeats[0].said}
    for weights in group_weights(codes, n, seed):
        values: dict[str, list[Array]] = {name: [] for name in blocks}
        for rows, name, of_labels in parts:
            values[name].append(mean_defined([part(weights[:, rows])[metric] for part in of_labels]))
        for name, of_repeats in values.items():
            blocks[name].append(mean_defined(of_repeats))
    return {name: np.concatenate(of_blocks) for name, of_blocks in blocks.items()}


def percentile_interval(values: Array) -> list[float] | None:
    """[2.5 %, 97.5 %] of the defined values; None where most are undefined."""
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < ENOUGH * len(values):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(low), float(high)]


def class_tables(
    target: Target,
    scores: NDArray[Any],
    groups: Sequence[Any] | NDArray[Any] | None,
    *,
    n: int = 1000,
    seed: int = 0,
    threshold: Threshold = None,
) -> dict[str, dict[str, Any]]:
    """Figures of each class against the rest, at the decisions that the threshold (or the highest probability) gives.

    Args:
        target: binary, multiclass or dense, aligned with `scores`.
        scores: as in `compute_metrics`.
        groups: as in `bootstrap_intervals`.
        n: resamples; 0 for no intervals.
        seed: of the resampling.
        threshold: as in `compute_metrics`.

    Returns:
        class -> `n` of the class, `predicted`, `right`, and as floats or None `prevalence`, `sensitivity`,
        `specificity`, `ppv`, `npv`, `f1`, `roc_auc`, `average_precision` (dense: pixels, and `iou` and `dice` for
        the last five); `intervals`: figure -> [low, high].
    """
    part = per_class(target, scores, threshold)
    codes = known_groups(target, groups)
    once = part(np.ones((1, len(codes))))
    blocks = [part(weights) for weights in group_weights(codes, n, seed)]
    found: dict[str, dict[str, Any]] = {}
    for number, label in enumerate(target.classes):
        row: dict[str, Any] = {name: int(once[name][number, 0]) for name in COUNTS}
        for name in once:
            if name not in COUNTS:
                value = float(once[name][number, 0])
                row[name] = value if np.isfinite(value) else None
        intervals = {}
        for name in (name for name in CLASS_FIGURES if name in once and blocks):
            ends = percentile_interval(np.concatenate([block[name][number] for block in blocks]))
            if ends is not None and row[name] is not None:
                intervals[name] = ends
        found[label] = {**row, "intervals": intervals} if n else row
    return found


def _observed(
    target: Target, scores: NDArray[Any], threshold: Threshold, metrics: Sequence[str] | None
) -> dict[str, float]:
    """The metrics on the rows as they are: one resample with every weight 1."""
    wanted = _wanted(target, metrics)
    once = np.ones((1, int(np.count_nonzero(target.known))))
    tables = [part(once) for part in weighted_parts(target, scores, threshold, wanted)]
    return {name: float(mean_defined([table[name] for table in tables])[0]) for name in wanted}


def _wanted(target: Target, metrics: Sequence[str] | None) -> tuple[str, ...]:
    for name in metrics or ():
        check_metric(target.task, name)
    return metric_names(target.task) if metrics is None else tuple(metrics)


def _sample(
    parts: list[Part],
    wanted: tuple[str, ...],
    target: Target,
    groups: Sequence[Any] | NDArray[Any] | None,
    n: int,
    seed: int,
) -> list[Table]:
    """Each metric of each part on `n` resamples of the rows with a known target."""
    codes = known_groups(target, groups)
    blocks = [[part(weights) for part in parts] for weights in group_weights(codes, n, seed)]
    if not blocks:
        return [{name: np.empty(0) for name in wanted} for _ in parts]
    return [{name: np.concatenate([block[i][name] for block in blocks]) for name in wanted} for i in range(len(parts))]


def known_groups(target: Target, groups: Sequence[Any] | NDArray[Any] | None) -> NDArray[np.int64]:
    """Which group each row with a known target is of, numbered from 0; without groups every row is one.

    Raises:
        InputError: there is not a group per row.
    """
    rows = np.flatnonzero(np.asarray(target.known))
    if groups is None:
        return np.arange(len(rows), dtype=np.int64)
    if len(groups) != len(target.values):
        raise InputError(f"{len(groups)} groups for {len(target.values)} rows")
    return numbered(np.asarray(groups)[rows])


def numbered(groups: NDArray[Any]) -> NDArray[np.int64]:
    """The same groups as numbers from 0 on."""
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def group_weights(codes: NDArray[np.int64], n: int, seed: int) -> Iterator[Array]:
    """How often each row is in a resample, (up to n, n_rows), a block at a time."""
    if not len(codes):
        return
    count = int(codes.max()) + 1
    generator = np.random.default_rng(seed)
    size = max(1, BLOCK // max(len(codes), count))
    for start in range(0, n, size):
        size = min(size, n - start)
        drawn = generator.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)
        yield times[:, codes].astype(np.float64)
