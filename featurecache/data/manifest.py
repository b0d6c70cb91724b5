"""The manifest (CSV, Parquet or folder, wide or long) as rows of samples and cells of images; all problems at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import polars as pl

from featurecache.amounts import counted
from featurecache.config import ANY_VIEW, AUTO, ManifestConfig, for_view
from featurecache.data.choice import choose_reader, folder_suffixes
from featurecache.data.layouts import Layout, read_long, read_wide
from featurecache.data.paths import Early, locate
from featurecache.data.selectors import selector_columns, selector_shape_problems
from featurecache.data.tables import Source, read_source
from featurecache.errors import InputError, did_you_mean

# Without --view: a table with one of these columns has the one view `image`.
IMAGE_COLUMNS = ("image", "image_path", "path", "filepath", "file_path", "file", "filename", "file_name")
_VIEW_NAME = re.compile(r"\w[\w.-]*")

T = TypeVar("T", bound=ManifestConfig)


@dataclass(frozen=True, eq=False)
class Manifest:
    """The samples and where their images are.

    Attributes:
        path: of the table or folder, resolved.
        digest: SHA-256 (hex) of the file's bytes; of a folder, of its sorted relative paths.
        table: one row per sample: `sample_id` (String, unique) first, then the other columns. In CSV, columns that hold
            only numbers are numbers; ids and paths stay text.
        views: in the order in which they were asked for.
        cells: one row per sample, view and ordinal, absent ones too, in the order of samples, `views` and ordinals:
            sample (UInt32, row of `table`), view (String), ordinal (Int32), value (String, as written; null = absent),
            location (String, absolute path without links; null for text and absent cells), kind (String, `file` or
            `text`), selector (String, canonical JSON), row (Int64, line of a CSV, else record counted from 1).
        multi: what is done with several images of a view.
        readers: per view the name of its reader, as given or as its files decided.
        varying: long layout: columns that are not in `table`, since they differ within a sample -> why, naming rows.
        notes: what a user should know of how it was read.
    """

    path: Path
    digest: str
    table: pl.DataFrame
    views: tuple[str, ...]
    cells: pl.DataFrame
    multi: str
    readers: Mapping[str, str]
    varying: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> pl.Series:
        """A column of the table.

        Raises:
            InputError: there is none; names the nearest one, or the rows that differ within a sample.
        """
        if name in self.varying:
            raise InputError(f"{self.path.name}: {self.varying[name]}")
        if name not in self.table.columns:
            known = ", ".join(self.table.columns[:20])
            near = did_you_mean(name, self.table.columns)
            raise InputError(f"{self.path.name}: no column {name!r}.{near} Columns: {known}")
        return self.table[name]


def read_manifest(config: ManifestConfig, *, images: bool = True, early: Early | None = None) -> Manifest:
    """Read and check a manifest.

    Wide layout: a row per sample; `views` maps view names to a column, or to several (`COL1,COL2`) that hold several
    images of the view. Long layout: a row per image; `views` maps view names to values of `view_column`; rows of other
    values are left out, and so are samples that have no other rows. Without `views`, the wide layout looks for a column
    named as in IMAGE_COLUMNS, and the long one takes every value as a view.

    An empty cell means that the view is absent. Ordinals count the images that are there: from 0, in the order of the
    columns or rows. With `multi="first"` only ordinal 0 is kept.

    Args:
        config: which, and how it is to be read.
        images: whether the image files must be there; without, `location` says where they should be.
        early: told where the files most likely are, before they are looked for.

    Raises:
        MissingFileError: no such file or folder.
        InputError: everything that is wrong, found at once (`problems`), each with file, line or row, and column.
    """
    source = read_source(config.manifest, suffixes=folder_suffixes(for_view(config.reader, "image", AUTO)))
    problems = [*source.problems, *_option_problems(config)]
    for column, option in selector_columns(config):
        problems += [complaint] if (complaint := source.missing(column, option)) else []
    if problems and len(problems) > len(source.problems):
        # Selectors can't be made; still say what is wrong with the columns of the views.
        config = config.model_copy(update={"box": {}, "frame": {}, "flip_if": {}})
    views = dict(config.views) or _default_views(source, config)
    layout = read_long(source, config, views) if config.layout == "long" else read_wide(source, config, views)
    problems += layout.problems
    problems += _unknown_views(config, layout.views)
    advice: list[str] = []
    cells = _locate(source, config, layout, problems, advice, images=images, early=early)
    readers, odd = _readers(source, config, layout.views, cells)
    problems = odd + problems
    if problems:
        raise InputError.from_problems(f"{source.shown}: {counted(len(problems), 'problem')}", problems, advice=advice)
    columns = ["sample", "view", "ordinal", "value", "location", "kind", "selector", "row"]
    return Manifest(
        path=source.path.resolve(),
        digest=source.digest,
        table=layout.table,
        views=layout.views,
        cells=cells.select(columns),
        multi=config.multi,
        readers=readers,
        varying=layout.varying,
        notes=_notes(source),
    )


def _notes(source: Source) -> tuple[str, ...]:
    if source.separator == "," or source.path.suffix.lower() == ".tsv":
        return ()
    return (f"{source.shown}: read with {source.separator!r} between the cells, as its header has it",)


def with_readers(config: T, manifest: Manifest) -> T:
    """The configuration with the readers that the manifest's files decided on, as if they had been given."""
    names = dict(manifest.readers)
    return config.model_copy(
        update={"reader": {ANY_VIEW: min(names.values())} if len(set(names.values())) == 1 else names}
    )


def _readers(
    source: Source, config: ManifestConfig, views: tuple[str, ...], cells: pl.DataFrame
) -> tuple[dict[str, str], list[str]]:
    """Per view its reader; and complaints."""
    readers, problems = {}, []
    for view in views:
        readers[view] = for_view(config.reader, view, AUTO)
        if readers[view] == AUTO:
            readers[view], odd = choose_reader(source, view, cells.filter(pl.col("view") == view))
            problems += odd
    return readers, problems


def _option_problems(config: ManifestConfig) -> list[str]:
    problems = selector_shape_problems(config)
    for view in config.views:
        if not _VIEW_NAME.fullmatch(view):
            problems.append(f"--view {view}=...: a view's name is made of letters, digits, '_', '-' and '.'")
    return problems


def _default_views(source: Source, config: ManifestConfig) -> dict[str, str]:
    if config.layout == "long":
        return {}
    for column in IMAGE_COLUMNS:
        if column in source.frame.columns:
            return {"image": column}
    raise InputError(
        f"{source.shown}: which columns hold images? Give --view NAME=COLUMN for each view. "
        f"Columns: {', '.join(source.frame.columns[:20])}"
    )


def _unknown_views(config: ManifestConfig, views: tuple[str, ...]) -> list[str]:
    options: dict[str, Mapping[str, object]] = {
        "--box": config.box,
        "--frame": config.frame,
        "--flip-if": config.flip_if,
        "--reader": config.reader,
        "--reader-set": config.reader_settings,
    }
    return [
        f"{option} {view}=...: there is no view {view!r}.{did_you_mean(view, views)} Views: {', '.join(views)}"
        for option, mapping in options.items()
        for view in mapping
        if view != "*" and view not in views
    ]


def _locate(
    source: Source,
    config: ManifestConfig,
    layout: Layout,
    problems: list[str],
    advice: list[str],
    *,
    images: bool,
    early: Early | None,
) -> pl.DataFrame:
    """Add kind and location; complain of files that are missing or outside the root, and say what to do."""
    text = [view for view in layout.views if for_view(config.reader, view, AUTO) == "text"]
    cells = layout.cells.with_columns(
        pl.when(pl.col("view").is_in(text)).then(pl.lit("text")).otherwise(pl.lit("file")).alias("kind")
    )
    root = config.root if config.root is not None else (source.path if source.path.is_dir() else source.path.parent)
    if images and not Path(root).is_dir():
        problems.append(f"--root {root}: no such folder")
        return cells.with_columns(pl.lit(None, dtype=pl.String).alias("location"))
    wanted = cells.filter((pl.col("kind") == "file") & pl.col("value").is_not_null())
    located = locate(wanted["value"], str(root), allow_outside=config.allow_outside, early=early)
    if not images:
        located = _expected(located, str(root))
    cells = cells.join(located, on="value", how="left", maintain_order="left").with_columns(
        pl.when(pl.col("kind") == "file").then("location").alias("location")
    )
    wrong = cells.filter((pl.col("kind") == "file") & pl.col("problem").is_not_null())
    for row, column, value, problem in wrong.select("row", "column", "value", "problem").iter_rows():
        problems.append(f"{source.where(row, column)}: {value} {_sentence(problem)}")
    missing = wrong["problem"].str.starts_with("no such file").sum()
    if missing and missing * 2 >= wanted.height:
        advice.append(
            f"{missing} of {wanted.height} files are missing. Paths are relative to {root}; if they are relative to "
            "another folder, give --root DIR."
        )
    elif missing:
        advice.append(
            "A file that is listed has to be there, or its sample would lose a view unnoticed. Restore it, or empty "
            "its cell: the view then counts as missing. (--on-error skip is for files that are there, but unreadable.)"
        )
    if wrong["problem"].str.starts_with("leaves the root").any():
        advice.append("paths that leave the root are refused unless you give --allow-outside")
    return cells


def _expected(located: pl.DataFrame, root: str) -> pl.DataFrame:
    """Files that are gone are no problem: where they would be."""
    gone = located["problem"].str.starts_with("no such file").fill_null(False)
    places = [
        os.path.realpath(os.path.join(root, value)) if missing else location
        for value, location, missing in zip(located["value"], located["location"], gone, strict=True)
    ]
    return located.with_columns(
        pl.Series("location", places, dtype=pl.String), problem=pl.when(~gone).then(pl.col("problem"))
    )


def _sentence(problem: str) -> str:
    return f"is missing: {problem}" if problem.startswith("no such file") else problem
