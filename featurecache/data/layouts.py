"""The two layouts of a manifest, wide and long, brought to the same form: a table of samples and a list of cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from featurecache.config import ManifestConfig
from featurecache.data.selectors import make_selectors
from featurecache.data.tables import Source, as_text, typed
from featurecache.errors import InputError, did_you_mean

ID = "sample_id"
_SHOWN = 5  # rows named in one message


@dataclass
class Layout:
    """What a layout was read to; `cells` has sample, view, ordinal, value, selector, row and column (for messages)."""

    table: pl.DataFrame
    views: tuple[str, ...]
    cells: pl.DataFrame
    problems: list[str]
    varying: dict[str, str] = field(default_factory=dict)


def read_wide(source: Source, config: ManifestConfig, views: Mapping[str, str]) -> Layout:
    """A row per sample, a column (or several) per view."""
    problems: list[str] = []
    ids = _ids(source, config, problems)
    _no_duplicates(source, ids, config.id or ID, problems)
    parts: list[pl.DataFrame] = []
    columns_of_views: list[str] = []
    for number, (view, named) in enumerate(views.items()):
        selectors = make_selectors(source, config, view)
        for position, column in enumerate(_columns(source, named)):
            if complaint := source.missing(column, f"--view {view}={named}"):
                problems.append(complaint)
                continue
            columns_of_views.append(column)
            values = _as_paths(source, column, problems)
            for row in selectors.problems.keys() & set(values.is_not_null().arg_true().to_list()):
                problems += [text for text in selectors.problems[row] if text not in problems]
            parts.append(
                pl.DataFrame(
                    {
                        "sample": pl.int_range(values.len(), dtype=pl.UInt32, eager=True),
                        "number": pl.repeat(number, values.len(), dtype=pl.Int32, eager=True),
                        "position": pl.repeat(position, values.len(), dtype=pl.Int64, eager=True),
                        "value": values,
                        "selector": selectors.json,
                        "row": source.rows,
                        "column": pl.repeat(column, values.len(), dtype=pl.String, eager=True),
                    }
                )
            )
    cells = _cells(parts, tuple(views), ids, source, config, problems)
    rest = [name for name in source.frame.columns if name != ID]
    table = typed(source.frame.select(rest), keep={*columns_of_views, config.id or ID})
    return Layout(pl.DataFrame([ids, *table.get_columns()]), tuple(views), cells, problems)


def read_long(source: Source, config: ManifestConfig, views: Mapping[str, str]) -> Layout:
    """A row per image; a sample's rows share its id."""
    problems: list[str] = []
    if config.view_column is None or config.path_column is None:
        raise InputError(f"{source.shown}: the long layout needs --view-column COLUMN and --path-column COLUMN")
    named = [(config.view_column, "--view-column"), (config.path_column, "--path-column"), (config.id or ID, "--id")]
    missing = [complaint for column, option in named if (complaint := source.missing(column, option))]
    if missing:
        raise InputError.from_problems(f"{source.shown}: columns are missing", missing + list(source.problems))
    found = as_text(source.frame[config.view_column])
    numbers = _numbers(source, config, views, found, problems)
    chosen = pl.Series([number is not None for number in numbers], dtype=pl.Boolean)
    order = list(views) or sorted(found.drop_nulls().unique().to_list())
    record = chosen.arg_true()
    subset = Source(
        source.path,
        source.shown,
        source.digest,
        source.frame.filter(chosen),
        source.rows.filter(chosen),
        source.unit,
    )
    ids = _ids(subset, config, problems)
    if not ids.len():
        problems.append(f"{source.shown}: no row belongs to a view")
    first, sample = _samples(ids)
    values = _as_paths(subset, config.path_column, problems)
    number = pl.Series("number", [item for item in numbers if item is not None], dtype=pl.Int32)
    part = pl.DataFrame(
        {
            "sample": sample,
            "number": number,
            "position": record.cast(pl.Int64),
            "value": values,
            "selector": _selectors(subset, config, order, number, values, problems),
            "row": subset.rows,
            "column": pl.repeat(config.path_column, values.len(), dtype=pl.String, eager=True),
        }
    )
    cells = _cells([part], tuple(order), first[ID], subset, config, problems)
    rest = [name for name in source.frame.columns if name not in (ID, config.view_column, config.path_column)]
    table, varying = _constant(subset.frame.select(rest), sample, first["record"], first[ID], subset)
    for name, what in ((config.view_column, "views"), (config.path_column, "paths")):
        varying[name] = f"column {name!r} holds the {what} of single images, not something of the sample"
    table = typed(table, keep={config.id or ID})
    return Layout(pl.DataFrame([first[ID], *table.get_columns()]), tuple(order), cells, problems, varying)


def _samples(ids: pl.Series) -> tuple[pl.DataFrame, pl.Series]:
    """The first record of each sample, with its id; and the sample's number of each record."""
    records = ids.fill_null("").to_frame()
    first = records.with_row_index("record").unique(ID, keep="first", maintain_order=True)
    numbered = first.select(ID, pl.int_range(pl.len(), dtype=pl.UInt32).alias("sample"))
    return first, records.join(numbered, on=ID, how="left", maintain_order="left")["sample"]


def _selectors(
    source: Source,
    config: ManifestConfig,
    order: Sequence[str],
    number: pl.Series,
    values: pl.Series,
    problems: list[str],
) -> pl.Series:
    """The selector of each record, by the rules of the view that its number names."""
    selector = pl.repeat("{}", values.len(), dtype=pl.String, eager=True)
    for position, view in enumerate(order):
        made = make_selectors(source, config, view)
        mine = number == position
        selector = made.json.zip_with(mine, selector)
        for row in made.problems.keys() & set((mine & values.is_not_null()).arg_true().to_list()):
            problems += made.problems[row]
    return selector


def _columns(source: Source, named: str) -> list[str]:
    """`COL1,COL2` as columns; a column whose name has a comma in it is meant first."""
    return [named] if named in source.frame.columns else [part.strip() for part in named.split(",")]


def _ids(source: Source, config: ManifestConfig, problems: list[str]) -> pl.Series:
    """The id of each record, as text."""
    frame, column = source.frame, config.id or ID
    if config.id and (complaint := source.missing(config.id, "--id")):
        problems.append(complaint)
    elif config.id and config.id != ID and ID in frame.columns:
        problems.append(f"{source.shown}: it has a column {ID!r} beside --id {config.id}; rename one of them")
    if column not in frame.columns:
        return _record_numbers(source)
    ids = frame[column]
    if not (ids.dtype == pl.String or ids.dtype.is_integer()):
        problems.append(f"{source.where(column=column)}: ids must be text or whole numbers, not {ids.dtype}")
        return _record_numbers(source)
    for number in ids.is_null().arg_true().to_list():
        problems.append(f"{source.where(source.rows[number], column)}: the id is empty")
    return ids.cast(pl.String).rename(ID)


def _record_numbers(source: Source) -> pl.Series:
    return pl.int_range(1, source.frame.height + 1, eager=True).cast(pl.String).rename(ID)


def _no_duplicates(source: Source, ids: pl.Series, column: str, problems: list[str]) -> None:
    repeated = pl.DataFrame([ids, source.rows]).filter(pl.col(ID).is_duplicated() & pl.col(ID).is_not_null())
    first: dict[str, int] = {}
    for name, row in repeated.iter_rows():
        if name in first:
            where = source.where(row, column if column in source.frame.columns else None)
            problems.append(f"{where}: the id {name!r} is already that of {source.unit} {first[name]}")
        else:
            first[name] = row


def _as_paths(source: Source, column: str, problems: list[str]) -> pl.Series:
    values = source.frame[column]
    if values.dtype not in (pl.String, pl.Null):
        problems.append(f"{source.where(column=column)}: paths (or texts) are expected, but it holds {values.dtype}")
    return values.cast(pl.String, strict=False) if values.dtype in (pl.String, pl.Null) else _nothing(values.len())


def _nothing(length: int) -> pl.Series:
    return pl.repeat(None, length, dtype=pl.String, eager=True)


def _numbers(
    source: Source, config: ManifestConfig, views: Mapping[str, str], found: pl.Series, problems: list[str]
) -> list[int | None]:
    """Per record the number of its view, None where it belongs to none that was asked for."""
    column = config.view_column or ""
    if not views:
        for row in found.is_null().arg_true().to_list():
            problems.append(
                f"{source.where(source.rows[row], column)}: the view is empty; choose with --view NAME=VALUE"
            )
        order = {value: number for number, value in enumerate(sorted(found.drop_nulls().unique().to_list()))}
        return [order.get(value) for value in found.to_list()]
    owner: dict[str, int] = {}
    there = set(found.drop_nulls().unique().to_list())
    for number, (view, named) in enumerate(views.items()):
        for value in [named] if named in there else [part.strip() for part in named.split(",")]:
            if value in owner:
                problems.append(
                    f"--view {view}={named}: {value!r} already stands for view {list(views)[owner[value]]!r}"
                )
            if value not in there:
                problems.append(
                    f"{source.where(column=column)}: no row holds {value!r} (--view {view}={named})."
                    f"{did_you_mean(value, there)} Values: {', '.join(sorted(there)[:20])}"
                )
            owner.setdefault(value, number)
    return [owner.get(value) if value is not None else None for value in found.to_list()]


def _cells(
    parts: Sequence[pl.DataFrame],
    views: tuple[str, ...],
    ids: pl.Series,
    source: Source,
    config: ManifestConfig,
    problems: list[str],
) -> pl.DataFrame:
    """Number the images of each sample and view, and add a row for every view that is absent."""
    schema = {
        "sample": pl.UInt32,
        "number": pl.Int32,
        "position": pl.Int64,
        "value": pl.String,
        "selector": pl.String,
        "row": pl.Int64,
        "column": pl.String,
    }
    everything = pl.concat([pl.DataFrame(schema=schema), *parts])
    # One number for sample and view: sorting and comparing one column is several times as fast as two.
    everything = everything.with_columns(place=pl.col("sample").cast(pl.Int64) * len(views) + pl.col("number"))
    held = everything.filter(pl.col("value").is_not_null()).sort("place", "position")
    held = held.with_columns(ordinal=_ordinals(held["place"]))
    if config.multi == "error" and (held["ordinal"] > 0).any():
        problems += _several(held.filter(pl.len().over("place") > 1), views, ids, source)
    elif config.multi == "first":
        held = held.filter(pl.col("ordinal") == 0)
    rows = everything.group_by("sample").agg(pl.col("row").min())
    absent = rows.join(pl.DataFrame({"number": range(len(views))}, schema={"number": pl.Int32}), how="cross")
    absent = absent.with_columns(place=pl.col("sample").cast(pl.Int64) * len(views) + pl.col("number"))
    absent = absent.join(held.select("place"), on="place", how="anti").with_columns(
        pl.lit(0, dtype=pl.Int32).alias("ordinal"), pl.lit("{}").alias("selector")
    )
    cells = pl.concat([held, absent], how="diagonal").sort("place", "ordinal") if absent.height else held
    names = pl.Series("view", views, dtype=pl.String)
    return cells.drop("place").with_columns(names.gather(cells["number"]).alias("view"))


def _ordinals(places: pl.Series) -> pl.Series:
    """0, 1, ... within each run of equal numbers."""
    values = places.to_numpy()
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    counts = np.diff(starts, append=len(values))
    return pl.Series("ordinal", np.arange(len(values)) - np.repeat(starts, counts), dtype=pl.Int32)


def _several(held: pl.DataFrame, views: tuple[str, ...], ids: pl.Series, source: Source) -> Iterator[str]:
    for (sample, number), cells in held.group_by("sample", "number", maintain_order=True):
        rows = cells["row"].unique(maintain_order=True).to_list()
        places = ", ".join(str(row) for row in rows[:_SHOWN]) + (", ..." if len(rows) > _SHOWN else "")
        columns = "" if len(rows) > 1 else f" in columns {', '.join(cells['column'].to_list())}"
        plural = "s" if len(rows) > 1 else ""
        yield (
            f"{source.shown}, {source.unit}{plural} {places}: sample {ids[int(sample)]!r} has {cells.height} "
            f"images of view {views[int(number)]!r}{columns}; choose with --multi first|mean|max"
        )


def _constant(
    frame: pl.DataFrame, sample: pl.Series, first: pl.Series, ids: pl.Series, source: Source
) -> tuple[pl.DataFrame, dict[str, str]]:
    """One row per sample of the columns that do not differ within any sample; of the others, where they differ."""
    leader = first.gather(sample)
    kept: list[pl.Series] = []
    varying: dict[str, str] = {}
    for series in frame.get_columns():
        if series.dtype.is_nested():
            continue
        differs = series.ne_missing(series.gather(leader)).arg_true()
        if not differs.len():
            kept.append(series.gather(first))
            continue
        at = int(differs[0])
        varying[series.name] = (
            f"column {series.name!r} differs within a sample, so it can't be used per sample: in {source.unit}s "
            f"{source.rows[int(leader[at])]} and {source.rows[at]} sample {ids[int(sample[at])]!r} has "
            f"{series[int(leader[at])]!r} and {series[at]!r} ({differs.len()} such rows)"
        )
    return pl.DataFrame(kept), varying
