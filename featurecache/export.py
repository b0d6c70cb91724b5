"""Features handed to other programs: Arrow and xarray in memory; Parquet, npz or CSV as a file, written in parts."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.errors import DependencyError, InputError, did_you_mean
from featurecache.features.features import feature_names
from featurecache.features.stored import StoreFeatures

if TYPE_CHECKING:
    import xarray

Format = Literal["parquet", "npz", "csv"]
PART = 4096  # samples in memory at a time


def to_frame(features: StoreFeatures, table: pl.DataFrame, rows: NDArray[np.int64] | None = None) -> pl.DataFrame:
    """Samples as a table: the manifest's columns, `sample_id` first, then a fixed-size list of numbers a tap.

    Columns of features are named `view.tap`, flattened where a row is a map, and null where the sample lacks the view.

    Args:
        features: of n samples.
        table: (n) the manifest's rows.
        rows: which of them; default all.
    """
    rows = np.arange(table.height) if rows is None else rows
    x = features[rows]
    held = {block.view: ~np.isnan(x[:, block.start]) for block in features.blocks}
    columns = []
    for block in features.blocks:
        kind = pl.Array(pl.Float32, block.stop - block.start)
        values = pl.Series(f"{block.view}.{block.tap}", np.ascontiguousarray(x[:, block.start : block.stop]), kind)
        there = pl.Series(held[block.view])
        columns.append(pl.select(pl.when(there).then(values).alias(values.name)).to_series())
    return table[rows].hstack(columns)


def to_xarray(features: StoreFeatures, sample_ids: NDArray[np.str_], target: Target | None) -> xarray.Dataset:
    """Samples as an xarray Dataset: a float32 variable `view.tap` of dimensions (sample, ...) a tap, and the targets.

    Other dimensions are named as in the store, with their size where it differs between taps: `features_512`. All of a
    sample is NaN where it lacks the view.

    Raises:
        DependencyError: xarray is not installed.
    """
    try:
        import xarray
    except ImportError:
        raise DependencyError("features as xarray need xarray: pip install 'featurecache[xarray]'") from None
    x = features[np.arange(len(sample_ids))]
    sizes: dict[str, set[int]] = {}
    for dims, block in zip(features.dims, features.blocks, strict=True):
        for dim, n in zip(dims, block.shape, strict=True):
            sizes.setdefault(dim, set()).add(n)
    variables: dict[str, Any] = {}
    for dims, block in zip(features.dims, features.blocks, strict=True):
        named = [dim if len(sizes[dim]) == 1 else f"{dim}_{n}" for dim, n in zip(dims, block.shape, strict=True)]
        values = x[:, block.start : block.stop].reshape(len(x), *block.shape)
        variables[f"{block.view}.{block.tap}"] = (["sample", *named], values)
    for name, series in target_columns(target).items():
        variables[name] = (["sample"], series)
    return xarray.Dataset(variables, coords={"sample": sample_ids})


def target_columns(target: Target | None) -> Mapping[str, NDArray[Any]]:
    """The targets by name: class names ('' where unknown), or numbers with NaN."""
    if target is None:
        return {}
    if target.task in ("binary", "multiclass"):
        return {target.names[0]: np.array([*target.classes, ""])[target.values]}  # -1 takes the last
    return {name: target.values[:, i] for i, name in enumerate(target.names)}


def export(
    features: StoreFeatures, table: pl.DataFrame, out: str | Path, *, format: Format, overwrite: bool = False
) -> Path:
    """Write all samples of a dataset into one file, a few thousand at a time.

    Args:
        features: of n samples, `dataset.features`.
        table: (n) the manifest's rows, `dataset.table`.
        out: the file; it appears when it is complete.
        format: `parquet`: see `to_frame`. `csv`: the same with a column a feature, `view.tap.index`. `npz`: arrays `x`
            (n, d) float32 with NaN for missing views, `columns` (d,), and every column of the manifest under its name.
        overwrite: replace a file that is there.

    Raises:
        InputError: the format is unknown, the file is there or its folder is not, a column has the name of another.
    """
    known = get_args(Format)
    if format not in known:
        raise InputError(f"--format {format!r}:{did_you_mean(format, known)} Known: {', '.join(known)}.")
    path = Path(out)
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path}: exists. Choose another --out, or replace a file with --overwrite.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder. Make it, or choose another --out.")
    names = [*(f"{block.view}.{block.tap}" for block in features.blocks), *feature_names(features.blocks)]
    taken = sorted(set(table.columns) & {*names, "x", "columns"})
    if taken:
        raise InputError(f"columns {', '.join(taken)} of the manifest have the name of exported features; rename them")
    write: dict[str, Callable[[StoreFeatures, pl.DataFrame, Path], None]] = {
        "parquet": _parquet,
        "csv": _csv,
        "npz": _npz,
    }
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write[format](features, table, scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _parts(table: pl.DataFrame) -> Iterator[NDArray[np.int64]]:
    for start in range(0, table.height, PART):
        yield np.arange(start, min(start + PART, table.height))


def _parquet(features: StoreFeatures, table: pl.DataFrame, path: Path) -> None:
    from polars.io.plugins import register_io_source

    def frames(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        for rows in _parts(table):
            frame = to_frame(features, table, rows)
            yield frame if with_columns is None else frame.select(with_columns)

    schema = to_frame(features, table, np.arange(0)).schema
    register_io_source(frames, schema=schema).sink_parquet(path, row_group_size=PART)


def _csv(features: StoreFeatures, table: pl.DataFrame, path: Path) -> None:
    names = feature_names(features.blocks)
    with path.open("wb") as file:
        for rows in _parts(table):
            x = pl.DataFrame(features[rows], names).fill_nan(None)
            table[rows].hstack(x.get_columns()).write_csv(file, include_header=not int(rows[0]))


def _npz(features: StoreFeatures, table: pl.DataFrame, path: Path) -> None:
    arrays = {"columns": np.array(feature_names(features.blocks))}
    for column in table.iter_columns():
        numeric = column.dtype.is_numeric() or column.dtype == pl.Boolean
        arrays[column.name] = column.to_numpy() if numeric else np.array(column.cast(pl.String).fill_null("").to_list())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        with archive.open("x.npy", "w", force_zip64=True) as file:
            shape = (table.height, features.shape[1])
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for rows in _parts(table):
                file.write(features[rows].astype("<f4", copy=False).tobytes())
