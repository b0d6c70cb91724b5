"""The map as a Parquet file that other viewers open: x, y, what is known of each sample, and a picture per view."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.dataset import FeatureDataset
from featurecache.reporting.explorefields import Column
from featurecache.reporting.exploremap import Map, Said, describe
from featurecache.reporting.thumbnails import Pictures

PART = 1024  # samples with their pictures in memory at a time
PIXELS = 128
PICTURE = pl.Struct({"bytes": pl.Binary, "path": pl.String})
"""What viewers take for an image: encoded bytes; `path` is always null, since it would tell about this machine."""


def write_map(
    path: Path,
    dataset: FeatureDataset,
    made: Map,
    said: Said | None,
    pictures: Pictures | None,
    *,
    by: Sequence[str] = (),
) -> Path:
    """Write samples with their place on the map, a few hundred at a time.

    A PCA map places all samples of the dataset; t-SNE places none but those on the page.

    Args:
        path: the file; it appears when it is complete.
        dataset: the samples.
        made: the map.
        said: what a run says of them, or None.
        pictures: where they come from; None: no column of pictures.
        by: columns of the manifest to take along.
    """
    from polars.io.plugins import register_io_source

    rows = np.arange(len(dataset), dtype=np.int64) if made.method == "pca" else made.rows
    columns = describe(dataset, rows, said, by)

    def part(places: NDArray[np.int64]) -> pl.DataFrame:
        chosen = rows[places]
        xy = made.xy[places] if made.method == "tsne" else made.components.project(dataset.features[chosen])[:, :2]
        ids = [str(name) for name in dataset.sample_ids[chosen]]
        made_of: dict[str, Any] = {
            "sample_id": pl.Series(ids, dtype=pl.String),
            "x": xy[:, 0].astype(np.float32),
            "y": xy[:, 1].astype(np.float32),
        }
        for column in columns:
            name = f"column:{column.name}" if column.name in made_of else column.name
            made_of[name] = _series(column, places)
        frame = pl.DataFrame(made_of)
        return frame if pictures is None else frame.hstack(_pictures(pictures, ids, dataset.views, set(frame.columns)))

    def frames(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        for start in range(0, len(rows), PART):
            frame = part(np.arange(start, min(start + PART, len(rows))))
            yield frame if with_columns is None else frame.select(with_columns)

    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        register_io_source(frames, schema=part(np.arange(0)).schema).sink_parquet(scratch, row_group_size=PART)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _series(column: Column, places: NDArray[np.int64]) -> pl.Series:
    if column.labels:
        labels = [*column.labels, None]  # index -1
        return pl.Series([labels[i] for i in column.values[places]], dtype=pl.String)
    return pl.Series(column.values[places].astype(np.float64)).fill_nan(None)


def _pictures(pictures: Pictures, ids: Sequence[str], views: Sequence[str], taken: set[str]) -> list[pl.Series]:
    found: dict[str, list[dict[str, Any] | None]] = {view: [None] * len(ids) for view in views}
    for place, shown in enumerate(pictures.many(ids, PIXELS)):
        for picture in reversed(shown):  # the first of a view stays
            found[picture.view][place] = {"bytes": picture.data or picture.text.encode(), "path": None}
    names = {view: f"image:{view}" if view in taken else view for view in views}
    return [pl.Series(names[view], values, dtype=PICTURE) for view, values in found.items()]
