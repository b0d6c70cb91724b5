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
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, RecipeMismatchError
from featurecache.heads.base import Fold, Head, get_head, load_head
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
        return self.head.score_rows(dataset.features)


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
    config: Mapping[str, Any] | None = None,
    command: str = "",
    reporter: Reporter | None = None,
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
        config: recorded in the run, as the command line gave it.
        command: recorded in the run.
        reporter: told of epochs or rounds.

    Raises:
        InputError: no target, no way to split, unknown head or setting, an existing run.
    """
    if dataset.target is None:
        raise InputError("the dataset has no target: give target=COLUMN")
    reporter = reporter or Silent()
    target = dataset.target
    divide = SplitConfig.create(
        {"split": split, "group": group, "seed": seed, "valid": valid, "test": test}, source="split"
    )
    estimator = get_head(head)(settings or {}, seed=seed, device=torch_device(device), memory=dataset.memory)
    source = dataset.binding.manifest_path
    splits = make_splits(dataset.table, target, divide, content=dataset.content, source=source)
    groups = sample_groups(dataset.table, divide.group)
    unread = {name for ids in dataset.failed.values() for name in ids} - set(dataset.sample_ids.tolist())
    path = Path(out) if out is not None else default_run_path(dataset.binding.name, target.names, head)
    with RunWriter(path, kind="head", overwrite=overwrite) as writer:
        start = time.perf_counter()
        fit_rows(estimator, dataset, splits, reporter)
        seconds = round(time.perf_counter() - start, 3)
        scores = estimator.score_rows(dataset.features)
        estimator.save(writer.path)
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
        )
        run = finish_run(
            writer,
            {
                "command": command,
                "config": dict(config or {"head": head, **divide.model_dump(mode="json")}),
                "task": target.task,
                "classes": list(target.classes),
                "targets": list(target.names),
                "views": list(dataset.views),
                "recipes": recorded_recipes(dataset),
                "head": {"name": head, "settings": estimator.settings.model_dump(mode="json")},
                "skipped": list(estimator.skipped_),
                "threshold": results.threshold,
                "binding": {"dataset": dataset.binding.name, "digest": dataset.binding.digest},
                "split": {**divide.model_dump(mode="json"), "group": group_column(dataset.table, divide.group)},
                "tap": {view: [b.tap for b in dataset.blocks if b.view == view] for view in dataset.views},
                "body_config": body_options(dataset),
                "manifest_config": dict(dataset.binding.config.get("manifest", {})),
                "target_config": dataset.target_config,
                "seconds_fit": seconds,
                "n_dropped": dataset.n_dropped - len(unread),
                "n_failed": len(unread),
                "failed_views": {view: len(ids) for view, ids in dataset.failed.items() if ids},
            },
        )
    return HeadRun(run.path, run.record)


def fit_from_config(config: FitConfig, *, command: str = "", reporter: Reporter | None = None) -> HeadRun:
    """What `featurecache fit-head` does."""
    dataset = FeatureDataset(
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
    )
    return fit_head(
        dataset,
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
        config=config.model_dump(mode="json", exclude_none=True),
        command=command,
        reporter=reporter,
    )


def fit_rows(head: Head, dataset: FeatureDataset, splits: NDArray[np.str_], reporter: Reporter) -> None:
    """Fit on the training rows with the validation rows beside; test rows are never looked at."""
    assert dataset.target is not None

    def fold(name: str) -> Fold:
        rows = np.flatnonzero(splits == name).astype(np.int64)
        return Fold(dataset.features, rows, dataset.target.subset(rows))  # type: ignore[union-attr]

    task = f"fit {head.name}"
    reporter.begin(task, None, "steps")

    def told(row: Mapping[str, Any]) -> None:
        figures = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
        reporter.advance(task, 1, status=", ".join(figures))

    valid = fold("valid")
    head.fit(fold("train"), valid if len(valid) else None, progress=told)
    reporter.end(task)


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
