"""What is predicted: target columns as class indices, 0/1 labels or numbers, with unknown ones masked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl

from featurecache.data.tables import as_text, is_value
from featurecache.errors import InputError, did_you_mean

TaskName = Literal["binary", "multiclass", "multilabel", "regression", "dense"]
MAX_NUMERIC_CLASSES = 20  # more distinct whole numbers than this are a quantity, not classes
MANY_CLASSES = 20  # more than this, and as many as half the samples, are ids or free text unless the task is given
_SHOWN = 5
_UNREAD = "the target can't be read"
_MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif")
_MEANING = {"ignore": None, "zero": "0", "one": "1"}
_UNKNOWN = ("", "nan", "NaN")  # the latter as numpy and pandas write it


@dataclass(frozen=True, eq=False)
class Target:
    """The labels of n samples.

    Attributes:
        task: `binary`, `multiclass`, `multilabel`, `regression`, or `dense` (see `featurecache.data.dense`).
        names: the target columns.
        classes: labels as text, in numeric order where all are numbers, else sorted; of two, the last is the positive
            one. Empty for multilabel and regression.
        values: binary and multiclass: int64 (n,), index into `classes`, -1 = unknown. Multilabel: float32 (n, labels)
            of 0, 1 and NaN = unknown. Regression: float32 (n, targets), NaN = unknown.
    """

    task: TaskName
    names: tuple[str, ...]
    classes: tuple[str, ...]
    values: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Samples (n, bool) with at least one known label."""
        if self.values.ndim == 1:
            return np.asarray(self.values >= 0)
        return np.asarray(~np.isnan(self.values).all(axis=1))

    def subset(self, rows: np.ndarray) -> Target:
        """The labels of these rows (indices or a mask), with the same classes."""
        return replace(self, values=self.values[rows])

    def __len__(self) -> int:
        return len(self.values)


def read_target(
    table: pl.DataFrame,
    names: Sequence[str],
    *,
    task: str = "auto",
    uncertain: Mapping[str, str] | None = None,
    source: str = "",
    classes: Sequence[str] | None = None,
) -> Target:
    """Read target columns.

    `auto`: several columns of 0, 1 and empty cells are multilabel, several columns of other numbers regression; one
    column of two distinct values is binary; of numbers with a fraction, or of more than 20 distinct numbers,
    regression; else multiclass. Whole numbers are the same label however written (1, 1.0).

    Args:
        table: one row per sample; a column `sample_id` names them in messages.
        names: target columns.
        task: `auto` or one of the tasks.
        uncertain: a value as text (`-1` stands for -1 and -1.0, too) -> `ignore` (unknown), `zero` or `one`.
        source: what messages begin with, such as the manifest's name.
        classes: classes to use instead of those found, such as those that a model was fitted on.

    Raises:
        InputError: no such column, a value that the task can't take (naming column, sample and value), fewer than two
            classes, as many classes as samples (with `auto` also more than 20 classes and half as many as samples), an
            uncertain value that no column holds. The last is let pass where `classes`, or multilabel or regression as
            the task, may be those of a model, whose new samples need not hold it; multilabel refuses unknown marks
            anyway.
    """
    head = f"{source}: " if source else ""
    if not names:
        raise InputError(f"{head}no target column given")
    problems = [
        f"no column {name!r}.{did_you_mean(name, table.columns)} Columns: {', '.join(table.columns[:20])}"
        for name in names
        if name not in table.columns
    ] + [f"target {name!r} is given twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if problems:
        raise InputError.from_problems(f"{head}{_UNREAD}", problems)
    columns = [_certain(table[name], uncertain or {}, head) for name in names]
    if classes is None and task not in ("multilabel", "regression"):
        _check_uncertain([table[name] for name in names], uncertain or {}, head)
    guessed = task == "auto"
    if guessed:
        task = "multiclass" if classes is not None and len(classes) > 2 else _guess(columns)
        task = "binary" if classes is not None and len(classes) == 2 else task
    if task in ("multilabel", "regression"):
        values = _numbers(table, columns, binary=task == "multilabel", head=head)
        if not (~np.isnan(values)).any():
            raise InputError(f"{head}{_named(names)}: no value is known")
        return Target(task, tuple(names), (), values)  # type: ignore[arg-type]
    if len(columns) > 1:
        raise InputError(f"{head}{len(columns)} target columns can't be {task}; use --task multilabel or regression")
    return _classes(table, columns[0], task, classes, head, guessed=guessed)


def _named(names: Sequence[str]) -> str:
    return f"column{'s' * (len(names) > 1)} {', '.join(repr(name) for name in names[:_SHOWN])}"


def _certain(series: pl.Series, uncertain: Mapping[str, str], head: str) -> pl.Series:
    """The column as text labels, with what uncertain values stand for."""
    if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object):
        raise InputError(f"{head}column {series.name!r} holds {series.dtype}, which can't be a target")
    if series.dtype.is_float():
        series = series.fill_nan(None)
    if series.dtype == pl.Boolean:
        text = series.cast(pl.Int8).cast(pl.String)
    else:
        text = as_text(series)
    for value, meaning in uncertain.items():
        if meaning not in _MEANING:
            raise InputError(f"--uncertain {value}={meaning}: it can mean ignore, zero or one")
        stands = pl.lit(_MEANING[meaning], dtype=pl.String)
        text = pl.select(pl.when(is_value(series, value)).then(stands).otherwise(text).alias(series.name)).to_series()
    known = ~text.str.strip_chars().is_in(_UNKNOWN)
    return pl.select(pl.when(known).then(text).alias(series.name)).to_series()


def _check_uncertain(columns: Sequence[pl.Series], uncertain: Mapping[str, str], head: str) -> None:
    """Refuse a value that no target column holds: most likely it is written otherwise there."""
    for value, meaning in uncertain.items():
        whole = [series.fill_nan(None) if series.dtype.is_float() else series for series in columns]
        if any(is_value(series, value).any() for series in whole):
            continue
        found = {label for series in whole for label in as_text(series.drop_nulls().unique()).to_list()}
        shown = _some(_sorted(found)) or "nothing"
        names = _named([series.name for series in columns])
        raise InputError(f"{head}--uncertain {value}={meaning}: no such value in {names}. Found: {shown}")


def _some(labels: Sequence[str]) -> str:
    """The first few, and how many there are besides."""
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(repr(_short(label)) for label in labels[:_SHOWN]) + more


def _short(label: str) -> str:
    return label if len(label) <= 40 else label[:39] + "…"


def _sorted(labels: Collection[str]) -> list[str]:
    """In numeric order where all are numbers, else as text."""
    if all(_is_number(label) for label in labels):
        return sorted(labels, key=lambda label: (float(label), label))
    return sorted(labels)


def _as_float(text: pl.Series) -> pl.Series:
    return text.cast(pl.Float64, strict=False)


def _commas(text: pl.Series) -> str:
    """What to do where a decimal comma is all that keeps a column from being numbers; else ''."""
    odd = text.filter(_as_float(text).is_null() & text.is_not_null())
    pointed = odd.str.replace(",", ".", literal=True)
    if not len(odd) or not _is_numeric(pointed):
        return ""
    return f" (decimal commas? write {pointed[0]} for {odd[0]})"


def _is_numeric(text: pl.Series) -> bool:
    return _as_float(text).null_count() == text.null_count()


def _guess(columns: Sequence[pl.Series]) -> str:
    if len(columns) > 1:
        binary = all(_as_float(text.drop_nulls()).is_in([0.0, 1.0]).fill_null(False).all() for text in columns)
        return "multilabel" if binary else "regression"
    text = columns[0]
    distinct = text.drop_nulls().n_unique()
    if distinct <= 2:
        return "binary"
    if not _is_numeric(text):
        return "multiclass"
    number = _as_float(text).drop_nulls()
    return "regression" if distinct > MAX_NUMERIC_CLASSES or (number != number.floor()).any() else "multiclass"


def _places(table: pl.DataFrame, series: pl.Series, wrong: pl.Series) -> str:
    """`sample 'p17' (row 17): 'abc'`, for the first few."""
    rows = wrong.arg_true().to_list()
    ids = table["sample_id"] if "sample_id" in table.columns else None
    shown = [
        (f"sample {ids[row]!r} (row {row + 1})" if ids is not None else f"row {row + 1}") + f": {series[row]!r}"
        for row in rows[:_SHOWN]
    ]
    return "; ".join(shown) + (f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")


def _numbers(table: pl.DataFrame, columns: Sequence[pl.Series], *, binary: bool, head: str) -> np.ndarray:
    problems: list[str] = []
    values = np.full((table.height, len(columns)), np.nan, dtype=np.float32)
    for index, text in enumerate(columns):
        number = _as_float(text)
        good = number.is_in([0.0, 1.0]) if binary else number.is_finite() & (number.abs() <= np.finfo(np.float32).max)
        wrong = text.is_not_null() & ~good.fill_null(False)
        if wrong.any():
            what = (
                "multilabel targets are 0, 1 or empty" if binary else "regression targets are finite numbers or empty"
            )
            hint = " (give --uncertain VALUE=ignore|zero|one for other marks)" if binary else _commas(text)
            problems.append(f"column {text.name!r}: {what}{hint}; found {_places(table, text, wrong)}")
        else:
            values[:, index] = number.fill_null(np.nan).to_numpy()
    if problems:
        raise InputError.from_problems(f"{head}{_UNREAD}", problems)
    return values


def _classes(
    table: pl.DataFrame, text: pl.Series, task: str, classes: Sequence[str] | None, head: str, *, guessed: bool
) -> Target:
    found = text.drop_nulls().unique().to_list()
    if classes is None:
        labels = _sorted(found)
        if not labels:
            raise InputError(f"{head}column {text.name!r}: no value is known")
        if len(labels) < 2:
            raise InputError(f"{head}column {text.name!r}: only one class, {labels[0]!r}; at least two are needed")
        if task != "binary":
            _check_repeated(labels, text, head, guessed=guessed)
    else:
        labels = list(classes)
        wrong = text.is_not_null() & ~text.is_in(labels)
        if wrong.any():
            known = ", ".join(labels[:20])
            raise InputError(
                f"{head}column {text.name!r}: not one of the classes {known}: {_places(table, text, wrong)}"
            )
    if task == "binary" and len(labels) != 2:
        shown = ", ".join(labels[:10])
        raise InputError(f"{head}column {text.name!r}: binary needs two classes, but there are {len(labels)}: {shown}")
    index = text.replace_strict(labels, list(range(len(labels))), default=None, return_dtype=pl.Int64)
    values = index.fill_null(-1).to_numpy().astype(np.int64)
    return Target("binary" if task == "binary" else "multiclass", (text.name,), tuple(labels), values)


def _check_repeated(labels: Sequence[str], text: pl.Series, head: str, *, guessed: bool) -> None:
    """Refuse a class per sample, and, unless the task was given, a class for every two, or many with decimal commas."""
    n = len(text) - text.null_count()
    every, commas = 2 < len(labels) == n, _commas(text)
    if not every and not (guessed and len(labels) > MANY_CLASSES and (commas or 2 * len(labels) >= n)):
        return
    other = ", or --task regression if it is a quantity" if commas or all(map(_is_number, labels)) else ""
    if labels[0].lower().endswith(_MASKS):
        other = ", or --head decoder if these are mask images"
    if not every:
        other += ", or --task multiclass if these are classes"
    many = f"as many classes as samples ({n})" if every else f"{len(labels)} classes for {n} samples"
    raise InputError(
        f"{head}column {text.name!r} has {many}: {_some(labels)}. "
        f"Ids and free text can't be learned: a class needs several samples. Give another --target{other}{commas}."
    )


def _is_number(label: str) -> bool:
    try:
        return bool(np.isfinite(float(label)))
    except ValueError:
        return False
