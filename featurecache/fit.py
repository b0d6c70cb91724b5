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

from featurecache.config import FitConfig, HeadConfig
from featurecache.data.dense import DENSE, DenseTarget
from featurecache.data.splits import sample_groups
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.division import divide
from featurecache.errors import InputError, RecipeMismatchError
from featurecache.evaluation.calibration import Calibration, Method, check_method, fit_calibration
from featurecache.evaluation.threshold import At
from featurecache.features.features import Features
from featurecache.features.rearranged import WithoutView
from featurecache.fusion import get_fusion
from featurecache.heads.base import Fold, Head, get_head, load_head
from featurecache.heads.decoder import DecoderHead, is_dense
from featurecache.progress import Reporter, Silent
from featurecache.run import Run, RunWriter
from featurecache.rundir.densefit import Counted, count_masks, kept
from featurecache.rundir.fitrecord import NOTHING, Beside, finish_head, read_about, run_path, target_of
from featurecache.rundir.mistakes import single_views
from featurecache.rundir.recorded import read_recipe, recipe_differences
from featurecache.rundir.results import write_results
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
    command: str = "",
    config: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> HeadRun:
    """`fit_once` with the fields of `featurecache.config.HeadConfig` as keyword arguments.

    Args:
        dataset: with a target.
        command: recorded in the run.
        config: recorded in the run in the place of the options.
        reporter: told of epochs or rounds.
        options: see `featurecache.fit_head`.
    """
    return fit_once(dataset, HeadConfig.create(options, source="fit_head"), Beside(command, config), reporter=reporter)


def fit_once(
    dataset: FeatureDataset, config: HeadConfig, beside: Beside = NOTHING, *, reporter: Reporter | None = None
) -> HeadRun:
    """Fit a head on one division of the samples and write a run.

    The decision threshold is chosen on validation samples, and so is a calibration.

    Raises:
        InputError: no target, no way to split, unknown head or setting, an existing run.
    """
    reporter = reporter or Silent()
    target = target_of(dataset)
    get_head(config.head).check_task(target.task)
    decide_at = check_decision(target, config.at, config.calibrate)
    about = read_about(config.about)
    estimator = get_head(config.head)(
        config.settings, seed=config.seed, device=torch_device(config.device), memory=dataset.memory
    )
    source = dataset.binding.manifest_path
    splits = divide(dataset, config)
    if not (splits == "valid").any() and (decide_at is not None or config.calibrate is not None):
        wanted = f"--at {decide_at}" if decide_at is not None else f"--calibrate {config.calibrate}"
        raise InputError(f"{source}: {wanted} needs validation samples, and column {config.split!r} marks none")
    groups = sample_groups(dataset.table, config.group)
    with RunWriter(run_path(dataset, config), kind="head", overwrite=config.overwrite) as writer:
        start = time.perf_counter()
        fit_rows(estimator, dataset, splits, reporter)
        seconds = round(time.perf_counter() - start, 3)
        said, calibration = predicted(estimator, dataset, splits, config.calibrate, writer.path)
        results = write_results(
            writer.path,
            target=said.target,
            scores=said.scores,
            splits=splits,
            groups=groups,
            sample_ids=dataset.sample_ids,
            views=dataset.views,
            present=dataset.present,
            history=estimator.history_,
            bootstrap=config.bootstrap,
            seed=config.seed,
            at=decide_at,
            masks=said.files,
        )
        single = views_alone(estimator, dataset, splits, calibration)
        run = finish_head(
            writer, dataset, estimator, config, beside, results, calibration,
            {"seconds_fit": seconds}, splits, about, single,
        )  # fmt: skip
    return HeadRun(run.path, run.record)


def predicted(
    head: Head, dataset: FeatureDataset, splits: NDArray[np.str_], calibrate: Method | None, directory: Path
) -> tuple[Counted, Calibration | None]:
    """What a head says of all samples, as `write_results` takes it; masks are written into the directory of the run."""
    target = target_of(dataset)
    if isinstance(target, DenseTarget) and isinstance(head, DecoderHead):
        said = head.mask_rows(dataset.features)
        ids = dataset.sample_ids
        return count_masks(said, target, directory=directory, sample_ids=ids, written=kept(splits)), None
    scores, calibration = calibrated(target, head.score_rows(dataset.features), splits, calibrate)
    return Counted(target, scores, []), calibration


def views_alone(
    head: Head, dataset: FeatureDataset, splits: NDArray[np.str_], calibration: Calibration | None
) -> dict[str, NDArray[np.float64]]:
    """By view the scores (n, outputs) where the head gets that view alone; see `single_views`."""

    def ask(number: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        features: Features = dataset.features
        for other in dataset.views:
            features = features if other == dataset.views[number] else WithoutView(features, other)
        said = head.score_rows(features, rows)
        return said if calibration is None else calibration.apply(said, exclusive=bool(target_of(dataset).classes))

    return single_views(dataset.views, dataset.present, splits, len(head.outputs), ask)


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


def open_dataset(config: FitConfig) -> FeatureDataset:
    """The dataset that a configuration of stage two names."""
    task = DENSE if config.task == "auto" and is_dense(get_head(config.head)) else config.task
    return FeatureDataset(
        config.store,
        dataset=config.dataset,
        target=config.target,
        views=config.views or None,
        tap=config.tap or None,
        recipe=config.recipe or None,
        task=task,
        uncertain=config.uncertain,
        masks=config.masks,
        missing=config.missing,
        allow_partial=config.allow_partial,
        manifest=config.manifest,
        memory=config.memory,
        replicas=config.replicas,
    )


# What the settings of a head call its rounds, and what a person does; `None` where it may end long before.
ROUNDS = {"epochs": "epochs", "n_estimators": "rounds"}


def fit_rows(head: Head, dataset: FeatureDataset, splits: NDArray[np.str_], reporter: Reporter) -> None:
    """Fit on the training rows and their replicas, with the validation rows beside; test rows are never looked at."""
    check_fusion(head, dataset)
    rows = {side: np.flatnonzero(splits == side).astype(np.int64) for side in ("train", "valid")}
    train = training_fold(dataset, rows["train"], dataset.features)
    valid = Fold(dataset.features, rows["valid"], target_of(dataset).subset(rows["valid"]))
    task, rounds = f"fit {head.name}", next((name for name in ROUNDS if hasattr(head.settings, name)), None)
    reporter.begin(task, getattr(head.settings, rounds) if rounds else None, ROUNDS[rounds] if rounds else "steps")

    def told(row: Mapping[str, Any]) -> None:
        figures = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
        reporter.advance(task, 1, status=", ".join(figures))

    head.fit(train, valid if len(valid) else None, progress=told)
    reporter.end(task)


def check_fusion(head: Head, dataset: FeatureDataset) -> None:
    """Refuse views whose images don't correspond as the head's fusion needs them to.

    Raises:
        InputError: says how they were brought to size.
    """
    name = getattr(head.settings, "fusion", None)
    if name is not None:
        recipes = {view: recipe.fields["preprocessing"] for view, recipe in dataset.recipes.items()}
        get_fusion(name).check_preprocessing(recipes)


def training_fold(dataset: FeatureDataset, rows: NDArray[np.int64], features: Features) -> Fold:
    """Rows of `features` (the dataset's, wherever they are held) to train on, and their replicas where there are."""
    target = target_of(dataset)
    if target.task == "dense" and dataset.replicas is not None:
        raise InputError("masks lie on the plain images only: give --replicas none")
    if dataset.replicas is None:
        return Fold(features, rows, target.subset(rows))
    every, owners = dataset.replicas.rows_of(rows)
    return Fold(dataset.replicas.features, every, target.subset(owners))


def torch_device(device: str) -> str:
    """`auto` as the name of a device that is there."""
    from featurecache.bodies.engines import resolve_device

    return str(resolve_device(device))
