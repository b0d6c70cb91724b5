"""What a head's run keeps beside the results: where the data came from, how many were left out, how to do it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.bodies.registry import RUN_PREFIX
from featurecache.config import About, HeadConfig, SplitConfig
from featurecache.data.dense import DenseTarget
from featurecache.data.splits import group_column
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluation.calibration import Calibration
from featurecache.heads.base import Head
from featurecache.heads.importance import write_importance
from featurecache.reporting.thumbnails import Pictures
from featurecache.run import Run, RunWriter, default_run_path
from featurecache.rundir.densefit import write_pictures
from featurecache.rundir.densepredictions import DensePredictions
from featurecache.rundir.files import ABOUT
from featurecache.rundir.flow import flow_record
from featurecache.rundir.mistakes import write_mistakes
from featurecache.rundir.notes import run_notes
from featurecache.rundir.predictions import Predictions
from featurecache.rundir.results import Results, finish_run


@dataclass(frozen=True)
class Beside:
    """What a run keeps beside what fitting it finds out.

    Attributes:
        command: the command line.
        config: recorded in its place: the configuration as it was given.
        extra: more entries of run.json, such as how the settings were found.
        files: gives more files of the run, by name, once all is fitted.
    """

    command: str = ""
    config: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    files: Callable[[], Mapping[str, str]] | None = None


NOTHING = Beside()


def finish_head(
    writer: RunWriter,
    dataset: FeatureDataset,
    head: Head,
    config: HeadConfig,
    beside: Beside,
    results: Results,
    calibration: Calibration | None,
    record: Mapping[str, Any],
    sides: NDArray[Any],
    about: str,
    single: Mapping[str, NDArray[np.float64]],
) -> Run:
    """Save the head and what the report shows beside results that are written already, and publish the run.

    Args:
        writer: of the run.
        dataset: that it was fitted on.
        head: fitted.
        config: how.
        beside: what the run keeps besides.
        results: as written.
        calibration: of the head's probabilities.
        record: more entries of run.json, before those of `beside`.
        sides: (n,) the split of each sample, or the fold that tested it; '' where it is not used.
        about: text of about.toml, or ''.
        single: by view, scores of the test samples where the head gets that view alone.
    """
    head.save(writer.path)
    write_importance(writer.path, head)
    for name, text in {ABOUT: about, **(beside.files() if beside.files is not None else {})}.items():
        if text:
            (writer.path / name).write_text(text, encoding="utf-8")
    if isinstance(results.predictions, DensePredictions) and isinstance(dataset.target, DenseTarget):
        pictures = Pictures(dataset.binding, dataset.recipes)
        write_pictures(writer.path, results.predictions, dataset.target, pictures.seen, images=config.images)
    else:
        write_mistakes(
            writer.path, results.predictions, results.threshold, single, images=config.images,
            pictures=lambda: Pictures(dataset.binding, dataset.recipes),
        )  # fmt: skip
    divide = SplitConfig.create(config.fields_of(SplitConfig))
    return finish_run(
        writer,
        {
            **dataset_record(dataset, divide),
            **flow_of(dataset, divide, results.predictions, sides),
            **head_record(head, results.threshold, calibration),
            **record,
            "command": beside.command,
            "config": dict(beside.config or config.model_dump(mode="json", exclude_none=True)),
            **beside.extra,
        },
    )


def run_path(dataset: FeatureDataset, config: HeadConfig) -> Path:
    """Where the run goes: as told, or the next free name."""
    return config.out or default_run_path(dataset.binding.name, target_of(dataset).names, config.head)


def target_of(dataset: FeatureDataset) -> Target:
    """The dataset's target, refused where there is none."""
    if dataset.target is None:
        raise InputError("the dataset has no target: give target=COLUMN")
    return dataset.target


def refuse_dense(target: Target, what: str) -> None:
    """Refuse masks where samples are scored.

    Raises:
        InputError: the target is one of masks.
    """
    if target.task == "dense":
        raise InputError(f"{what}: not for masks ({target.names[0]}): a dense target is fitted on one division only")


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
        "binding": {
            "dataset": dataset.binding.name,
            "digest": dataset.binding.digest,
            "manifest_digest": dataset.binding.manifest_digest,
        },
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


def flow_of(
    dataset: FeatureDataset, divide: SplitConfig, predictions: Predictions, sides: NDArray[Any]
) -> dict[str, Any]:
    """`flow_record` of a dataset whose samples all have predictions, notes on it, and what became of missing views."""
    found = flow_record(
        dataset.binding.table,
        divide.group,
        ids=predictions.sample_ids.tolist(),
        groups=predictions.groups,
        known=predictions.known(),
        splits=predictions.splits,
        sides=sides,
        content=dataset.content,
        unreadable={name for names in dataset.failed.values() for name in names},
        targets=target_of(dataset).names,
    )
    notes = run_notes(found, target_of(dataset), str(dataset.target_config["task"]))
    return {**found, "notes": notes, "missing": dataset.missing}


def read_about(path: Path | None) -> str:
    """What a TOML file says that only a person can state, as TOML; '' without one.

    Raises:
        InputError: an unknown key; names the near one.
    """
    return About.from_toml(path).to_toml() if path is not None else ""


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
