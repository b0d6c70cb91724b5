"""Cross-validation of a head: grouped, stratified folds, out-of-fold predictions; the run's head is fitted on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.config import FitConfig, HeadConfig
from featurecache.data.splits import sample_groups
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.division import divide, divide_folds
from featurecache.errors import InputError
from featurecache.evaluation.calibration import Method
from featurecache.evaluation.threshold import At
from featurecache.fit import (
    HeadRun,
    calibrated,
    check_decision,
    fit_once,
    fit_rows,
    open_dataset,
    torch_device,
    views_alone,
)
from featurecache.heads.base import Head, get_head
from featurecache.progress import Reporter, Silent
from featurecache.run import RunWriter
from featurecache.rundir.fitrecord import NOTHING, Beside, finish_head, read_about, refuse_dense, run_path, target_of
from featurecache.rundir.results import Folds, Results, threshold_on, write_results

Choose = Callable[[NDArray[np.str_], str], Mapping[str, Any]]
"""Settings of the head for a division of the samples: train, valid, test or '' per sample, and what it is called."""


@dataclass
class _OutOfFold:
    """What the folds' heads say of samples that they were not fitted on: (n, outputs) each, NaN before."""

    test: NDArray[np.float64]
    single: dict[str, NDArray[np.float64]]  # by view, of that view alone
    thresholds: list[Any]  # of each fold, chosen on its validation rows
    number: NDArray[np.int64]
    history: list[dict[str, Any]]
    skipped: dict[str, list[int]]  # class or label -> folds whose training rows lack it


def cross_validate(
    dataset: FeatureDataset,
    folds: int,
    config: HeadConfig,
    beside: Beside = NOTHING,
    *,
    choose: Choose | None = None,
    reporter: Reporter | None = None,
) -> HeadRun:
    """Fit a head per fold, keep what each says of the samples that it has not seen, then fit one on all samples.

    Within a fold `config.valid` of what is not tested serves early stopping, calibration and the decision threshold of
    that fold. The run's head is fitted on all samples but such a share, on which its own threshold is chosen, that of
    new samples; the run's figures are those of the folds.

    Args:
        dataset: with a target.
        folds: 2 or more.
        config: see `fit_head`; `split` must be `auto`, and `test` is not used.
        beside: what the run keeps besides.
        choose: gives the settings for a division, so that tuning happens within the folds (nested); default those of
            `config`.
        reporter: told of each fit.

    Raises:
        InputError: no target, too few groups, unknown head or setting, an existing run.
    """
    reporter = reporter or Silent()
    target = target_of(dataset)
    refuse_dense(target, "--cv")
    decide_at = check_decision(target, config.at, config.calibrate)
    about = read_about(config.about)
    divisions = divide_folds(dataset, config, folds)
    everything = divide(dataset, config.model_copy(update={"test": 0.0}))
    kind, where = get_head(config.head), torch_device(config.device)

    def fitted(splits: NDArray[np.str_], called: str) -> Head:
        own = choose(splits, called) if choose is not None else config.settings
        estimator = kind(own, seed=config.seed, device=where, memory=dataset.memory)
        try:
            fit_rows(estimator, dataset, splits, reporter)
        except InputError as error:  # such as a class that a fold's training rows lack
            raise InputError(f"{called}: {error}") from None
        return estimator

    kind(config.settings, seed=config.seed)  # refuses unknown settings before anything is fitted
    with RunWriter(run_path(dataset, config), kind="head", overwrite=config.overwrite) as writer:
        start = time.perf_counter()
        said = _out_of_fold(dataset, target, divisions, fitted, config.calibrate, decide_at)
        final = fitted(everything, "final")
        scores, calibration = calibrated(target, final.score_rows(dataset.features), everything, config.calibrate)
        seconds = round(time.perf_counter() - start, 3)
        untested = said.number < 0  # their target is unknown
        said.test[untested] = scores[untested]
        valid = np.flatnonzero(everything == "valid")
        threshold = threshold_on(target.subset(valid), scores[valid], decide_at)
        if threshold["value"] is not None:
            threshold["folds"] = said.thresholds
        results = _write(writer.path, dataset, target, said, threshold, config)
        sides = np.where(said.number >= 0, said.number.astype(np.str_), "")
        record = {
            "cv": {"folds": folds, "valid": config.valid, "skipped": said.skipped},
            "seconds_fit": seconds,
        }
        run = finish_head(
            writer, dataset, final, config, beside, results, calibration, record, sides, about, said.single
        )
    return HeadRun(run.path, run.record)


def _write(
    path: Path,
    dataset: FeatureDataset,
    target: Target,
    said: _OutOfFold,
    threshold: Mapping[str, Any],
    config: HeadConfig,
) -> Results:
    """What the folds found, into the run's directory."""
    return write_results(
        path,
        target=target,
        scores=said.test,
        splits=np.where(said.number >= 0, "test", ""),
        groups=sample_groups(dataset.table, config.group),
        sample_ids=dataset.sample_ids,
        views=dataset.views,
        present=dataset.present,
        history=said.history,
        bootstrap=config.bootstrap,
        seed=config.seed,
        folds=Folds(said.number, threshold),
    )


def fit_dataset(
    dataset: FeatureDataset,
    config: HeadConfig,
    beside: Beside = NOTHING,
    *,
    cv: int | None = None,
    reporter: Reporter | None = None,
) -> HeadRun:
    """Fit a head once, or cross-validate it."""
    if cv is None:
        return fit_once(dataset, config, beside, reporter=reporter)
    return cross_validate(dataset, cv, config, beside, reporter=reporter)


def fit_from_config(config: FitConfig, *, command: str = "", reporter: Reporter | None = None) -> HeadRun:
    """What `featurecache fit-head` does."""
    return fit_dataset(open_dataset(config), config, Beside(command), cv=config.cv, reporter=reporter)


def _out_of_fold(
    dataset: FeatureDataset,
    target: Target,
    divisions: list[NDArray[np.str_]],
    fitted: Callable[[NDArray[np.str_], str], Head],
    calibrate: Method | None,
    at: At | None,
) -> _OutOfFold:
    found = _OutOfFold(np.empty(0), {}, [], np.full(len(dataset), -1, dtype=np.int64), [], {})
    for fold, splits in enumerate(divisions):
        head = fitted(splits, f"fold {fold + 1}")
        rows = {side: np.flatnonzero(splits == side).astype(np.int64) for side in ("valid", "test")}
        both = np.concatenate([rows["valid"], rows["test"]])
        scores, calibration = calibrated(
            target.subset(both), head.score_rows(dataset.features, both), splits[both], calibrate
        )
        alone = views_alone(head, dataset, splits, calibration)
        if not fold:
            found.test = np.full((len(dataset), scores.shape[1]), np.nan)
            found.single = {view: np.full_like(found.test, np.nan) for view in alone}
        of_valid, of_test = np.split(scores, [len(rows["valid"])])
        found.thresholds.append(threshold_on(target.subset(rows["valid"]), of_valid, at)["value"])
        found.test[rows["test"]] = of_test
        for view, said in alone.items():
            found.single[view][rows["test"]] = said[rows["test"]]
        found.number[rows["test"]] = fold
        for name in head.skipped_:
            found.skipped.setdefault(name, []).append(fold)
        found.history += [{"fold": fold, **row} for row in head.history_]
    return found
