"""Stage two: cached features into a fitted head, evaluated and written as a run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.bodies.registry import RUN_PREFIX
from featurecache.config import FitConfig, SplitConfig
from featurecache.data.splits import group_column, make_splits, sample_groups
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, RecipeMismatchError
from featurecache.evaluation.recalibration import Calibration, Method, check_method, fit_calibration
from featurecache.evaluation.threshold import At
from featurecache.features import Features
from featurecache.heads.base import Fold, Head, get_head, load_head
from featurecache.heads.importance import write_importance
from featurecache.progress import Reporter, Silent
from featurecache.recorded import read_recipe, recipe_differences
from featurecache.results import finish_run, write_results
from featurecache.run import Run, RunWriter, default_run_path, load_run
from featurecache.store.recipe import Recipe


class HeadRun(Run):
    """A run that holds a fitted head."""

    @cached_property
    def head(self) -> Head:
        """The fitted head.

        Raises:
            RunError: its files are damaged.
        """
        return load_head(self.path)

    @property
    def view_recipes(self) -> dict[str, Recipe]:
        """The recipe of the features that each view of the head was fitted on."""
        return {view: read_recipe(entry) for view, entry in self.recipes.items()}

    def predict_proba(self, dataset: FeatureDataset) -> NDArray[np.float64]:
        """Scores of a dataset's samples: (n, classes) or (n, labels) probabilities, for regression (n, targets) values.

        Warns where features differ in engine, precision or storage dtype alone.

        Raises:
            RecipeMismatchError: its features are of another recipe; names the fields that differ.
        """
        for note in check_recipes(self, dataset):
            warnings.warn(note, stacklevel=2)
        return self.score_rows(dataset.features)

    def score_rows(self, features: Features) -> NDArray[np.float64]:
        """`Head.score_rows` of all rows, calibrated where the run is."""
        scores = self.head.score_rows(features)
        recorded = self.record.get("calibration")
        if not recorded:
            return scores
        return Calibration.from_json(recorded).apply(scores, exclusive=bool(self.classes))


def load_head_run(path: str | Path) -> HeadRun:
    """A run of `fit-head`.

    Raises:
        RunError: it is damaged.
        InputError: it is a run of another kind.
    """
    run = load_run(path)
    if run.kind != "head":
        raise InputError(f"{path}: a {run.kind} run, not one of fit-head")
    return HeadRun(run.path, run.record)


def check_recipes(run: HeadRun, dataset: FeatureDataset) -> list[str]:
    """Compare the features of a dataset with those that a head was fitted on.

    Returns:
        A note per view whose features differ in engine, precision or storage dtype alone.

    Raises:
        RecipeMismatchError: anything else differs, or a view or tap is lacking.
    """
    expected = [(block.view, block.tap, block.shape) for block in run.head.blocks_]
    found = [(block.view, block.tap, block.shape) for block in dataset.blocks]
    if expected != found:
        raise RecipeMismatchError(
            f"{run.path}: the head expects {list_blocks(expected)}; the dataset has {list_blocks(found)}"
        )
    return compare_recipes(run, dataset.recipes)


def compare_recipes(run: HeadRun, recipes: Mapping[str, Recipe]) -> list[str]:
    """The same for recipes by view, whatever other taps they hold."""
    notes: dict[str, list[str]] = {}
    problems: dict[str, list[str]] = {}
    for view, recipe in run.view_recipes.items():
        serious, numeric = recipe_differences(recipe, recipes[view])
        if serious:
            problems.setdefault(serious, []).append(view)
        elif numeric:
            notes.setdefault(numeric, []).append(view)
    if problems:
        raise RecipeMismatchError.from_problems(
            f"{run.path}: fitted on features of another recipe (then -> now). Use the run's own bodies, weights and "
            "preprocessing: `featurecache predict` does, and --body and --weights say where they are",
            [f"view {', '.join(views)}: {text}" for text, views in problems.items()],
        )
    return [
        f"view {', '.join(views)}: features differ from those that the head was fitted on in {text}"
        for text, views in notes.items()
    ]


def list_blocks(blocks: list[tuple[str, str, tuple[int, ...]]]) -> str:
    """`frontal penultimate@none (1024,), ...`."""
    return ", ".join(f"{view} {tap} {shape}" for view, tap, shape in blocks)


def fit_head(
    dataset: FeatureDataset,
    *,
    head: str = "fc",
    out: str | Path | None = None,
    split: str = "auto",
    group: str | None = None,
    seed: int = 0,
    valid: float = 0.15,
    test: float = 0.15,
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
    files: Mapping[str, str] | None = None,
) -> HeadRun:
    """Fit a head on a dataset and write a run.

    Args:
        dataset: with a target.
        head: `fc`, `logistic`, `xgboost` or a registered one.
        out: run directory; default `runs/<dataset>-<target>-<head>-<n>`.
        split: `auto`, or a column that holds train, valid or test.
        group: column of what must stay on one side; default the column `group` where there is one.
        seed: of the split and of the head.
        valid: share of the samples for early stopping and threshold.
        test: share of the samples for the figures that count.
        settings: the head's own.
        device: where the head computes.
        overwrite: replace an existing run.
        bootstrap: resamples of the groups per interval.
        at: decide at a fixed sensitivity or specificity, as in `sensitivity=0.95`; default Youden's J. The threshold is
            chosen on validation.
        calibrate: `temperature` or `isotonic`: put probabilities right, fitted on validation only.
        config: recorded in the run, as the command line gave it.
        command: recorded in the run.
        reporter: told of epochs or rounds.
        extra: more entries of run.json, such as how the settings were found.
        files: more files of the run, by name.

    Raises:
        InputError: no target, no way to split, unknown head or setting, an existing run.
    """
    reporter = reporter or Silent()
    target = target_of(dataset)
    decide_at = check_decision(target, at, calibrate)
    divide = SplitConfig.create(
        {"split": split, "group": group, "seed": seed, "valid": valid, "test": test}, source="split"
    )
    estimator = get_head(head)(settings or {}, seed=seed, device=torch_device(device), memory=dataset.memory)
    source = dataset.binding.manifest_path
    splits = make_splits(dataset.table, target, divide, content=dataset.content, source=source)
    if not (splits == "valid").any() and (decide_at is not None or calibrate is not None):
        wanted = f"--at {decide_at}" if decide_at is not None else f"--calibrate {calibrate}"
        raise InputError(f"{source}: {wanted} needs validation samples, and column {split!r} marks none")
    groups = sample_groups(dataset.table, divide.group)
    path = Path(out) if out is not None else default_run_path(dataset.binding.name, target.names, head)
    with RunWriter(path, kind="head", overwrite=overwrite) as writer:
        start = time.perf_counter()
        fit_rows(estimator, dataset, splits, reporter)
        seconds = round(time.perf_counter() - start, 3)
        scores = estimator.score_rows(dataset.features)
        scores, calibration = calibrated(target, scores, splits, calibrate)
        estimator.save(writer.path)
        write_importance(writer.path, estimator)
        for name, text in (files or {}).items():
            (writer.path / name).write_text(text, encoding="utf-8")
        results = write_results(
            writer.path,
            target=target,
            scores=scores,
            splits=splits,
            groups=groups,
            sample_ids=dataset.sample_ids,
            views=dataset.views,
            present=dataset.present,
            history=estimator.history_,
            bootstrap=bootstrap,
            seed=seed,
            at=decide_at,
        )
        run = finish_run(
            writer,
            {
                **dataset_record(dataset, divide),
                **head_record(estimator, results.threshold, calibration),
                "command": command,
                "config": dict(config or {"head": head, **divide.model_dump(mode="json")}),
                "seconds_fit": seconds,
                **dict(extra or {}),
            },
        )
    return HeadRun(run.path, run.record)


def target_of(dataset: FeatureDataset) -> Target:
    """The dataset's target, refused where there is none."""
    if dataset.target is None:
        raise InputError("the dataset has no target: give target=COLUMN")
    return dataset.target


def check_decision(target: Target, at: str | None, calibrate: Method | None) -> At | None:
    """What `at` says; refuses what the task has no use for before anything is fitted.

    Raises:
        InputError: a task without a threshold or without probabilities, an unknown figure or method.
    """
    if calibrate is not None:
        check_method(calibrate, target.task)
    if at is None:
        return None
    wanted = At.parse(at)
    wanted.check_task(target.task)
    return wanted


def calibrated(
    target: Target, scores: NDArray[np.float64], splits: NDArray[np.str_], method: Method | None
) -> tuple[NDArray[np.float64], Calibration | None]:
    """Scores (n, ...) put right by what their validation rows say, and how."""
    if method is None:
        return scores, None
    rows = np.flatnonzero(splits == "valid")
    calibration = fit_calibration(target.subset(rows), scores[rows], method)
    return calibration.apply(scores, exclusive=bool(target.classes)), calibration


def head_record(head: Head, threshold: Mapping[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    """What run.json says of the head."""
    return {
        "head": {"name": head.name, "settings": head.settings.model_dump(mode="json")},
        "skipped": list(head.skipped_),
        "threshold": threshold,
        "calibration": calibration.to_json() if calibration is not None else None,
    }


def dataset_record(dataset: FeatureDataset, divide: SplitConfig) -> dict[str, Any]:
    """What run.json says of the data: target, views, recipes, and all that `predict` needs for new samples."""
    target = target_of(dataset)
    unread = {name for ids in dataset.failed.values() for name in ids} - set(dataset.sample_ids.tolist())
    return {
        "task": target.task,
        "classes": list(target.classes),
        "targets": list(target.names),
        "views": list(dataset.views),
        "recipes": recorded_recipes(dataset),
        "binding": {"dataset": dataset.binding.name, "digest": dataset.binding.digest},
        "split": {**divide.model_dump(mode="json"), "group": group_column(dataset.table, divide.group)},
        "tap": {view: [b.tap for b in dataset.blocks if b.view == view] for view in dataset.views},
        "body_config": body_options(dataset),
        "manifest_config": dict(dataset.binding.config.get("manifest", {})),
        "target_config": dataset.target_config,
        "replicas": dataset.replicas.to_json() if dataset.replicas is not None else None,
        "n_dropped": dataset.n_dropped - len(unread),
        "n_failed": len(unread),
        "failed_views": {view: len(ids) for view, ids in dataset.failed.items() if ids},
    }


def open_dataset(config: FitConfig) -> FeatureDataset:
    """The dataset that a configuration of stage two names."""
    return FeatureDataset(
        config.store,
        dataset=config.dataset,
        target=config.target,
        views=config.views or None,
        tap=config.tap or None,
        recipe=config.recipe or None,
        task=config.task,
        uncertain=config.uncertain,
        missing=config.missing,
        allow_partial=config.allow_partial,
        manifest=config.manifest,
        memory=config.memory,
        replicas=config.replicas,
    )


def fit_rows(head: Head, dataset: FeatureDataset, splits: NDArray[np.str_], reporter: Reporter) -> None:
    """Fit on the training rows and their replicas, with the validation rows beside; test rows are never looked at."""
    rows = {side: np.flatnonzero(splits == side).astype(np.int64) for side in ("train", "valid")}
    train = training_fold(dataset, rows["train"], dataset.features)
    valid = Fold(dataset.features, rows["valid"], target_of(dataset).subset(rows["valid"]))
    task = f"fit {head.name}"
    reporter.begin(task, None, "steps")

    def told(row: Mapping[str, Any]) -> None:
        figures = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
        reporter.advance(task, 1, status=", ".join(figures))

    head.fit(train, valid if len(valid) else None, progress=told)
    reporter.end(task)


def training_fold(dataset: FeatureDataset, rows: NDArray[np.int64], features: Features) -> Fold:
    """Rows of `features` (the dataset's, wherever they are held) to train on, and their replicas where there are."""
    target = target_of(dataset)
    if dataset.replicas is None:
        return Fold(features, rows, target.subset(rows))
    every, owners = dataset.replicas.rows_of(rows)
    return Fold(dataset.replicas.features, every, target.subset(owners))


def body_options(dataset: FeatureDataset) -> dict[str, Any]:
    """How the dataset's bodies were named, so that new samples can go through them; `predict` finds the files again."""
    config = dataset.binding.config
    options = dict(config.get("body", {}))
    for option, prefix in (("weights", ""), ("body", RUN_PREFIX)):
        options[option] = {
            view: absolute(value, prefix) for view, value in options.get(option, {}).items() if view in dataset.views
        }
    return {**options, "seed": config.get("seed")}


def absolute(value: str, prefix: str) -> str:
    """A path as it will be found from elsewhere (the record makes it relative to the run), any other name as it is."""
    path = Path(value.removeprefix(prefix))
    there = value.startswith(prefix) and (path.is_dir() if prefix else path.is_file())
    return f"{prefix}{path.resolve()}" if there else value


def recorded_recipes(dataset: FeatureDataset) -> dict[str, dict[str, Any]]:
    """Per view the whole recipe and its digest."""
    return {view: {"digest": recipe.digest, "recipe": recipe.to_json()} for view, recipe in dataset.recipes.items()}


def torch_device(device: str) -> str:
    """`auto` as the name of a device that is there."""
    from featurecache.bodies.engines import resolve_device

    return str(resolve_device(device))
