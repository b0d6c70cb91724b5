"""A hash of what a table holds, which does not depend on how polars spells or stores it."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.store.recipe import canonical_json

_BLOCK = 8192  # values that are Python objects at a time


def hash_table(sha256: Any, frame: pl.DataFrame) -> None:
    """Feed the content of a table to a hash: per column its name, our name of its type, which are null, the values.

    int is int64 and float is float64 (one NaN, little-endian), bool a byte; text, binary and everything else, as the
    text that `_text` gives it, are their lengths (uint64) and then their bytes. A null counts as 0 or is left out.
    """
    for series in frame.get_columns():
        kind, values = _column(series)
        sha256.update(canonical_json([series.name, kind, len(series)]))
        sha256.update(np.packbits(series.is_null().to_numpy()).tobytes())
        if isinstance(values, np.ndarray):
            sha256.update(values.tobytes())
            continue
        sizes = values.str.len_bytes() if values.dtype == pl.String else values.bin.size()
        sha256.update(sizes.to_numpy().astype("<u8").tobytes())
        for start in range(0, len(values), _BLOCK):
            blobs = values[start : start + _BLOCK].to_list()
            sha256.update("".join(blobs).encode("utf-8") if values.dtype == pl.String else b"".join(blobs))


def _column(series: pl.Series) -> tuple[str, NDArray[Any] | pl.Series]:
    """Our name of a column's type, and its values: an array with 0 for null, or text or bytes without the nulls."""
    dtype = series.dtype
    if dtype == pl.Boolean:
        return "bool", series.fill_null(False).cast(pl.UInt8).to_numpy()
    if dtype.is_integer():
        try:
            return "int", series.cast(pl.Int64).fill_null(0).to_numpy().astype("<i8")
        except pl.exceptions.PolarsError:  # beyond 64 bits
            return "text", _texts(str(value) for value in series.drop_nulls().to_list())
    if dtype.is_float():
        numbers = series.cast(pl.Float64).fill_null(0.0).to_numpy().astype("<f8")
        return "float", np.where(np.isnan(numbers), np.float64("nan"), numbers).astype("<f8")
    if dtype == pl.Binary:
        return "binary", series.drop_nulls()
    if isinstance(dtype, pl.Datetime | pl.Duration):  # as Python objects they would lose nanoseconds
        scale = {"ms": 10**6, "us": 10**3}.get(dtype.time_unit or "us", 1)
        ticks = series.drop_nulls().cast(pl.Int64).to_list()
        return "text", _texts(f"{tick * scale} ns" for tick in ticks)
    if isinstance(dtype, pl.String | pl.Categorical | pl.Enum):
        return "text", series.drop_nulls().cast(pl.String)
    return "text", _texts(_text(value) for value in series.drop_nulls().to_list())


def _texts(values: Iterable[str]) -> pl.Series:
    return pl.Series(values=list(values), dtype=pl.String)


def _text(value: Any) -> str:
    """The one spelling of a value of a rare type: dates and times after ISO 8601, decimals in full, lists as JSON."""
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | pl.Series):
        return [_plain(item) for item in value]
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return f"{value // dt.timedelta(microseconds=1) * 1000} ns"
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    return value.hex() if isinstance(value, bytes) else str(value)
