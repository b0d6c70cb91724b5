"""Which part of an image a cell means: box, frame and flip columns turned into canonical JSON, checked row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from featurecache.config import ManifestConfig
from featurecache.data.tables import Source, is_value

WHOLE = "{}"


@dataclass
class Selectors:
    """The selector of each record for one view.

    Attributes:
        json: canonical JSON (sorted keys, no white space), one per record.
        problems: {record number: complaints}; they count only where the record has an image of the view.
    """

    json: pl.Series
    problems: dict[int, list[str]] = field(default_factory=dict)


def selector_columns(config: ManifestConfig) -> list[tuple[str, str]]:
    """(column, option) of every column that selectors need."""
    named = [(column, f"--box {view}") for view, columns in config.box.items() for column in columns]
    named += [(column, f"--frame {view}") for view, column in config.frame.items()]
    named += [(rule.partition("=")[0], f"--flip-if {view}") for view, rule in config.flip_if.items()]
    return named


def selector_shape_problems(config: ManifestConfig) -> list[str]:
    """What is wrong with the options themselves."""
    problems = [
        f"--box {view}: {len(columns)} columns, but four are needed: left, upper, right, lower"
        for view, columns in config.box.items()
        if len(columns) != 4
    ]
    return problems + [
        f"--flip-if {view}={rule}: write --flip-if VIEW=COLUMN=VALUE"
        for view, rule in config.flip_if.items()
        if "=" not in rule or not rule.partition("=")[0]
    ]


def make_selectors(source: Source, config: ManifestConfig, view: str) -> Selectors:
    """The selectors of a view; all columns that they name must exist."""
    frame = source.frame
    if not (view in config.box or view in config.frame or view in config.flip_if):
        return Selectors(pl.repeat(WHOLE, frame.height, dtype=pl.String, eager=True))
    result = Selectors(pl.Series([], dtype=pl.String))
    parts: list[pl.Series] = []
    if view in config.box:
        parts.append(_box(source, config.box[view], result.problems))
    if view in config.flip_if:
        column, _, value = config.flip_if[view].partition("=")
        parts.append(pl.select(pl.when(is_value(frame[column], value)).then(pl.lit('"flip":true'))).to_series())
    if view in config.frame:
        parts.append(_frame(source, config.frame[view], result.problems))
    table = pl.DataFrame([part.rename(str(number)) for number, part in enumerate(parts)])
    inner = pl.concat_str(pl.all(), separator=",", ignore_nulls=True)
    result.json = table.select((pl.lit("{") + inner + pl.lit("}")).alias("selector")).to_series()
    return result


def _whole_numbers(series: pl.Series) -> pl.Series:
    """Int64, null where the cell is empty or no whole number."""
    number = series.cast(pl.Float64, strict=False)
    return number.set(number.is_not_null() & (number != number.floor()).fill_null(True), None).cast(
        pl.Int64, strict=False
    )


def _complain(
    problems: dict[int, list[str]], bad: pl.Series, message: Sequence[str] | str, source: Source, at: str
) -> None:
    for number in bad.arg_true().to_list():
        text = message if isinstance(message, str) else message[number]
        problems.setdefault(number, []).append(f"{source.where(source.rows[number], at)}: {text}")


def _box(source: Source, columns: Sequence[str], problems: dict[int, list[str]]) -> pl.Series:
    written = [source.frame[column] for column in columns]
    x0, y0, x1, y1 = numbers = [_whole_numbers(series) for series in written]
    empty = pl.select(pl.all_horizontal([series.is_null() for series in written])).to_series()
    known = pl.select(pl.all_horizontal([series.is_not_null() for series in numbers])).to_series()
    good = known & ((x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0)).fill_null(False)
    text = pl.select(
        pl.concat_str([series.cast(pl.String).fill_null("") for series in written], separator=",")
    ).to_series()
    messages = [f"box {item} is not left,upper,right,lower in whole pixels" for item in text.to_list()]
    _complain(problems, ~good & ~empty, messages, source, ",".join(columns))
    joined = pl.concat_str([series.cast(pl.String) for series in numbers], separator=",")
    return pl.select(pl.when(good).then(pl.lit('"box":[') + joined + pl.lit("]"))).to_series()


def _frame(source: Source, column: str, problems: dict[int, list[str]]) -> pl.Series:
    written = source.frame[column]
    number = _whole_numbers(written)
    good = (number >= 0).fill_null(False)
    messages = [f"frame {item!r} is not a whole number from 0" for item in written.cast(pl.String).to_list()]
    _complain(problems, ~good & written.is_not_null(), messages, source, column)
    return pl.select(pl.when(good).then(pl.lit('"frame":') + number.cast(pl.String))).to_series()
