"""Measures a run on new labelled samples or by subgroups of its own, into RUN/evaluations/; its own files stay."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from featurecache.amounts import metric_line
from featurecache.config import ManifestConfig
from featurecache.data.dense import DenseTarget
from featurecache.data.manifest import read_manifest
from featurecache.data.preprocessing import Preprocessing
from featurecache.data.splits import sample_groups
from featurecache.data.tables import as_text, read_source
from featurecache.data.targets import Target, read_target
from featurecache.errors import InputError, did_you_mean
from featurecache.evaluation.subgroups import Subgroup, by_subgroup
from featurecache.evaluation.threshold import At
from featurecache.features.masks import MaskFiles, mask_cells, read_masks
from featurecache.newsamples import NewSamples, is_table, manifest_config
from featurecache.predict import Scored, score_samples
from featurecache.progress import Reporter
from featurecache.reporting.report import write_evaluation_report
from featurecache.reporting.thumbnails import Pictures
from featurecache.run import Run
from featurecache.rundir.densefit import count_pixels, write_pictures
from featurecache.rundir.densepredictions import DensePredictions
from featurecache.rundir.files import sha256_file
from featurecache.rundir.flow import sample_flow
from featurecache.rundir.maskfiles import FOLDER as MASKS
from featurecache.rundir.maskfiles import read_in_parts
from featurecache.rundir.mistakes import write_mistakes
from featurecache.rundir.predictions import Predictions
from featurecache.rundir.record import dump_json, portable_command
from featurecache.rundir.recorded import read_recipe
from featurecache.rundir.results import curves_of, find_threshold, make_predictions, measure, to_target

FOLDER = "evaluations"
SPLIT = "test"  # new samples are all test samples
NO_THRESHOLD = {"value": None}
SEED = 0  # of the resampling
MOST_SHOWN = 20  # subgroups that get a line


@dataclass(frozen=True)
class Evaluation:
    """Where an evaluation was written, and its metrics, all under `test`.

    Attributes:
        path: its folder.
        metrics: as in metrics.json, with `by` where subgroups were asked for.
        scored: the new samples; None where the run's own test samples were measured.
        subgroups: by value of the column asked for.
        notes: what to know of the figures.
    """

    path: Path
    metrics: dict[str, Any]
    scored: Scored | None
    subgroups: list[Subgroup] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self, label: str = SPLIT) -> list[str]:
        """As a person reads it; `label` is what the samples are called."""
        notes = [*(self.scored.notes if self.scored is not None else ()), *self.notes]
        lines = [*(f"note      {note}" for note in notes), metric_line(label, self.metrics[SPLIT])]
        by = self.metrics.get("by", {}).get("column", "")
        for part in self.subgroups[:MOST_SHOWN]:
            line = metric_line(f"{by}={part.value or '(empty)'}", part.to_json())
            lines.append(f"{line}{f'  (small: {part.small})' if part.small else ''}")
        if len(self.subgroups) > MOST_SHOWN:
            more = len(self.subgroups) - MOST_SHOWN
            lines.append(f"{by}: {more:,} more values, on the page and in evaluation.json")
        return [*lines, f"written   {self.path}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def evaluate(
    run: Run,
    new: NewSamples,
    *,
    by: str | None = None,
    at: str | None = None,
    bootstrap: int = 1000,
    images: int | Literal["none"] = 12,
    command: str = "",
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score new samples and compare with their labels, by the run's own threshold.

    Writes metrics.json, predictions.csv, curves.json, evaluation.json and report.html into RUN/evaluations/<stem of the
    manifest>/, with `-by-COLUMN` and `-at-...` behind it where they are given, in the place of what an earlier
    evaluation of that name left.

    Args:
        run: a fitted run.
        new: a manifest with the run's target.
        by: column of the manifest; each of its values is measured on its own, too.
        at: decide at a fixed sensitivity or specificity (`sensitivity=0.95`); the threshold is chosen on the run's own
            validation samples. Default the run's threshold.
        bootstrap: resamples of the groups per interval.
        images: how many mistakes the page shows with their pictures, or `none`.
        command: the command line, for evaluation.json.
        reporter: told of progress.

    Raises:
        InputError: no manifest was given, it lacks the target or column, or holds a class that the run does not know.
        RecipeMismatchError: see `predict`.
    """
    threshold = decision(run, at)
    if len(new.sources) != 1 or not is_table(new.sources[0]):
        raise InputError(
            f"{new.sources[0]}: labels are needed: give a manifest or a folder with a sub-folder per class"
        )
    table, target = read_labels(run, new)  # before anything is computed
    if by is not None:
        check_column(table, by, new.sources[0])
    with tempfile.TemporaryDirectory(prefix="featurecache-") as folder:
        return _compared(
            run, new, table, target, threshold, Path(folder), by=by, at=at, bootstrap=bootstrap, images=images,
            command=command, reporter=reporter,
        )  # fmt: skip


def _compared(
    run: Run,
    new: NewSamples,
    table: pl.DataFrame,
    target: Target,
    threshold: Mapping[str, Any],
    folder: Path,
    *,
    by: str | None,
    at: str | None,
    bootstrap: int,
    images: int | Literal["none"],
    command: str,
    reporter: Reporter | None,
) -> Evaluation:
    """Scores of new samples beside their labels; predicted masks are kept in `folder` meanwhile."""
    scored = score_samples(run, new, reporter, masks=folder / MASKS)
    row_of = {name: row for row, name in enumerate(table["sample_id"].to_list())}
    target = target.subset(np.array([row_of[name] for name in scored.sample_ids.tolist()], dtype=np.int64))
    if not target.known.any():
        raise InputError(f"{new.sources[0]}: no sample with a label has an image that can be read")
    group = (run.record.get("split") or {}).get("group")
    truth, scores = target, scored.scores
    if isinstance(target, DenseTarget):
        truth, scores = count_pixels(read_in_parts(folder, scored.files, run.classes), target)
    predictions = make_predictions(
        truth,
        scores,
        masks=scored.files,
        sample_ids=scored.sample_ids,
        groups=sample_groups(scored.table, group if group in scored.table.columns else None),
        splits=[SPLIT] * len(scored.sample_ids),
        views=run.views,
        present=scored.present,
    )
    column = as_text(scored.table[by]).to_list() if by is not None else None
    source = Path(os.path.abspath(new.sources[0]))
    about: dict[str, Any] = {"manifest": source.name, "n": len(scored.sample_ids), "notes": [], "command": command}
    about["flow"] = new_flow(table, group, scored, predictions)
    about["failed"] = [{**failure, "path": Path(failure["path"]).name} for failure in scored.failures]
    # The head of a cross-validation was fitted on all samples in the end, though each is a test sample of one fold.
    held_out = run.arrays.splits == ("" if run.record.get("cv") else SPLIT)
    trained = set(run.arrays.sample_ids[~held_out].tolist()) & set(scored.sample_ids.tolist())
    if trained:
        about["notes"].append(
            f"{len(trained):,} of these samples have the ids of samples that the run was fitted or tuned on: "
            "figures on them say too much"
        )
    name = folder_name(source.stem, by, at)
    found = _measured(
        run, predictions, threshold, by, column, name, about, bootstrap=bootstrap, images=images,
        pictures=lambda: new_pictures(run, new), masks=folder / MASKS, target=target,
    )  # fmt: skip
    return replace(found, scored=scored)


def evaluate_own(
    run: Run,
    *,
    by: str | None = None,
    table: str | Path | None = None,
    id: str | None = None,
    at: str | None = None,
    bootstrap: int = 1000,
    command: str = "",
) -> Evaluation:
    """Measure the run's own test samples again: by subgroups, or at another threshold. Nothing is computed anew.

    Args:
        run: a fitted run.
        by: a column of `table`.
        table: CSV or Parquet with the samples' ids and the column; a sample may stand in several rows. Default the
            manifest that the run was fitted on, where it is still there and the same.
        id: the table's column of ids; default `sample_id`.
        at: see `evaluate`.
        bootstrap: see `evaluate`.
        command: see `evaluate`.

    Raises:
        InputError: no table for the column, no such column, or test samples that the table does not have.
    """
    threshold = decision(run, at)
    predictions = run.arrays.of(SPLIT)
    if not len(predictions.sample_ids):
        raise InputError(f"{run.path}: the run has no test samples; give a MANIFEST of new ones")
    column, ids = None, predictions.sample_ids.tolist()
    if by is not None:
        column = own_column(run, by, ids) if table is None else joined_column(Path(table), by, ids, id or "sample_id")
    about: dict[str, Any] = {"manifest": None, "n": len(ids), "notes": [], "failed": [], "command": command}
    return _measured(
        run, predictions, threshold, by, column, folder_name("own-test", by, at), about, bootstrap=bootstrap
    )


def new_flow(table: pl.DataFrame, group: str | None, scored: Scored, predictions: Predictions) -> dict[str, Any]:
    """What became of every sample of a new manifest; see `sample_flow`."""
    ids, known = scored.sample_ids.tolist(), predictions.known()
    return sample_flow(
        table["sample_id"].to_list(),
        sample_groups(table, group if group in table.columns else None),
        kept=ids,
        unreadable={failure["sample_id"] for failure in scored.failures if failure["path"]},
        known=scored.sample_ids[known].tolist(),
        split=dict.fromkeys(ids, SPLIT),
    )


def folder_name(stem: str, by: str | None, at: str | None) -> str:
    """`external`, `external-by-site-at-sensitivity=0.95`: another question does not replace the answer before."""
    name = stem + (f"-by-{by}" if by else "") + (f"-at-{at}" if at else "")
    return re.sub(r"[^\w.=+-]+", "_", name)


def decision(run: Run, at: str | None) -> Mapping[str, Any]:
    """The run's threshold, or one for a wanted figure, chosen on the run's own validation samples."""
    if at is None:
        return run.threshold or NO_THRESHOLD
    wanted = At.parse(at)
    if not len(run.arrays.of("valid").sample_ids):
        raise InputError(f"--at {at}: the run has no validation samples to choose a threshold on")
    return find_threshold(run.arrays, wanted)


def check_column(table: pl.DataFrame, by: str, source: str | Path) -> None:
    """Refuse a column that is not there."""
    if by not in table.columns:
        near = did_you_mean(by, table.columns)
        raise InputError(f"{source}: no column {by!r}.{near} Columns: {', '.join(table.columns[:20])}")


def own_column(run: Run, by: str, ids: Sequence[str]) -> list[str | None]:
    """A column of the manifest that a run was fitted on, for these samples.

    Raises:
        InputError: it has no such column, or is not there or not the same any more.
    """
    recorded, binding = (run.record.get(name) or {} for name in ("manifest_config", "binding"))
    name = str(recorded.get("manifest") or "")
    places = (Path(os.path.abspath(run.path)).parent / name, Path(name))  # as it was recorded, or here
    path = next((at for at in places if at.is_file() and sha256_file(at) == binding.get("manifest_digest")), None)
    if path is None:
        own = f"the manifest of the run, {Path(name).name}" if name else "the manifest of the run"
        with_id = f", with --id {recorded['id']}" if name and recorded.get("id") else ""
        raise InputError(f"--by {by}: say with --table where the column is ({own}{with_id}), or give MANIFEST")
    config = {**recorded, "manifest": path, "root": None, "allow_outside": True}
    manifest = read_manifest(ManifestConfig.create(config, source=str(run.path)), images=False)
    if by not in (*manifest.table.columns, *manifest.varying):
        near = did_you_mean(by, manifest.table.columns)
        raise InputError(f"--by {by}: {path.name} has no such column.{near} If another table has it, give --table")
    return _matched(path, by, manifest.table["sample_id"], manifest.column(by), ids)


def joined_column(path: Path, by: str, ids: Sequence[str], id_column: str = "sample_id") -> list[str | None]:
    """A column of a table for these samples.

    Raises:
        InputError: no such columns, or samples that are missing or there twice with other values.
    """
    table = read_source(path).frame
    for name in (id_column, by):
        check_column(table, name, path)
    return _matched(path, by, table[id_column], table[by], ids)


def _matched(path: Path, by: str, names: pl.Series, column: pl.Series, ids: Sequence[str]) -> list[str | None]:
    """The values of a column that stands beside names, in the order of the ids."""
    values: dict[str, str | None] = {}
    for name, value in zip(as_text(names).to_list(), as_text(column).to_list(), strict=True):
        if name is not None and values.setdefault(name, value) != value:
            raise InputError(f"{path}: sample {name!r} has several values of {by!r}: {values[name]!r} and {value!r}")
    absent = [name for name in ids if name not in values]
    if absent:
        raise InputError(f"{path}: {len(absent):,} test samples of the run are not there, such as {absent[0]!r}")
    return [values[name] for name in ids]


def _measured(
    run: Run,
    predictions: Predictions,
    threshold: Mapping[str, Any],
    by: str | None,
    column: Sequence[str | None] | None,
    name: str,
    about: Mapping[str, Any],
    *,
    bootstrap: int,
    images: int | Literal["none"] = "none",
    pictures: Callable[[], Pictures] | None = None,
    masks: Path | None = None,
    target: Target | None = None,
) -> Evaluation:
    """Metrics of predictions, all of them test samples, written into RUN/evaluations/<name>/."""
    metrics = measure(predictions, threshold, bootstrap=bootstrap, seed=SEED)
    subgroups: list[Subgroup] = []
    if column is not None:
        subgroups = by_subgroup(
            to_target(predictions), predictions.scores, predictions.groups, column,
            threshold=predictions.cut(threshold), n=bootstrap, seed=SEED,
        )  # fmt: skip
        metrics["by"] = {"column": by, "subgroups": {part.value: part.to_json() for part in subgroups}}
    path = run.path / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        made = Path(scratch) / path.name
        made.mkdir()
        predictions.table(predictions.cut(threshold)).write_csv(made / "predictions.csv")
        (made / "metrics.json").write_text(dump_json(metrics), encoding="utf-8")
        record = {"schema": 1, **about, "by": by, "threshold": dict(threshold)}
        record["command"] = portable_command(record["command"], run.path)
        (made / "evaluation.json").write_text(dump_json(record), encoding="utf-8")
        if predictions.task != "regression":
            curves = curves_of(predictions, threshold, bootstrap=bootstrap, seed=SEED)
            (made / "curves.json").write_text(dump_json(curves), encoding="utf-8")
        if masks is not None and masks.is_dir():
            shutil.copytree(masks, made / MASKS)
        if isinstance(predictions, DensePredictions):
            if isinstance(target, DenseTarget) and pictures is not None:
                write_pictures(made, predictions, target, pictures().seen, images=images)
        else:
            write_mistakes(made, predictions, threshold, {}, images=images, pictures=pictures)
        write_evaluation_report(made, run.path, run.record, name=f"{run.path.name}: {name}")
        if path.exists():
            shutil.rmtree(path)
        os.replace(made, path)
    return Evaluation(path, metrics, None, subgroups, list(about["notes"]))


def new_pictures(run: Run, new: NewSamples) -> Pictures:
    """The pictures of new samples."""
    with tempfile.TemporaryDirectory(prefix="featurecache-") as scratch:
        manifest = read_manifest(manifest_config(run, new, Path(scratch)))
    recipes = {view: read_recipe(entry) for view, entry in run.recipes.items() if view in run.views}
    return Pictures.of_manifest(manifest, recipes)


def read_labels(run: Run, new: NewSamples) -> tuple[pl.DataFrame, Target]:
    """The table of the new samples and the run's target in it."""
    with tempfile.TemporaryDirectory(prefix="featurecache-") as scratch:
        config = manifest_config(run, new, Path(scratch))
        manifest = read_manifest(config)
        table = manifest.table
    if run.task == "dense":
        recorded = run.record.get("target_config") or {}
        [(view, recipe)] = ((view, read_recipe(entry)) for view, entry in run.recipes.items())
        files = MaskFiles(
            run.targets[0], table["sample_id"].to_list(), mask_cells(manifest, config, run.targets[0], view),
            Preprocessing.from_parameters(recipe.fields["preprocessing"]), str(recorded.get("masks", "index")),
            recorded.get("uncertain") or {},
        )  # fmt: skip
        return table, read_masks(files, source=Path(new.sources[0]).name, classes=run.classes)
    target = read_target(
        table,
        run.targets,
        task=run.task,
        uncertain=(run.record.get("target_config") or {}).get("uncertain", {}),
        source=Path(new.sources[0]).name,
        classes=run.classes or None,
    )
    return table, target
