"""explore.html: a map of cached features in one self-contained file, with pictures, neighbours and what looks wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featurecache.amounts import counted, human_bytes
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.reporting.embedding import alike_pairs, neighbours
from featurecache.reporting.explorefields import HELD_OUT, Column, suspects
from featurecache.reporting.explorefile import write_map
from featurecache.reporting.exploremap import POINTS, Map, Method, Said, check_columns, describe, make_map, match
from featurecache.reporting.report import environment
from featurecache.reporting.thumbnails import Picture, Pictures, fitting
from featurecache.run import Run

PICTURE_BYTES = 24_000_000  # of the page
ALIKE = 0.95  # cosine from which two samples are shown as near-duplicates
LISTED = 200


@dataclass(frozen=True)
class Explored:
    """What was made.

    Attributes:
        path: of the page.
        samples: of the dataset.
        points: of them on the page.
        pictures: on the page.
        picture_pixels: their longest edge.
        duplicates: near-duplicate pairs that were found.
        suspects: likely label errors that were found.
        variance: share of the features' variance along the first two principal components.
        notes: what a user should know.
        parquet: the table for other viewers, if asked for.
    """

    path: Path
    samples: int
    points: int
    pictures: int
    picture_pixels: int
    duplicates: int
    suspects: int
    variance: float
    notes: list[str] = field(default_factory=list)
    parquet: Path | None = None

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"page      {self.path}: {self.points:,} of {counted(self.samples, 'sample')}{_size(self.path)}"]
        if self.pictures:
            lines.append(f"pictures  {self.pictures:,}, up to {self.picture_pixels} px")
        lines.append(f"found     {self.duplicates:,} near-duplicate pairs, {self.suspects:,} likely label errors")
        if self.parquet is not None:
            lines.append(f"table     {self.parquet}{_size(self.parquet)}")
        return [*lines, *(f"note      {note}" for note in self.notes)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _size(path: Path) -> str:
    return f" ({human_bytes(path.stat().st_size)})" if path.is_file() else ""


def explore(
    dataset: FeatureDataset,
    out: str | Path,
    *,
    run: Run | None = None,
    by: Sequence[str] = (),
    method: Method = "pca",
    points: int = POINTS,
    images: int | Literal["auto", "none"] = "auto",
    near: int = 8,
    alike: float = ALIKE,
    seed: int = 0,
    parquet: str | Path | None = None,
    overwrite: bool = False,
) -> Explored:
    """Write the page.

    Args:
        dataset: its features are mapped; its target, if it has one and there is no run, is what samples are.
        out: the page.
        run: a run on the same samples: gives classes, predictions, errors and splits.
        by: columns of the manifest to colour by, too.
        method: `pca`, or `tsne` (minutes for 20,000 samples).
        points: the most samples on the page.
        images: `auto`: as many and as large as fit into 24 MB; how many samples have pictures at most; or `none`.
        near: neighbours listed for each sample.
        alike: cosine from which two samples count as near-duplicates.
        seed: of the choice of samples and of the map.
        parquet: also write all samples with x, y and pictures to this file, for other viewers.
        overwrite: replace files that are there.

    Raises:
        InputError: a file is there, a column or method is unknown, or no sample of the dataset is in the run.
    """
    out = Path(out)
    table = None if parquet is None else Path(parquet)
    for path in (out, table):
        check_free(path, overwrite)
    check_columns(dataset, by)
    said = match(dataset, run)
    made = make_map(dataset, method=method, points=points, seed=seed)
    rows, ids = made.rows, dataset.sample_ids[made.rows]
    columns = describe(dataset, rows, said, by)
    notes = sampling_notes(dataset, rows, said, seed)
    pictures = None if images == "none" else Pictures(dataset.binding, dataset.recipes)
    shown: list[list[Picture]] = [[] for _ in ids]
    pixels = 0
    if pictures is not None:
        notes += pictures.notes
        shown, pixels = page_pictures(pictures, [str(name) for name in ids], images)
    nearest, cosine = neighbours(made.coordinates, max(near, 1))
    pairs = alike_pairs(nearest, cosine, alike)
    found = None if said is None else said.of(rows)
    doubts = [] if said is None or found is None else suspects(found, said.threshold(found), ids)
    data = _samples(dataset, made, columns, shown, nearest[:, :near], cosine[:, :near]) | {
        "duplicates": [pair_json(dataset, rows, pair, columns) for pair in pairs[:LISTED]],
        "suspects": [[doubt.row, doubt.given, doubt.said, round(doubt.score, 3)] for doubt in doubts[:LISTED]],
    }
    variance = float(made.components.explained[:2].sum())
    page = render(
        data,
        title=dataset.binding.name,
        run="" if run is None else run.path.name,
        method=method,
        variance=variance,
        n=len(rows),
        total=len(dataset),
        views=dataset.views,
        notes=notes,
        alike=alike,
        n_pairs=len(pairs),
        n_doubts=len(doubts),
        listed=LISTED,
        judged=how_judged(said),
        share=share_right(columns, said, rows),
        regression=run is not None and run.task == "regression",
    )
    write_text(out, page)
    if table is not None:
        write_map(table, dataset, made, said, pictures, by=by)
    count = sum(map(len, shown))
    return Explored(
        out, len(dataset), len(rows), count, pixels if count else 0, len(pairs), len(doubts), variance, notes, table
    )


def _samples(
    dataset: FeatureDataset,
    made: Map,
    columns: Sequence[Column],
    shown: list[list[Picture]],
    nearest: NDArray[np.int64],
    cosine: NDArray[np.float32],
) -> dict[str, Any]:
    """What the page holds of each of its samples."""
    return {
        "ids": dataset.sample_ids[made.rows].tolist(),
        "views": list(dataset.views),
        "xy": np.round(scaled(made.xy), 5).tolist(),
        "fields": [column.to_json() for column in columns],
        "near": nearest.tolist(),
        "cosine": np.round(cosine.astype(np.float64), 3).tolist(),
        "pictures": picture_json(shown, dataset.views),
    }


def check_free(path: Path | None, overwrite: bool) -> None:
    """Refuse a file that is there, or whose folder isn't."""
    if path is not None and (path.is_dir() or (path.exists() and not overwrite)):
        raise InputError(f"{path}: exists. Choose another name, or replace a file with --overwrite.")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder. Make it, or choose another.")


def sampling_notes(dataset: FeatureDataset, rows: NDArray[np.int64], said: Said | None, seed: int) -> list[str]:
    """What the page does not show, in words."""
    notes = []
    if len(rows) < len(dataset):
        notes.append(f"The map shows {len(rows):,} of {len(dataset):,} samples, drawn at random (seed {seed}).")
    if dataset.n_dropped:
        notes.append(f"Left out for want of features: {counted(dataset.n_dropped, 'sample')} of the manifest.")
    lacking = 0 if said is None else int((said.places < 0).sum())
    if lacking:
        notes.append(f"Without a prediction in the run: {counted(lacking, 'sample')}.")
    return notes


def how_judged(said: Said | None) -> str:
    """On which samples label errors were looked for, in words."""
    if said is None:
        return "To find them, predictions are needed: featurecache explore ... --run RUN."
    if said.folds:
        return f"Every sample was judged by a model that did not learn from it ({said.folds} folds)."
    return (
        "Only validation and test samples were judged, since the model learned from the others. "
        "A run made with fit-head --cv 5 judges all of them."
    )


def share_right(columns: Sequence[Column], said: Said | None, rows: NDArray[np.int64]) -> float | None:
    """How many of the samples that were judged the model is right about; None where that is no yes or no."""
    error = next((column for column in columns if column.role == "error" and column.labels), None)
    if said is None or error is None:
        return None
    judged = np.isin(said.of(rows).splits, HELD_OUT) & (error.values >= 0)
    return float((error.values[judged] == 0).mean()) if judged.any() else None


def page_pictures(
    pictures: Pictures, ids: list[str], images: int | Literal["auto", "none"]
) -> tuple[list[list[Picture]], int]:
    """Pictures of all samples, or of so many, evenly among them; and their size in pixels."""
    if not isinstance(images, int) or images >= len(ids):
        return fitting(pictures, ids, PICTURE_BYTES)
    places = np.unique(np.linspace(0, len(ids) - 1, max(images, 0)).astype(int)).tolist()
    some, pixels = fitting(pictures, [ids[place] for place in places], PICTURE_BYTES)
    shown: list[list[Picture]] = [[] for _ in ids]
    for place, found in zip(places, some, strict=True):
        shown[place] = found
    return shown, pixels


def picture_json(shown: Sequence[Sequence[Picture]], views: Sequence[str]) -> list[Any]:
    """Per sample [view's number, data URI, text] of each picture."""
    number = {view: place for place, view in enumerate(views)}
    return [[[number[picture.view], picture.uri(), picture.text] for picture in pictures] for pictures in shown]


def pair_json(
    dataset: FeatureDataset, rows: NDArray[np.int64], pair: tuple[int, int, float], columns: Sequence[Column]
) -> list[Any]:
    """[one, other, cosine, what is odd about it]."""
    one, other, cosine = pair
    keys = [set(dataset.content[int(rows[place])]) for place in (one, other)]
    odd = []
    if keys[0] & keys[1]:
        odd.append("same files" if keys[0] == keys[1] else "a file in common")
    for column in columns:
        a, b = column.values[one], column.values[other]
        if column.role in ("class", "split") and column.labels and a >= 0 and b >= 0 and a != b:
            odd.append(f"{column.labels[a]} and {column.labels[b]}")
    return [one, other, round(cosine, 4), "; ".join(odd)]


def scaled(xy: NDArray[np.float32]) -> NDArray[np.float64]:
    """Into -1..1, both axes by the same factor."""
    low, high = xy.min(axis=0), xy.max(axis=0)
    half = float((high - low).max()) / 2 or 1.0
    return np.asarray((xy - (low + high) / 2) / half, dtype=np.float64)


def render(data: dict[str, Any], **about: Any) -> str:
    """The page as HTML; only the script whose hash it names may run in it."""
    loader = environment.loader
    assert loader is not None
    script = loader.get_source(environment, "explore.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Within a script element only `<` can begin or end anything; as an escape it is the same JSON.
    return environment.get_template("explore.html.j2").render(
        data=text.replace("<", "\\u003c"), script=script, digest=digest, **about
    )


def write_text(path: Path, text: str) -> None:
    """Write a file that appears when it is complete."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
