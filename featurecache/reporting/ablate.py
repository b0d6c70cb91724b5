"""Does joining views help? Heads on each view alone, fused, late-fused, with a view missing, with shuffled partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.config import SplitConfig
from featurecache.data.splits import sample_groups
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.division import divide, divide_folds
from featurecache.errors import InputError
from featurecache.evaluation.bootstrap import Repeat, Said, percentile_interval, repeated, repeated_replicates
from featurecache.evaluation.metrics import compute_metrics
from featurecache.evaluation.threshold import choose_threshold
from featurecache.evaluation.verdict import goodness, ranking_metric, verdict
from featurecache.features.features import Features, views_of
from featurecache.features.rearranged import SomeViews, WithoutView, shuffle_partners
from featurecache.heads.base import Fold, Head, get_head
from featurecache.progress import Reporter, Silent
from featurecache.run import Run
from featurecache.rundir.record import dump_json

FUSED, LATE, SHUFFLED = "fused", "late", "shuffled"
SIDES = ("train", "valid", "test")


@dataclass(frozen=True)
class Arm:
    """One way to use the views with one head.

    Attributes:
        head: its name.
        arm: `alone:VIEW`, `fused`, `late` (mean of the single views' scores), `missing:VIEW` (the fused head where a
            view is missing at test), `shuffled` (fused, fitted and tested with the other views of other samples).
        valid: mean of the metric on validation; None for arms that are not fitted.
        test: mean of the metric on test over the divisions; `test_low`, `test_high` its 95 % interval.
        difference: test less that of the reference; `low`, `high` its 95 % interval by paired resamples of groups.
        words: `better`, `worse`, `no gain shown`, `the reference`.
    """

    head: str
    arm: str
    valid: float | None
    test: float
    test_low: float | None
    test_high: float | None
    difference: float | None
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True)
class Ablation:
    """All arms of all heads, over `samples` in `groups` that any division uses: those with a known target.

    `reference[head]`: the view that is better alone on validation.
    """

    metric: str
    samples: int
    groups: int
    divisions: int
    bootstrap: int
    reference: dict[str, str]
    arms: tuple[Arm, ...]
    conclusions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "arms": [asdict(arm) for arm in self.arms]}

    def write(self, directory: Path) -> None:
        """ablation.json and ablation.csv (a row an arm) in `directory`, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ablation.json").write_text(dump_json({"schema": 1, **self.to_json()}), encoding="utf-8")
        pl.DataFrame([asdict(arm) for arm in self.arms], infer_schema_length=None).write_csv(directory / "ablation.csv")


def ablate(
    dataset: FeatureDataset,
    heads: Sequence[str],
    *,
    split: SplitConfig,
    seeds: int = 5,
    folds: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | None = None,
    bootstrap: int = 1000,
    device: str = "cpu",
    reporter: Reporter | None = None,
) -> Ablation:
    """Fit every head on every arm, over several divisions of the samples; augmented replicas are left aside.

    Args:
        dataset: of two views or more, with a target.
        heads: names of heads.
        split: how samples are divided; its seed is the first one.
        seeds: divisions, each with the next seed (with a split column only the heads' seeds differ).
        folds: K-fold cross-validation in their place: every sample is tested once.
        settings: by head.
        metric: of the task; default AUROC, for several classes accuracy, for numbers R2.
        bootstrap: resamples of the groups.
        device: where heads compute.
        reporter: told of each fit.

    Raises:
        InputError: one view only, no target, a division without validation or test samples, or with too few kinds of
            them for the metric.
    """
    views = views_of(dataset.blocks)
    if len(views) < 2:
        raise InputError(f"the dataset has one view, {views[0]!r}: an ablation asks what a second one adds")
    target = dataset.target
    if target is None:
        raise InputError("the dataset has no target: give target=COLUMN")
    metric = ranking_metric(target.task, metric)
    divisions = list(_divisions(dataset, split, seeds, folds))
    reporter = reporter or Silent()
    groups = sample_groups(dataset.table, split.group)
    arms: list[Arm] = []
    reference: dict[str, str] = {}
    conclusions = []
    reporter.begin("ablate", len(heads) * len(divisions) * (len(views) + 2), "fits")
    for name in dict.fromkeys(heads):
        kind, own = get_head(name), (settings or {}).get(name, {})
        repeats, valid = [], []
        for seed, sides in divisions:
            study = _Study(dataset.features, target, sides, metric)
            for arm, features in study.inputs(views, seed):
                head = kind(own, seed=seed, device=device, memory=dataset.memory)
                study.fit(arm, head, features)
                reporter.advance("ablate", 1, status=f"{name} {arm}")
            repeats.append(study.repeat(views))
            valid.append(study.valid)
        means = {arm: mean_of_divisions([found[arm] for found in valid], metric, "validation") for arm in valid[0]}
        reference[name] = max(views, key=lambda view: goodness(metric, means[f"alone:{view}"]))
        rows = _arms(name, repeats, means, groups, metric, f"alone:{reference[name]}", bootstrap)
        arms += rows
        conclusions.append(conclude(name, metric, rows, reference[name]))
    reporter.end("ablate")
    used = np.unique(np.concatenate([rows for _, sides in divisions for rows in sides.values()]))
    return Ablation(
        metric, len(used), len(np.unique(groups[used])), len(divisions), bootstrap, reference, tuple(arms),
        tuple(conclusions),
    )  # fmt: skip


class _Study:
    """One head on one division: fitted on training rows, threshold chosen on validation, test rows scored."""

    def __init__(self, features: Features, target: Target, sides: Mapping[str, NDArray[np.int64]], metric: str) -> None:
        self.features, self.target, self.sides, self.metric = features, target, sides, metric
        self.said: dict[str, Said] = {}
        self.valid: dict[str, float] = {}
        self.singles: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def inputs(self, views: tuple[str, ...], seed: int) -> list[tuple[str, Features]]:
        """What heads are fitted on, by arm."""
        shuffled = shuffle_partners(self.features, [self.sides[side] for side in SIDES], seed=seed)
        alone: list[tuple[str, Features]] = [(f"alone:{view}", SomeViews(self.features, (view,))) for view in views]
        return [*alone, (FUSED, self.features), (SHUFFLED, shuffled)]

    def fit(self, arm: str, head: Head, features: Features) -> None:
        """Fit a head for an arm, and for the fused one look at it with each view missing."""
        folds = {
            side: Fold(features, self.sides[side], self.target.subset(self.sides[side])) for side in ("train", "valid")
        }
        head.fit(folds["train"], folds["valid"])
        valid = head.score_rows(features, self.sides["valid"])
        test = head.score_rows(features, self.sides["test"])
        threshold = self._tell(arm, valid, test)
        if arm.startswith("alone:"):
            self.singles[arm] = (valid, test)
        if arm == FUSED:
            for view in views_of(features.blocks):
                scores = head.score_rows(WithoutView(features, view), self.sides["test"])
                self.said[f"missing:{view}"] = Said(scores, threshold)

    def _tell(self, arm: str, valid: NDArray[np.float64], test: NDArray[np.float64]) -> Any:
        truth = self.target.subset(self.sides["valid"])
        threshold = choose_threshold(truth, valid)["value"]
        figure = compute_metrics(truth, valid, threshold=threshold)[self.metric]
        self.valid[arm] = float("nan") if figure is None else float(figure)
        self.said[arm] = Said(test, threshold)
        return threshold

    def repeat(self, views: tuple[str, ...]) -> Repeat:
        """What all arms said, late fusion included: the mean of the single views' scores."""
        pairs = [self.singles[f"alone:{view}"] for view in views]
        valid, test = (np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1))
        self._tell(LATE, valid, test)
        order = [*(f"alone:{view}" for view in views), FUSED, LATE, *(f"missing:{view}" for view in views), SHUFFLED]
        rows = self.sides["test"]
        return Repeat(rows, self.target.subset(rows), {arm: self.said[arm] for arm in order})


def _divisions(
    dataset: FeatureDataset, split: SplitConfig, seeds: int, folds: int | None
) -> list[tuple[int, dict[str, NDArray[np.int64]]]]:
    """Seed and rows of each side, per division.

    Raises:
        InputError: a side is empty.
    """
    source = dataset.binding.manifest_path
    if folds is not None:
        made = [(split.seed, column) for column in divide_folds(dataset, split, folds)]
    else:
        made = [
            (seed, divide(dataset, split.model_copy(update={"seed": seed})))
            for seed in range(split.seed, split.seed + max(1, seeds))
        ]
    found = []
    for seed, column in made:
        sides = {side: np.flatnonzero(column == side).astype(np.int64) for side in SIDES}
        empty = [side for side in SIDES if not len(sides[side])]
        if empty:
            raise InputError(f"{source}: an ablation needs {' and '.join(empty)} samples with a known target")
        found.append((seed, sides))
    return found


def mean_of_divisions(values: Sequence[float], metric: str, side: str) -> float:
    """Over the divisions in which the metric is defined.

    Raises:
        InputError: it is defined in none.
    """
    defined = [value for value in values if np.isfinite(value)]
    if not defined:
        raise InputError(
            f"{metric} is undefined on the {side} samples of every division, for want of samples of several kinds. "
            f"Give --{'test' if side == 'test' else 'valid'} a larger share, or another --metric."
        )
    return float(np.mean(defined))


def _arms(
    head: str,
    repeats: Sequence[Repeat],
    valid: Mapping[str, float],
    groups: NDArray[Any],
    metric: str,
    reference: str,
    n: int,
) -> list[Arm]:
    values = repeated(repeats, metric)
    draws = repeated_replicates(repeats, groups, metric, n=n) if n else {}
    rows = []
    for arm, value in values.items():
        mean_of_divisions([value], metric, "test")
        own = percentile_interval(draws[arm]) if n else None
        apart = percentile_interval(draws[arm] - draws[reference]) if n and arm != reference else None
        low, high = apart or (None, None)
        rows.append(
            Arm(
                head=head,
                arm=arm,
                valid=valid.get(arm),
                test=value,
                test_low=own[0] if own else None,
                test_high=own[1] if own else None,
                difference=None if arm == reference else value - values[reference],
                low=low,
                high=high,
                words="the reference" if arm == reference else verdict(metric, *apart) if apart else "",
            )
        )
    return rows


def conclude(head: str, metric: str, arms: Sequence[Arm], view: str) -> str:
    """One sentence on whether fusion helps, and whether it is the pairing that does."""
    found = {arm.arm: arm for arm in arms}
    valid = {arm: found[arm].valid for arm in (FUSED, LATE)}
    best = found[max(valid, key=lambda arm: -np.inf if (value := valid[arm]) is None else goodness(metric, value))]
    how = "fused on features" if best.arm == FUSED else "late fusion"
    if best.difference is None or best.low is None or best.high is None:
        return f"{head}: without resamples nothing is said on whether fusion helps"
    figures = f"{metric} {best.difference:+.3f} [{best.low:+.3f}, {best.high:+.3f}] against {view} alone"
    said = {"better": "fusion helps", "worse": "fusion hurts"}.get(best.words, "no gain shown from fusion")
    text = f"{head}: {said} ({how}: {figures})"
    shuffled = found[SHUFFLED]
    if shuffled.difference is not None and best.words == "better":
        held = goodness(metric, shuffled.test) < goodness(metric, best.test)
        text += f"; with shuffled partners {shuffled.test:.3f}, " + (
            "so it is the pairing that helps" if held and shuffled.words != "better" else "so not the pairing alone"
        )
    return text + "."


def check_run(run: Run, dataset: FeatureDataset) -> None:
    """Refuse to put an ablation beside a run of something else.

    Raises:
        InputError: they have another target or other views.
    """
    target = dataset.target.names if dataset.target is not None else ()
    if run.targets != tuple(target) or set(run.views) != set(dataset.views):
        raise InputError(
            f"{run.path}: predicts {', '.join(run.targets)} from {', '.join(run.views)}; an ablation of "
            f"{', '.join(target) or 'nothing'} from {', '.join(dataset.views)} does not belong there"
        )
