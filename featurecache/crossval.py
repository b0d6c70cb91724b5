"""Cross-validation of a head: grouped, stratified folds, out-of-fold predictions; the run's head is fitted on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.config import FitConfig, SplitConfig
from featurecache.data.splits import fold_splits, make_splits, sample_groups
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluation.recalibration import Method
from featurecache.evaluation.threshold import At
from featurecache.fit import (
    HeadRun,
    calibrated,
    check_decision,
    dataset_record,
    fit_head,
    fit_rows,
    head_record,
    open_dataset,
    target_of,
    torch_device,
)
from featurecache.heads.base import Head, get_head
from featurecache.heads.importance import write_importance
from featurecache.progress import Reporter, Silent
from featurecache.results import Folds, find_threshold, finish_run, make_predictions, write_results
from featurecache.run import RunWriter, default_run_path

Choose = Callable[[NDArray[np.str_], str], Mapping[str, Any]]
"""Settings of the head for a division of the samples: train, valid, test or '' per sample, and what it is called."""


@dataclass
class _OutOfFold:
    """What the folds' heads say of samples that they were not fitted on: (n, outputs) each, NaN before."""

    test: NDArray[np.float64]
    valid_rows: list[NDArray[np.int64]]
    valid_scores: list[NDArray[np.float64]]
    number: NDArray[np.int64]
    history: list[dict[str, Any]]
    skipped: dict[str, list[int]]  # class or label -> folds whose training rows lack it


def cross_validate(
    dataset: FeatureDataset,
    folds: int,
    *,
    head: str = "fc",
    choose: Choose | None = None,
    out: str | Path | None = None,
    split: SplitConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    bootstrap: int = 1000,
    at: str | None = None,
    calibrate: Method | None = None,
    config: Mapping[str, Any] | None = None,
    command: str = "",
    reporter: Reporter | None = None,
    extra: Mapping[str, Any] | None = None,
    files: Callable[[], Mapping[str, str]] | None = None,
) -> HeadRun:
    """Fit a head per fold, keep what each says of the samples that it has not seen, then fit one on all samples.

    Within a fold `split.valid` of what is not tested serves early stopping, calibration and threshold. The decision
    threshold is one for all folds, chosen on their validation rows together; since these are test rows of other folds,
    figures that depend on it are slightly optimistic, which report and card say. The run's head is fitted on all
    samples but a share of validation; its figures are those of the folds.

    Args:
        dataset: with a target.
        folds: 2 or more.
        head: its name.
        choose: gives the settings for a division, so that tuning happens within the folds (nested); default `settings`.
        out: run directory; default as `fit_head`.
        split: group, seed and share of validation.
        settings: the head's own.
        device: where heads compute.
        overwrite: replace an existing run.
        bootstrap: resamples of the groups per interval.
        at: see `fit_head`.
        calibrate: see `fit_head`.
        config: recorded in the run.
        command: recorded in the run.
        reporter: told of each fit.
        extra: more entries of run.json.
        files: gives more files of the run, by name, once all is fitted.

    Raises:
        InputError: no target, too few groups, unknown head or setting, an existing run.
    """
    reporter = reporter or Silent()
    target = target_of(dataset)
    divide = SplitConfig.create({name: getattr(split, name) for name in SplitConfig.model_fields} if split else {})
    decide_at = check_decision(target, at, calibrate)
    source = dataset.binding.manifest_path
    divisions = fold_splits(dataset.table, target, divide, folds, content=dataset.content, source=source)
    everything = make_splits(
        dataset.table, target, divide.model_copy(update={"test": 0.0}), content=dataset.content, source=source
    )
    kind, where = get_head(head), torch_device(device)

    def fitted(splits: NDArray[np.str_], called: str) -> Head:
        own = choose(splits, called) if choose is not None else settings or {}
        estimator = kind(own, seed=divide.seed, device=where, memory=dataset.memory)
        try:
            fit_rows(estimator, dataset, splits, reporter)
        except InputError as error:  # such as a class that a fold's training rows lack
            raise InputError(f"{called}: {error}") from None
        return estimator

    kind(settings or {}, seed=divide.seed)  # refuses unknown settings before anything is fitted
    path = Path(out) if out is not None else default_run_path(dataset.binding.name, target.names, head)
    with RunWriter(path, kind="head", overwrite=overwrite) as writer:
        start = time.perf_counter()
        said = _out_of_fold(dataset, target, divisions, fitted, calibrate)
        final = fitted(everything, "final")
        scores, calibration = calibrated(target, final.score_rows(dataset.features), everything, calibrate)
        seconds = round(time.perf_counter() - start, 3)
        final.save(writer.path)
        write_importance(writer.path, final)
        untested = said.number < 0  # their target is unknown
        said.test[untested] = scores[untested]
        threshold = _threshold(target, said, decide_at)
        results = write_results(
            writer.path,
            target=target,
            scores=said.test,
            splits=np.where(said.number >= 0, "test", ""),
            groups=sample_groups(dataset.table, divide.group),
            sample_ids=dataset.sample_ids,
            views=dataset.views,
            present=dataset.present,
            history=said.history,
            bootstrap=bootstrap,
            seed=divide.seed,
            folds=Folds(said.number, threshold),
        )
        for name, text in (files() if files is not None else {}).items():
            (writer.path / name).write_text(text, encoding="utf-8")
        run = finish_run(
            writer,
            {
                **dataset_record(dataset, divide),
                **head_record(final, results.threshold, calibration),
                "cv": {"folds": folds, "valid": divide.valid, "skipped": said.skipped},
                "command": command,
                "config": dict(config or {"head": head, "cv": folds, **divide.model_dump(mode="json")}),
                "seconds_fit": seconds,
                **dict(extra or {}),
            },
        )
    return HeadRun(run.path, run.record)


def fit_from_config(config: FitConfig, *, command: str = "", reporter: Reporter | None = None) -> HeadRun:
    """What `featurecache fit-head` does."""
    if config.cv is not None:
        return cross_validate(
            open_dataset(config),
            config.cv,
            head=config.head,
            out=config.out,
            split=config,
            settings=config.settings,
            device=config.device,
            overwrite=config.overwrite,
            bootstrap=config.bootstrap,
            at=config.at,
            calibrate=config.calibrate,
            config=config.model_dump(mode="json", exclude_none=True),
            command=command,
            reporter=reporter,
        )
    return fit_head(
        open_dataset(config),
        head=config.head,
        out=config.out,
        split=config.split,
        group=config.group,
        seed=config.seed,
        valid=config.valid,
        test=config.test,
        settings=config.settings,
        device=config.device,
        overwrite=config.overwrite,
        bootstrap=config.bootstrap,
        at=config.at,
        calibrate=config.calibrate,
        config=config.model_dump(mode="json", exclude_none=True),
        command=command,
        reporter=reporter,
    )


def _out_of_fold(
    dataset: FeatureDataset,
    target: Target,
    divisions: list[NDArray[np.str_]],
    fitted: Callable[[NDArray[np.str_], str], Head],
    calibrate: Method | None,
) -> _OutOfFold:
    found = _OutOfFold(np.empty(0), [], [], np.full(len(dataset), -1, dtype=np.int64), [], {})
    for fold, splits in enumerate(divisions):
        head = fitted(splits, f"fold {fold + 1}")
        rows = {side: np.flatnonzero(splits == side).astype(np.int64) for side in ("valid", "test")}
        both = np.concatenate([rows["valid"], rows["test"]])
        scores, _ = calibrated(target.subset(both), head.score_rows(dataset.features, both), splits[both], calibrate)
        if not fold:
            found.test = np.full((len(dataset), scores.shape[1]), np.nan)
        found.valid_rows.append(rows["valid"])
        found.valid_scores.append(scores[: len(rows["valid"])])
        found.test[rows["test"]] = scores[len(rows["valid"]) :]
        found.number[rows["test"]] = fold
        for name in head.skipped_:
            found.skipped.setdefault(name, []).append(fold)
        found.history += [{"fold": fold, **row} for row in head.history_]
    return found


def _threshold(target: Target, said: _OutOfFold, at: At | None) -> dict[str, Any]:
    """One threshold from the validation rows of all folds."""
    rows = np.concatenate(said.valid_rows)
    names = [str(number) for number in range(len(rows))]
    everything = make_predictions(
        target.subset(rows), np.concatenate(said.valid_scores), sample_ids=names, splits=["valid"] * len(rows)
    )
    return find_threshold(everything, at)
