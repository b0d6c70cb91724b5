"""Which reader a view has where none was named: decided by the suffixes of its files, or by how those without begin."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from featurecache.config import AUTO
from featurecache.data.tables import ARRAY_SUFFIXES, DICOM_SUFFIXES, IMAGE_SUFFIXES, Source

ARCHIVE = ".npz"
_READERS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(ARRAY_SUFFIXES, "array"),
    **dict.fromkeys(DICOM_SUFFIXES, "dicom"),
}
_LOOKED_INTO = 16  # files without a suffix that says what they are; evenly over the column, so always the same ones
_SHOWN = 3


def choose_reader(source: Source, view: str, cells: pl.DataFrame) -> tuple[str, list[str]]:
    """The reader that all files of a view are for.

    A known suffix decides, whatever the file holds. Of the others (none, or as in names made of DICOM UIDs) at most 16
    are opened: DICOM and NumPy files say at their start what they are, and all else is left to the image reader, which
    knows formats by their first bytes.

    Args:
        source: of the manifest, for messages.
        view: which.
        cells: of the view, with value, location, row and column.

    Returns:
        `image`, `dicom` or `array`; and complaints: files for different readers, an archive, texts that are no files.
    """
    held = cells.filter(pl.col("value").is_not_null())
    suffix = pl.col("value").str.to_lowercase().str.extract(r"(\.[^./\\]+)$")
    held = held.with_columns(
        suffix.replace_strict({**_READERS, ARCHIVE: ARCHIVE}, default=None, return_dtype=pl.String).alias("reader")
    )
    known, others = held.filter(pl.col("reader").is_not_null()), held.filter(pl.col("reader").is_null())
    if not known.height and _are_texts(others):
        first = others.row(0, named=True)
        return "image", [
            f"{source.where(None, first['column'])}: none of its {others.height:,} values is a file, such as "
            f"{first['value'][:40]!r}. If they are texts, give --reader {view}=text"
        ]
    found = {name: held.filter(pl.col("reader") == name).head(_SHOWN) for name in known["reader"].unique().sort()}
    opened = others.filter(pl.col("location").is_not_null()).unique("location", keep="first", maintain_order=True)
    opened = opened.gather_every(max(1, -(-opened.height // _LOOKED_INTO)))
    kinds = pl.Series("reader", [_look(path) for path in opened["location"]], dtype=pl.String)
    for (name,), rows in opened.with_columns(kinds).group_by("reader", maintain_order=True):
        found[str(name)] = pl.concat([found[str(name)], rows]).head(_SHOWN) if name in found else rows.head(_SHOWN)
    if ARCHIVE in found:
        places = _places(found[ARCHIVE])
        return "array", [
            f"view {view!r}: {places}: an archive of arrays, which no reader takes. Save each array by itself, as .npy "
            f"(numpy.save), or give --reader {view}=package.module:function"
        ]
    if len(found) > 1:
        parts = "; ".join(f"{name}: {_places(rows)}" for name, rows in sorted(found.items()))
        return min(found), [
            f"view {view!r}: its files are for different readers ({source.unit}s). {parts}. A view has one: convert "
            f"the files, make two views of them, or give --reader {view}=NAME, and what that one can't read is listed "
            "as failed"
        ]
    return next(iter(found), "image"), []


def reader_of_file(path: Path) -> str:
    """The reader for one file: by its suffix, else by how it begins."""
    return _READERS.get(path.suffix.lower()) or _look(str(path))


def folder_suffixes(reader: str) -> tuple[str, ...]:
    """Which files of a folder a reader of the view `image` is for, in lower case."""
    return tuple(suffix for suffix, name in _READERS.items() if reader in (name, AUTO)) or IMAGE_SUFFIXES


def _are_texts(cells: pl.DataFrame) -> bool:
    """Whether no cell can be meant as a path: none is there, and none names a folder or has a suffix."""
    return bool(
        cells.height
        and cells["location"].null_count() == cells.height
        and not cells["value"].str.contains(r"[/\\]|\.\w+$").any()
    )


def _look(path: str) -> str:
    try:
        with open(path, "rb") as handle:
            start = handle.read(132)
    except OSError:
        return "image"  # it is told of, or tried again, when it is read
    if start[128:] == b"DICM":
        return "dicom"
    return "array" if start.startswith(b"\x93NUMPY") else "image"


def _places(rows: pl.DataFrame) -> str:
    return ", ".join(f"{row} ({value})" for row, value in rows.select("row", "value").iter_rows())
