"""Measures a run on new labelled samples, into RUN/evaluations/; the run's own files stay as they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurecache.data.splits import sample_groups
from featurecache.data.targets import read_target
from featurecache.predict import NewSamples, Scored, score_samples
from featurecache.progress import Reporter
from featurecache.record import dump_json
from featurecache.results import make_predictions, measure
from featurecache.run import Run

FOLDER = "evaluations"
SPLIT = "test"  # new samples are all test samples


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
        InputError: the manifest lacks the target, or holds a class that the run does not know.
        RecipeMismatchError: see `predict`.
    """
    scored = score_samples(run, new, reporter)
    recorded = run.record["target_config"]
    target = read_target(
        scored.table,
        run.targets,
        task=run.task,
        uncertain=recorded.get("uncertain", {}),
        source=Path(new.sources[0]).name,
        classes=run.classes or None,
    )
    group = run.record["split"].get("group")
    groups = sample_groups(scored.table, group if group in scored.table.columns else None)
    predictions = make_predictions(
        target,
        scored.scores,
        sample_ids=scored.sample_ids,
        groups=groups,
        splits=[SPLIT] * len(scored.sample_ids),
        views=run.views,
        present=scored.present,
    )
    metrics = measure(predictions, run.threshold, bootstrap=bootstrap, seed=seed)
    path = run.path / FOLDER / Path(new.sources[0]).stem
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        made = Path(scratch) / path.name
        made.mkdir()
        predictions.table(run.threshold["value"] if run.threshold else None).write_csv(made / "predictions.csv")
        (made / "metrics.json").write_text(dump_json(metrics), encoding="utf-8")
        figures = {"manifest": Path(new.sources[0]).name, "n": len(scored.sample_ids), "failed": scored.failures}
        (made / "evaluation.json").write_text(dump_json({"schema": 1, **figures}), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.replace(made, path)
    return Evaluation(path, metrics, scored)
