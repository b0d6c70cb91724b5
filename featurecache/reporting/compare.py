"""Sets fitted runs of the same samples beside each other: ranked on validation, compared on test in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.evaluation.bootstrap import paired_differences
from featurecache.evaluation.verdict import goodness, ranking_metric, verdict
from featurecache.run import Run
from featurecache.rundir.predictions import Predictions
from featurecache.rundir.record import dump_json
from featurecache.rundir.results import to_target

SHOWN = 3  # samples named in a message
CALIBRATED = "its calibration was fitted on these validation samples, which rank it too well"
# What a temperature moves: probabilities, and among several classes the order of samples within one of them.
MOVED = frozenset({"log_loss", "brier", "ece"})
MOVED_OF_SEVERAL = MOVED | {"roc_auc", "average_precision"}


@dataclass(frozen=True)
class Compared:
    """One run among others.

    Attributes:
        rank: from 1, by validation.
        run: its directory, as given.
        kind: `head` or `joint`.
        head: name of the head.
        views: that it reads.
        valid: the metric on the validation samples.
        test: the metric on the test samples; `test_low`, `test_high` its 95 % interval from metrics.json.
        difference: test metric less that of the run ranked first, on the same resamples of the groups; `low`, `high`
            its 95 % interval. None for the first itself.
        words: `better`, `worse`, `no gain shown`, or `the first`.
        note: what to know of its rank, or empty.
    """

    rank: int
    run: str
    kind: str
    head: str
    views: tuple[str, ...]
    valid: float | None
    test: float | None
    test_low: float | None
    test_high: float | None
    difference: float | None
    low: float | None
    high: float | None
    words: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """Runs in the order of their rank; `n` test samples in `n_groups` groups."""

    metric: str
    n: int
    n_groups: int
    n_valid: int
    bootstrap: int
    runs: tuple[Compared, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `write` puts them into a file."""
        return {**asdict(self), "runs": [asdict(row) for row in self.runs]}

    def write(self, path: Path) -> None:
        """As JSON; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_json({"schema": 1, **self.to_json()}), encoding="utf-8")


def compare_runs(
    runs: Sequence[Run], *, names: Sequence[str] | None = None, metric: str | None = None, n: int = 1000, seed: int = 0
) -> Comparison:
    """Rank runs by a metric on their validation samples; differences on test to the one ranked first.

    The test samples decide nothing here: which run comes first is settled on validation, then told apart on test. A
    calibration was fitted on those validation samples: a run whose metric it moves there is marked by a note.

    Args:
        runs: two or more, of the same target and fitted with the same split.
        names: how to call them; default their paths.
        metric: of the task; default AUROC, for several classes accuracy, for numbers R2.
        n: resamples of the groups.
        seed: of the resampling.

    Raises:
        InputError: fewer than two runs, a cross-validation, other targets, other validation or test samples, or other
            labels or groups for them.
    """
    if len(runs) < 2:
        raise InputError("compare needs two runs or more")
    names = [str(run.path) for run in runs] if names is None else list(names)
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        for what in ("task", "targets", "classes"):
            if getattr(run, what) != getattr(first, what):
                raise InputError(
                    f"{name}: {what} {_shown(getattr(run, what))}, but {names[0]} has {_shown(getattr(first, what))}. "
                    "Only runs that predict the same can be compared."
                )
    metric = ranking_metric(first.task, metric)
    test = _aligned(runs, names, "test")
    n_valid = len(_aligned(runs, names, "valid")[0].sample_ids)
    valid = [run.metrics["valid"].get(metric) for run in runs]

    def rank(index: int) -> tuple[bool, float, str]:
        value = valid[index]
        return (value is None, 0.0 if value is None else -goodness(metric, value), names[index])

    order = sorted(range(len(runs)), key=rank)
    best = order[0]
    target = to_target(test[best])
    rows = []
    for place, index in enumerate(order):
        run = runs[index]
        figures = run.metrics["test"]
        bounds = (figures.get("intervals") or {}).get(metric) or [None, None]
        found = None if index == best else _difference(runs, test, index, best, target, metric, n, seed)
        words = "the first" if index == best else "undefined" if found is None else verdict(metric, *found[1:])
        head = run.record.get("head") or {}
        difference, low, high = found or (None, None, None)
        rows.append(
            Compared(
                rank=place + 1,
                run=names[index],
                kind=run.kind,
                head=str(head.get("name", "")),
                views=run.views,
                valid=valid[index],
                test=figures.get(metric),
                test_low=bounds[0],
                test_high=bounds[1],
                difference=difference,
                low=low,
                high=high,
                words=words,
                note=CALIBRATED if _flattered(run, metric) else "",
            )
        )
    return Comparison(metric, len(target), len(np.unique(test[best].groups)), n_valid, n, tuple(rows))


def _flattered(run: Run, metric: str) -> bool:
    """Whether the metric on validation samples is better for a calibration that was fitted on them."""
    method = (run.record.get("calibration") or {}).get("method")
    if method == "temperature":
        return metric in (MOVED_OF_SEVERAL if run.task == "multiclass" else MOVED)
    return method is not None


def _difference(
    runs: Sequence[Run],
    test: Sequence[Predictions],
    index: int,
    best: int,
    target: Target,
    metric: str,
    n: int,
    seed: int,
) -> tuple[float, float, float] | None:
    """Metric of a run less that of the best one, low and high ends; None where it is undefined."""
    cut = [(runs[i].threshold or {}).get("value") for i in (index, best)]
    found = paired_differences(
        target, test[index].scores, test[best].scores, test[best].groups,
        n=n, seed=seed, threshold_a=cut[0], threshold_b=cut[1], metrics=[metric],
    ).get(metric)  # fmt: skip
    return None if found is None else (found["difference"], found["low"], found["high"])


def _aligned(runs: Sequence[Run], names: Sequence[str], split: str) -> list[Predictions]:
    """The predictions of one split of all runs, in the same order of samples."""
    parts = [run.arrays.of(split) for run in runs]
    for run, part, name in zip(runs, parts, names, strict=True):
        if not len(part.sample_ids) and run.record.get("cv"):
            raise InputError(f"{name}: a cross-validation keeps no {split} samples; compare runs fitted without --cv")
        if not len(part.sample_ids):
            why = "validation ranks them" if split == "valid" else "test tells them apart"
            raise InputError(f"{name}: has no {split} samples with a known target; {why}")
    first = parts[0]
    found = [first]
    for part, name in zip(parts[1:], names[1:], strict=True):
        mine, theirs = set(part.sample_ids.tolist()), set(first.sample_ids.tolist())
        if mine != theirs:
            odd = sorted(mine ^ theirs)
            raise InputError(
                f"{name}: {len(odd):,} of its {split} samples are not those of {names[0]}: {_some(odd)}. "
                "Fit the runs with the same --split, --group and --seed, and the same --missing."
            )
        place = {sample: row for row, sample in enumerate(part.sample_ids.tolist())}
        part = part.take(np.array([place[sample] for sample in first.sample_ids.tolist()], dtype=np.int64))
        other = ~_same(first.true, part.true)
        if other.any():
            raise InputError(
                f"{name}: {int(other.sum()):,} {split} samples have other labels than in {names[0]}: "
                f"{_some(first.sample_ids[other].tolist())}. Fit both on the same labels."
            )
        pairs = set(zip(first.groups.tolist(), part.groups.tolist(), strict=True))
        if not len(pairs) == len(set(first.groups.tolist())) == len(set(part.groups.tolist())):
            raise InputError(
                f"{name}: groups its {split} samples otherwise than {names[0]}, so resamples can't be paired. "
                "Fit both with the same --group."
            )
        found.append(part)
    return found


def _same(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) whether the targets of each sample agree."""
    equal = (a == b) | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else a == b
    return np.asarray(equal if equal.ndim == 1 else equal.all(axis=1))


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
