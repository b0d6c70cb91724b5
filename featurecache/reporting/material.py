"""What a report is made from: the files of a run's directory, or of an evaluation's, read once."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.config import About
from featurecache.reporting.wording import split_name
from featurecache.rundir.densepredictions import Predictions, read_predictions
from featurecache.rundir.files import ABOUT

SPLITS = ("test", "valid", "train")  # what counts comes first
KINDS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


@dataclass(frozen=True)
class Material:
    """One run, or one evaluation of a run on other samples.

    Attributes:
        directory: whose files are shown.
        record: the run's record; in an evaluation with the threshold that was used there.
        metrics: metrics.json.
        predictions: predictions.csv.
        images: whether pictures may be shown.
        evaluation: evaluation.json of an evaluation; None for a run.
        run: directory of the run.
    """

    directory: Path
    record: Mapping[str, Any]
    metrics: Mapping[str, Any]
    predictions: Predictions
    images: bool = True
    evaluation: Mapping[str, Any] | None = None
    run: Path = field(default_factory=Path)

    @property
    def split(self) -> str:
        """The split that counts: test where there is one."""
        return next((name for name in SPLITS if name in self.metrics), "")

    @property
    def split_name(self) -> str:
        """How its samples are called."""
        return "evaluated" if self.evaluation is not None else split_name(self.record, self.split)

    @property
    def figures(self) -> Mapping[str, Any]:
        """Its metrics."""
        found: Mapping[str, Any] = self.metrics.get(self.split, {})
        return found

    @property
    def part(self) -> Predictions:
        """Its samples with a known target."""
        return self.predictions.of(self.split)

    def confusion(self) -> NDArray[np.int64]:
        """(classes, classes) counts, rows are true classes; empty where the task has no classes."""
        part = self.part
        size = len(part.classes)
        matrix = np.zeros((size, size), dtype=np.int64)
        if size and len(part.sample_ids):
            np.add.at(matrix, (part.true, part.decisions(part.cut(self.record.get("threshold")))), 1)
        return matrix

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory; empty where there is none."""
        path = self.directory / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def table(self, name: str) -> pl.DataFrame:
        """A CSV file of the directory; empty where there is none."""
        path = self.directory / name
        there = path.is_file() and path.stat().st_size > 1
        return pl.read_csv(path, infer_schema_length=None) if there else pl.DataFrame()

    def picture(self, name: str) -> str:
        """An image file of the directory as a data URI; '' where it is none, not there, or pictures are not wanted."""
        path = self.directory / name
        inside = path.resolve().is_relative_to(self.directory.resolve())
        kind = KINDS.get(path.suffix.lower())
        if not (self.images and inside and kind and path.is_file()):
            return ""
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"

    def about(self) -> About:
        """What a person stated of the run."""
        return about_of(self.run)


def about_of(run: Path) -> About:
    """about.toml of a run; empty where there is none.

    Raises:
        InputError: it is no TOML, or has an unknown key.
    """
    path = run / ABOUT
    return About.from_toml(path) if path.is_file() else About()


def read_material(
    directory: Path,
    record: Mapping[str, Any],
    *,
    images: bool = True,
    run: Path | None = None,
) -> Material:
    """Read a run's directory, or with `run` that of an evaluation of it.

    Raises:
        RunError: predictions.csv is missing or damaged.
    """
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    predictions = read_predictions(directory, record)
    evaluation = None
    if run is not None:
        evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
        record = {**record, "threshold": evaluation["threshold"]}
    return Material(directory, record, metrics, predictions, images, evaluation, run or directory)
