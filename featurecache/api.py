"""The Python API: the stages as functions of keyword arguments, the same configuration as the command line's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from featurecache.calls import also, call_text, journaled
from featurecache.config import ExtractConfig, FitConfig, HeadConfig, JointConfig
from featurecache.crossval import fit_dataset
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, did_you_mean
from featurecache.evaluate import Evaluation, evaluate_own
from featurecache.evaluate import evaluate as run_evaluate
from featurecache.extract import Summary
from featurecache.extract import extract as run_extract
from featurecache.fit import HeadRun
from featurecache.joint.finetune import finetune_joint as run_joint
from featurecache.newsamples import NewSamples
from featurecache.predict import Scored
from featurecache.predict import predict as run_predict
from featurecache.progress import Reporter
from featurecache.run import Run
from featurecache.run import load_run as open_run
from featurecache.rundir.fitrecord import Beside
from featurecache.stageone.dryrun import Plan
from featurecache.stageone.dryrun import plan_extract as run_plan
from featurecache.tune import tune as run_tune

__all__ = ["evaluate", "extract", "finetune_joint", "fit_head", "load_run", "plan_extract", "predict", "tune"]


@journaled("store")
def extract(manifest: str | Path, *, store: str | Path, reporter: Reporter | None = None, **options: Any) -> Summary:
    """Stage one.

    Args:
        manifest: CSV or Parquet table, or image folder.
        store: path of the store.
        reporter: told of progress.
        options: fields of `featurecache.config.ExtractConfig`: `views={"frontal": "frontal_path"}`, `body=...`, ...

    Raises:
        InputError: an option, the manifest or a body is not valid.
    """
    return run_extract(ExtractConfig.create({"manifest": manifest, "store": store, **options}), reporter)


def plan_extract(manifest: str | Path, *, store: str | Path, reporter: Reporter | None = None, **options: Any) -> Plan:
    """What `extract` would do: counts per view of what is reused and to be computed, and why. Writes nothing.

    Args:
        manifest: as for `extract`.
        store: path of the store; need not be there.
        reporter: told of progress.
        options: as for `extract`.

    Raises:
        InputError: as `extract` would.
    """
    return run_plan(ExtractConfig.create({"manifest": manifest, "store": store, **options}), reporter)


@journaled("store")
def finetune_joint(manifest: str | Path, *, reporter: Reporter | None = None, **options: Any) -> Run:
    """Bodies and head as one network.

    Args:
        manifest: as for `extract`.
        reporter: told of progress.
        options: fields of `featurecache.config.JointConfig`: `target=("label",)`, `init="runs/fc"`, `epochs=5`, ...

    Raises:
        InputError: an option, the manifest or the run to start from is not valid.
    """
    target = options.get("target")
    if isinstance(target, str):
        options["target"] = (target,)
    if (out := options.get("out")) is not None:
        also(Path(out).with_name(f"{Path(out).name}.tmp"))  # what `resume` goes on from
    return run_joint(JointConfig.create({"manifest": manifest, **options}), command=call_text(), reporter=reporter)


@journaled("dataset")
def fit_head(
    dataset: FeatureDataset, *, cv: int | None = None, reporter: Reporter | None = None, **options: Any
) -> HeadRun:
    """Fit a head on cached features, measure it and write a run.

    Args:
        dataset: with a target.
        cv: folds of a cross-validation, in the place of one division of the samples.
        reporter: told of epochs or rounds.
        options: fields of `featurecache.config.HeadConfig`: `head` (`fc`, `logistic`, `xgboost` or a registered one),
            `out` (default `runs/<dataset>-<target>-<head>-<n>`), `overwrite`, `settings` of the head, `split` (`auto`
            or a column that holds train, valid or test), `group` (column of what must stay on one side), `seed` of
            split and head, `valid` and `test` (shares of the samples), `device`, `bootstrap` (resamples per interval),
            `at` (decide at `sensitivity=0.95`, say; default Youden's J), `calibrate` (`temperature` or `isotonic`),
            `images` (how many mistakes the report shows with pictures, or `none`), `about` (a TOML file that says what
            only a person can state).

    Returns:
        The run; `record["notes"]` lists what to look at again: patients torn by the split, a class called `unknown`.

    Raises:
        InputError: an option is not valid, there is no target or no way to split, the run exists.
    """
    for name in set(options) - set(HeadConfig.model_fields):
        if name in signature(FeatureDataset).parameters:
            raise InputError(f"fit_head: {name!r} is said of the dataset: give it to FeatureDataset, as {name}=...")
    return fit_dataset(
        dataset, HeadConfig.create(options, source="fit_head"), Beside(command=call_text()), cv=cv, reporter=reporter
    )


def load_run(path: str | Path) -> Run:
    """Open a run after checking every file of it; a head run (`HeadRun`) can `predict_proba` a FeatureDataset.

    Raises:
        MissingFileError: there is no such directory.
        RunError: it is no run, or a file is missing, changed or unlisted.
    """
    run = open_run(path)
    return HeadRun(run.path, run.record) if run.kind == "head" else run


@journaled("run", "store")
def predict(
    run: Run | str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> Scored:
    """Predict new samples into a .csv or .parquet file.

    Args:
        run: a run, or its directory.
        sources: a manifest, or image files (`VIEW=FILE` where the run has several views).
        out: the file to write.
        reporter: told of progress.
        options: fields of `featurecache.predict.NewSamples`: `store=...`, `device=...`, ...
    """
    return run_predict(run, new_samples(sources, options), out, reporter)[0]


@journaled("run", "store")
def evaluate(
    run: Run | str | Path,
    manifest: str | Path | None = None,
    *,
    by: str | None = None,
    table: str | Path | None = None,
    at: str | None = None,
    bootstrap: int = 1000,
    images: int | Literal["none"] = 12,
    reporter: Reporter | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a run on new labelled samples, or its own test samples by subgroups or at another threshold.

    Args:
        run: a run, or its directory.
        manifest: new samples; None measures the run's own test samples again, which computes nothing.
        by: a column of the manifest (or of `table`): each of its values is measured on its own, too.
        table: without a manifest, where that column is, by the column `id` (default `sample_id`).
        at: `sensitivity=0.95` or `specificity=0.9`: decide there, as chosen on the run's own validation samples.
        bootstrap: resamples of the groups per interval; 0 for none.
        images: how many mistakes of new samples the page shows with their pictures, or `none`.
        reporter: told of progress.
        options: as for `predict`.
    """
    opened = opened_run(run)
    if manifest is None:
        return evaluate_own(
            opened, by=by, table=table, id=options.get("id"), at=at, bootstrap=bootstrap, command=call_text()
        )
    new = new_samples(manifest, options)
    return run_evaluate(
        opened, new, by=by, at=at, bootstrap=bootstrap, images=images, command=call_text(), reporter=reporter
    )


@journaled("store")
def tune(
    store: str | Path,
    *,
    dataset: str,
    target: str | Sequence[str],
    head: str = "logistic",
    trials: int = 50,
    metric: str | None = None,
    jobs: int = 1,
    reporter: Reporter | None = None,
    **options: Any,
) -> HeadRun:
    """Search a head's settings on validation samples, fit it with the best, and write a run with trials.csv in it.

    Args:
        store: path of the store.
        dataset: its name there.
        target: the column to predict, or several.
        head: its `search_space` is searched, but for what `settings` fix.
        trials: how many in all; those of an earlier, unfinished attempt count.
        metric: by which they are ranked on validation; default AUROC, for several classes accuracy, for numbers R2.
        jobs: trials at a time.
        reporter: told of each trial.
        options: fields of `featurecache.config.FitConfig`: `out`, `settings`, `views`, `split`, `cv`, ...

    Raises:
        InputError: Optuna is not installed, an option is not valid, or there is nothing to search.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    values = {"store": store, "dataset": dataset, "target": targets, "head": head, **options}
    config = FitConfig.create(values, source="tune")
    return run_tune(config, trials=trials, metric=metric, jobs=jobs, command=call_text(), reporter=reporter)[0]


def opened_run(run: Run | str | Path) -> Run:
    """A run as it is, or the one in a directory."""
    return run if isinstance(run, Run) else load_run(run)


def new_samples(sources: str | Path | Sequence[str | Path], options: dict[str, Any]) -> NewSamples:
    """Sources and options as `NewSamples`."""
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    known = [field.name for field in fields(NewSamples) if field.name != "sources"]
    for name in options:
        if name not in known:
            raise InputError(f"unknown option {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    store = options.get("store")
    return NewSamples(
        tuple(str(source) for source in listed), **{**options, "store": None if store is None else Path(store)}
    )
