"""Reading the table behind a manifest: CSV, Parquet or an image folder, with the line that each record stands on."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from featurecache.amounts import counted
from featurecache.errors import InputError, MissingFileError, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
ARRAY_SUFFIXES = (".npy",)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SEPARATORS = (",", ";", "\t", "|")
_HEAD = 1 << 16  # characters in which the header is looked for


@dataclass(frozen=True)
class Source:
    """A table as it was found.

    Attributes:
        path: resolved.
        shown: the path as the user wrote it, for messages.
        digest: SHA-256 (hex) of the file's bytes; of a folder, of its sorted relative paths.
        frame: the records; from CSV all text, from Parquet with their types. Empty cells are null.
        rows: per record its line in a CSV (the header is line 1), else its number, counted from 1.
        unit: `line` or `row`.
        problems: what is wrong with single records.
        separator: between the cells of a CSV.
    """

    path: Path
    shown: str
    digest: str
    frame: pl.DataFrame
    rows: pl.Series
    unit: str
    problems: tuple[str, ...] = ()
    separator: str = ","

    def where(self, row: int | None = None, column: str | None = None) -> str:
        """`manifest.csv, line 3, column 'frontal'`, to begin a message with."""
        parts = [self.shown]
        if row is not None:
            parts.append(f"{self.unit} {row}")
        if column is not None:
            parts.append(f"column {column!r}")
        return ", ".join(parts)

    def missing(self, column: str, option: str) -> str | None:
        """A complaint if there is no such column, naming the nearest one."""
        if column in self.frame.columns:
            return None
        columns = self.frame.columns
        message = f"{self.shown}: no column {column!r} ({option}).{did_you_mean(column, columns)} "
        return message + (_meant(columns, self.separator) or f"Columns: {', '.join(columns[:20])}")


def read_source(path: Path, *, suffixes: Collection[str] = IMAGE_SUFFIXES) -> Source:
    """Read CSV (also with `;`, tabs or `|` between the cells), Parquet or an image folder.

    Args:
        path: file or folder.
        suffixes: which files of a folder count, in lower case.

    Raises:
        MissingFileError: there is nothing at `path`.
        InputError: not a table, or an empty one.
    """
    shown, path = str(path), Path(os.path.abspath(path))
    if path.is_dir():
        return _read_folder(path, shown, suffixes)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        beside = sorted(
            file.name for file in path.parent.glob("*") if file.suffix.lower() in (".csv", ".parquet", ".tsv")
        )
        same = [name for name in beside if Path(name).stem == path.name]  # the suffix was left out
        near = f" Did you mean {same[0]!r}?" if same else did_you_mean(path.name, beside)
        raise MissingFileError(f"{shown}: no such file or folder{'.' if near else ''}{near}") from None
    except OSError as error:
        raise InputError(f"{shown}: can't be read: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith(b"PAR1"):
        return _read_parquet(path, shown, digest, data)
    if path.suffix.lower() in (".parquet", ".pq"):
        raise InputError(f"{shown}: {_no_parquet(data)}")
    if path.suffix.lower() not in (".csv", ".tsv", ".txt", ""):
        raise InputError(f"{shown}: a manifest is a CSV or Parquet file or a folder of images, not {path.suffix!r}")
    return _read_csv(path, shown, digest, data)


def _no_parquet(data: bytes) -> str:
    """What is wrong with a file that is named as Parquet but does not begin as one."""
    if not data:
        return "the file is empty"
    return "not a Parquet file, or a damaged one: it does not begin with 'PAR1'"


def _decode(data: bytes, shown: str) -> str:
    if not data.strip():
        raise InputError(f"{shown}: the file is empty")
    if b"\0" in data:
        raise InputError(f"{shown}: not a text file (it holds zero bytes); a CSV must be UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{shown}, line {line}: not UTF-8 ({error.reason}). Save the table as UTF-8.") from None


def _separator(text: str, suffix: str) -> str:
    """What stands between the cells: the comma if it divides the header, else what divides it into most.

    Where commas are decimal, spreadsheets save a .csv with semicolons.
    """
    if suffix == ".tsv":
        return "\t"
    widths = {mark: 0 for mark in SEPARATORS}
    for mark in SEPARATORS:
        with contextlib.suppress(csv.Error):
            head = csv.reader(io.StringIO(text[:_HEAD], newline=""), delimiter=mark, strict=True)
            widths[mark] = len(next((record for record in head if record), []))
    return "," if widths[","] > 1 else max(SEPARATORS, key=widths.__getitem__)


def _meant(columns: Sequence[str], separator: str) -> str:
    """What to do where names of columns hold another separator as often as there are columns, or ''."""
    names = "".join(columns)
    other = next((mark for mark in SEPARATORS if mark != separator and names.count(mark) >= len(columns)), None)
    if other is None:
        return ""
    return (
        f"Its cells look separated by {other!r}, but the header also holds {separator!r}, which is taken first: "
        "rename the column that has it, or save the table with tabs as .tsv."
    )


def _read_csv(path: Path, shown: str, digest: str, data: bytes) -> Source:
    text = _decode(data, shown)
    delimiter = _separator(text, path.suffix.lower())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next((record for record in reader if record), [])
        first = reader.line_num + 1
        plain = _plain_records(data, delimiter, len(header)) if first == 2 else None
        records = list(reader) if plain is None else []
    except csv.Error as error:
        raise InputError(f"{shown}, line {reader.line_num}: not valid CSV: {error}") from None
    names = [name.strip() or f"column_{number}" for number, name in enumerate(header, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{shown}, line {first - 1}: column {twice[0]!r} is there {names.count(twice[0])} times")
    if plain is not None:
        frame = plain.rename(dict(zip(plain.columns, names, strict=True))).with_columns(_emptied())
        numbers = pl.int_range(2, frame.height + 2, eager=True).rename("row")
        return Source(path, shown, digest, frame, numbers, "line", separator=delimiter)
    if not any(records):
        raise InputError(f"{shown}: the table is empty: a header, but no rows")
    lines: Sequence[int] = range(first, first + len(records))
    problems: list[str] = []
    if reader.line_num != first + len(records) - 1 or {len(record) for record in records} != {len(names)}:
        records, lines, problems = _by_line(text, delimiter, len(names), shown)
        if problems and (meant := _meant(names, delimiter)):
            raise InputError(f"{shown}: {counted(len(problems), 'line')} not as long as the header. {meant}")
    columns = zip(*records, strict=True) if records else ([] for _ in names)
    series = [pl.Series(name, column, dtype=pl.String) for name, column in zip(names, columns, strict=True)]
    frame = pl.DataFrame(series).with_columns(_emptied())
    rows = pl.Series("row", lines, dtype=pl.Int64)
    return Source(path, shown, digest, frame, rows, "line", tuple(problems), delimiter)


def _plain_records(data: bytes, delimiter: str, width: int) -> pl.DataFrame | None:
    """The records of a table in which every line is one of the same width and nothing is quoted; None for any other.

    It takes a tenth of the time and memory of the reader for all tables.
    """
    data = data.replace(b"\r\n", b"\n")
    if b'"' in data or b"\r" in data:
        return None
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw == ord("\n"))
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    widths = np.diff(np.searchsorted(np.flatnonzero(raw == ord(delimiter)), ends), prepend=0) + 1
    lengths = np.diff(ends, prepend=-1) - 1
    if len(ends) < 2 or (widths != width).any() or not lengths.all():
        return None
    body = io.BytesIO(data[ends[0] + 1 :])
    return pl.read_csv(body, has_header=False, separator=delimiter, quote_char=None, infer_schema=False)


def _by_line(text: str, delimiter: str, width: int, shown: str) -> tuple[list[list[str]], Sequence[int], list[str]]:
    """The slow way, for line breaks within cells, blank lines and records of another length."""
    records: list[list[str]] = []
    lines: list[int] = []
    problems: list[str] = []
    last, header = 0, True
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for record in reader:
        line, last = last + 1, reader.line_num
        if not record:
            continue
        if header:
            header = False
        elif len(record) != width:
            problems.append(f"{shown}, line {line}: {len(record)} cells where the header has {width}")
        else:
            records.append(record)
            lines.append(line)
    return records, lines, problems


def _emptied() -> pl.Expr:
    """Text cells that hold nothing but white space become null."""
    text = pl.col(pl.String)
    return pl.when(text.str.strip_chars() != "").then(text)


def _read_parquet(path: Path, shown: str, digest: str, data: bytes) -> Source:
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{shown}: not a valid Parquet file: {' '.join(str(error).split())[:200]}") from None
    if frame.height == 0:
        raise InputError(f"{shown}: the table is empty: columns, but no rows")
    labels = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.Categorical | pl.Enum)]
    frame = frame.with_columns(pl.col(labels).cast(pl.String)).with_columns(
        _emptied(), pl.col(pl.Float32, pl.Float64).fill_nan(None)
    )
    return Source(path, shown, digest, frame, pl.Series("row", range(1, frame.height + 1), dtype=pl.Int64), "row")


def _read_folder(path: Path, shown: str, suffixes: Collection[str]) -> Source:
    names = sorted(_walk(path, "", suffixes, {os.path.realpath(path)}))
    files = [name for name in names if not _surrogates(name)]
    unspeakable = [ascii(name) for name in names if _surrogates(name)]
    if not names:
        raise InputError(f"{shown}: the folder holds no images ({', '.join(suffixes)}) and no class folders with any")
    ids = [os.path.splitext(file)[0] for file in files]
    classes = [file.split("/", 1)[0] if "/" in file else None for file in files]
    held: dict[str, str] = {}
    problems = [f"{shown}: file name {name} is not valid Unicode; rename it" for name in unspeakable]
    problems += [
        f"{shown}: {held[name]} and {file} have the same name but for the suffix, and so the same sample id"
        for name, file in zip(ids, files, strict=True)
        if held.setdefault(name, file) != file
    ]
    schema = {"sample_id": pl.String, "image": pl.String, "class": pl.String}
    frame = pl.DataFrame({"sample_id": ids, "image": files, "class": classes}, schema=schema)
    digest = hashlib.sha256("\n".join(files).encode()).hexdigest()
    rows = pl.Series("row", range(1, len(files) + 1), dtype=pl.Int64)
    return Source(path, shown, digest, frame, rows, "row", tuple(problems))


def _surrogates(name: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in name)


def _walk(path: Path | str, prefix: str, suffixes: Collection[str], seen: set[str]) -> Iterator[str]:
    """Relative paths of all images; hidden files and folders are left out, links are followed but never in circles."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            folder = os.path.realpath(entry.path) if entry.is_dir() else None
            if folder is not None and folder not in seen:
                yield from _walk(entry.path, f"{prefix}{entry.name}/", suffixes, seen | {folder})
            elif folder is None and os.path.splitext(entry.name)[1].lower() in suffixes:
                yield prefix + entry.name


def typed(frame: pl.DataFrame, keep: Collection[str]) -> pl.DataFrame:
    """Text columns whose every value is a number, as numbers; those of `keep` stay text.

    Text stays text where a number would lose something: leading zeros (`007`), or integers beyond 64 bit.
    """
    columns = []
    for series in frame.get_columns():
        if series.dtype == pl.String and series.name not in keep and series.null_count() < series.len():
            series = _as_number(series)
        columns.append(series)
    return pl.DataFrame(columns)


def _as_number(series: pl.Series) -> pl.Series:
    head = series.drop_nulls().head(100)
    if head.cast(pl.Float64, strict=False).null_count() or series.str.contains(r"^[+-]?0\d").any():
        return series
    whole = series.cast(pl.Int64, strict=False)
    if whole.null_count() == series.null_count():
        return whole
    real = series.cast(pl.Float64, strict=False)
    if real.null_count() != series.null_count() or series.str.contains(r"^[+-]?\d{16,}$").any():
        return series
    return real.fill_nan(None)


def is_value(series: pl.Series, text: str) -> pl.Series:
    """Which cells hold a value given as text: the same text, or the same number (`-1` is -1 and -1.0)."""
    same = series.cast(pl.String) == text
    try:
        number = float(text)
    except ValueError:
        return same.fill_null(False)
    return (same | (series.cast(pl.Float64, strict=False) == number).fill_null(False)).fill_null(False)


def as_text(series: pl.Series) -> pl.Series:
    """Labels as text: whole numbers without a decimal point, so that 1, 1.0 and '1' are the same label."""
    if series.dtype.is_float():
        whole = (series == series.floor()) & (series.abs() <= 2**53)
        if (whole | series.is_null()).all():
            return series.cast(pl.Int64).cast(pl.String)
    return series.cast(pl.String)
