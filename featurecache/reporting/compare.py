"""Sets fitted runs of the same samples beside each other: ranked on validation, compared on test in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.amounts import counted
from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.evaluation.bootstrap import bootstrap_intervals, paired_differences
from featurecache.evaluation.metrics import compute_metrics
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
    """Runs in the order of their rank; `n` test samples in `n_groups` groups, those that all runs have.

    `notes` say so where a run has more of them.
    """

    metric: str
    n: int
    n_groups: int
    n_valid: int
    bootstrap: int
    runs: tuple[Compared, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `write` puts them into a file."""
        return {**asdict(self), "runs": [asdict(row) for row in self.runs]}

    def lines(self) -> list[str]:
        """As a person reads it."""
        on = f"{self.n:,} test samples in {self.n_groups:,} groups"
        lines = [f"{self.metric} on {on}, ranked on {self.n_valid:,} validation samples"]
        width = max(len(row.run) for row in self.runs)
        for row in self.runs:
            line = f"{row.rank:>3}  {row.run:<{width}}  valid {_number(row.valid)}  test {_number(row.test)}"
            if row.test_low is not None and row.test_high is not None:
                line += f" [{row.test_low:.3f}, {row.test_high:.3f}]"
            if row.difference is not None:
                line += f"  {row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            lines.append(f"{line}  {row.words}{f' ({row.note})' if row.note else ''}")
        return [*lines, *(f"note      {note}" for note in self.notes)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def write(self, path: Path) -> None:
        """As JSON; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_json({"schema": 1, **self.to_json()}), encoding="utf-8")


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"


def compare_runs(
    runs: Sequence[Run], *, names: Sequence[str] | None = None, metric: str | None = None, n: int = 1000, seed: int = 0
) -> Comparison:
    """Rank runs by a metric on their validation samples; differences on test to the one ranked first.

    The test samples decide nothing here: which run comes first is settled on validation, then told apart on test. A
    calibration was fitted on those validation samples: a run whose metric it moves there is marked by a note. Where
    some samples lack the views of a run, all are measured on those that every run has.

    Args:
        runs: two or more, of the same target and fitted with the same split.
        names: how to call them; default their paths.
        metric: of the task; default AUROC, for several classes accuracy, for numbers R2.
        n: resamples of the groups.
        seed: of the resampling.

    Raises:
        InputError: fewer than two runs, a cross-validation, other targets, another split (what one is tested on,
            another has learnt from), or other labels or groups for the same samples.
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
    _check_split(runs, names)
    test, valid_parts = (_aligned(runs, names, split) for split in ("test", "valid"))
    on_test, on_valid = (
        [_figures(run, part, split, metric, draws, seed) for run, part in zip(runs, parts, strict=True)]
        for split, parts, draws in (("test", test, n), ("valid", valid_parts, 0))
    )
    valid = [figures.get(metric) for figures in on_valid]

    def rank(index: int) -> tuple[bool, float, str]:
        value = valid[index]
        return (value is None, 0.0 if value is None else -goodness(metric, value), names[index])

    order = sorted(range(len(runs)), key=rank)
    best = order[0]
    target = to_target(test[best])
    rows = []
    for place, index in enumerate(order):
        run = runs[index]
        figures = on_test[index]
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
    common = {words: _in_common(runs, names, split) for split, words in (("test", "test"), ("valid", "validation"))}
    cut = [f"{held} for {words}" for words, held in common.items() if held]
    return Comparison(
        metric, len(target), len(np.unique(test[best].groups)), len(valid_parts[0].sample_ids), n, tuple(rows),
        (f"not all runs have the same samples; measured on those in common: {', '.join(cut)}",) if cut else (),
    )  # fmt: skip


def _figures(run: Run, part: Predictions, split: str, metric: str, n: int, seed: int) -> Mapping[str, Any]:
    """The run's own figures of a split, or those of the samples in common where they are fewer."""
    own: Mapping[str, Any] = run.metrics[split]
    if len(part.sample_ids) == own["n"]:
        return own
    target, cut = to_target(part), part.cut(run.threshold)
    value = compute_metrics(target, part.scores, threshold=cut).get(metric)
    draws = bootstrap_intervals(target, part.scores, part.groups, n=n, seed=seed, threshold=cut, metrics=[metric])
    return {metric: value, "intervals": draws if n else {}}


def _in_common(runs: Sequence[Run], names: Sequence[str], split: str) -> str:
    """How many samples of a split all runs have, and each of them, where these differ; else empty."""
    held = [set(run.arrays.of(split).sample_ids.tolist()) for run in runs]
    common = set.intersection(*held)
    if all(ids == common for ids in held):
        return ""
    each = ", ".join(f"{name} {len(ids):,}" for name, ids in zip(names, held, strict=True))
    return f"{len(common):,} ({each})"


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


def _check_split(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Refuse runs of which one is measured on what another has learnt from.

    Raises:
        InputError: says how many samples, or groups, of which run.
    """
    for run, name in zip(runs, names, strict=True):
        if run.record.get("cv"):
            raise InputError(f"{name}: a cross-validation keeps no valid samples; compare runs fitted without --cv")
    for one, other in combinations(range(len(runs)), 2):
        for what in ("sample", "group"):
            mine, theirs = (_sides(runs[index], what) for index in (other, one))
            for split, seen in (("test", ("train", "valid")), ("valid", ("train",))):
                odd = {key for key, side in mine.items() if side == split and theirs.get(key) in seen}
                back = {key for key, side in theirs.items() if side == split and mine.get(key) in seen}
                if odd or back:
                    did = "trained" if split == "valid" else "trained or validated"
                    own, its = (counted(list(s.values()).count(split), f"{split} {what}") for s in (mine, theirs))
                    raise InputError(
                        f"{names[other]}: of its {own}, {names[one]} {did} on {len(odd):,}; of the {its} of "
                        f"{names[one]}, it did on {len(back):,}: {_some(sorted(odd or back))}. "
                        "Fit the runs with the same --split, --group and --seed."
                    )


def _sides(run: Run, what: str) -> dict[str, str]:
    """The side that each sample, or group, is on; those that are not used are left out."""
    said = run.arrays
    used = said.splits != ""
    keys = said.sample_ids if what == "sample" else said.groups
    return dict(zip(keys[used].tolist(), said.splits[used].tolist(), strict=True))


def _aligned(runs: Sequence[Run], names: Sequence[str], split: str) -> list[Predictions]:
    """The predictions of one split of all runs, for the samples that all have, in the same order."""
    parts = [run.arrays.of(split) for run in runs]
    for part, name in zip(parts, names, strict=True):
        if not len(part.sample_ids):
            why = "validation ranks them" if split == "valid" else "test tells them apart"
            raise InputError(f"{name}: has no {split} samples with a known target; {why}")
    common = set.intersection(*(set(part.sample_ids.tolist()) for part in parts))
    if not common:
        raise InputError(
            f"{', '.join(names)}: no {split} sample is in all of them, so there is nothing to compare them on. "
            "Fit the runs on the same samples."
        )
    first = parts[0].take(np.flatnonzero([sample in common for sample in parts[0].sample_ids.tolist()]))
    found = [first]
    for part, name in zip(parts[1:], names[1:], strict=True):
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
