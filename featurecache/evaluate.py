"""Measures a run on new labelled samples, into RUN/evaluations/; the run's own files stay as they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from featurecache.data.manifest import read_manifest
from featurecache.data.splits import sample_groups
from featurecache.data.targets import Target, read_target
from featurecache.errors import InputError
from featurecache.newsamples import NewSamples, is_table, manifest_config
from featurecache.predict import Scored, score_samples
from featurecache.progress import Reporter
from featurecache.record import dump_json
from featurecache.results import make_predictions, measure
from featurecache.run import Run

FOLDER = "evaluations"
SPLIT = "test"  # new samples are all test samples
NO_THRESHOLD = {"value": None}


@dataclass(frozen=True)
class Evaluation:
    """Where an evaluation was written, its metrics (all under `test`) and what was scored."""

    path: Path
    metrics: dict[str, Any]
    scored: Scored


def evaluate(
    run: Run, new: NewSamples, *, bootstrap: int = 1000, reporter: Reporter | None = None, seed: int = 0
) -> Evaluation:
    """Score new samples and compare with their labels, by the run's own threshold.

    Writes metrics.json, predictions.csv and evaluation.json into RUN/evaluations/<stem of the manifest>/, in the place
    of what an earlier evaluation of that name left.

    Raises:
        InputError: no manifest was given, it lacks the target, or holds a class that the run does not know.
        RecipeMismatchError: see `predict`.
    """
    if len(new.sources) != 1 or not is_table(new.sources[0]):
        raise InputError(
            f"{new.sources[0]}: labels are needed: give a manifest or a folder with a sub-folder per class"
        )
    table, target = read_labels(run, new)  # before anything is computed
    scored = score_samples(run, new, reporter)
    row_of = {name: row for row, name in enumerate(table["sample_id"].to_list())}
    target = target.subset(np.array([row_of[name] for name in scored.sample_ids.tolist()], dtype=np.int64))
    if not target.known.any():
        raise InputError(f"{new.sources[0]}: no sample with a label has an image that can be read")
    group = (run.record.get("split") or {}).get("group")
    predictions = make_predictions(
        target,
        scored.scores,
        sample_ids=scored.sample_ids,
        groups=sample_groups(scored.table, group if group in scored.table.columns else None),
        splits=[SPLIT] * len(scored.sample_ids),
        views=run.views,
        present=scored.present,
    )
    threshold = run.threshold or NO_THRESHOLD
    metrics = measure(predictions, threshold, bootstrap=bootstrap, seed=seed)
    source = Path(os.path.abspath(new.sources[0]))
    path = run.path / FOLDER / source.stem
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        made = Path(scratch) / path.name
        made.mkdir()
        predictions.table(threshold["value"]).write_csv(made / "predictions.csv")
        (made / "metrics.json").write_text(dump_json(metrics), encoding="utf-8")
        figures = {"manifest": source.name, "n": len(scored.sample_ids), "failed": scored.failures}
        (made / "evaluation.json").write_text(dump_json({"schema": 1, **figures}), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.replace(made, path)
    return Evaluation(path, metrics, scored)


def read_labels(run: Run, new: NewSamples) -> tuple[pl.DataFrame, Target]:
    """The table of the new samples and the run's target in it."""
    with tempfile.TemporaryDirectory(prefix="featurecache-") as scratch:
        table = read_manifest(manifest_config(run, new, Path(scratch))).table
    target = read_target(
        table,
        run.targets,
        task=run.task,
        uncertain=(run.record.get("target_config") or {}).get("uncertain", {}),
        source=Path(new.sources[0]).name,
        classes=run.classes or None,
    )
    return table, target
