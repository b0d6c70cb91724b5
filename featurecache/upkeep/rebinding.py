"""Keeps a dataset true to its manifest: notices that the file has changed, and rebinds corrected labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from featurecache.config import AUTO, ManifestConfig, for_view
from featurecache.data.choice import folder_suffixes
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.readers.base import ReadFailure
from featurecache.data.selectors import selector_columns
from featurecache.data.tables import read_source
from featurecache.errors import InputError
from featurecache.stageone.keys import Cells, Keys, last_keys, present_cells, read_payload, unchanged
from featurecache.store.binding import CELL_SCHEMA, Binding
from featurecache.store.store import FeatureStore

Place = tuple[str, str, int]  # sample id, view, ordinal


def short_list(ids: Sequence[str], shown: int = 5) -> str:
    """`a, b, c and 12 more`."""
    listed = ", ".join(str(name) for name in ids[:shown])
    return f"{listed} and {len(ids) - shown} more" if len(ids) > shown else listed


def manifest_digest(binding: Binding) -> str | None:
    """The digest of a binding's manifest as it is on disk now; None where it is gone."""
    path = Path(binding.manifest_path)
    if path.is_dir():
        reader = for_view(binding.config["manifest"]["reader"], "image", AUTO)
        return read_source(path, suffixes=folder_suffixes(reader)).digest
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return None


def check_fresh(binding: Binding) -> None:
    """Stop where the manifest on disk is no longer the one that was bound (a corrected label, a new row).

    A manifest that is gone is no change: the store holds its table.

    Raises:
        InputError: says how to go on.
    """
    path = binding.manifest_path
    if manifest_digest(binding) not in (None, binding.manifest_digest):
        raise InputError(
            f"{path} has changed since dataset {binding.name!r} was made from it. If only labels changed, give "
            f"--manifest {path} (computes nothing); if images changed or rows came, run `featurecache extract` again "
            "(only new content is computed)."
        )


def rebind(store: FeatureStore, binding: Binding, path: Path) -> Binding:
    """Take labels, groups and splits from a corrected manifest, whose images must all have been extracted before.

    The manifest is read as the dataset's own was; relative image paths start from the same folder, wherever it lies.
    Samples may be fewer, or in another order. Images are compared by content, or, where their files are gone, by what
    was remembered of them. Nothing is computed.

    Args:
        store: open for writing.
        binding: the dataset.
        path: of the corrected manifest; may be that of the dataset.

    Raises:
        InputError: the manifest names images that were not extracted, each with row and view.
    """
    config = ManifestConfig.create({**binding.config["manifest"], "manifest": path})
    folder = Path(binding.manifest_path).parent
    if config.root is None and not path.is_dir() and path.resolve().parent != folder:
        config = config.model_copy(update={"root": folder})
    manifest = read_manifest(config, images=False)
    cells = known_cells(store, binding, manifest, config)
    bound = replace(
        binding,
        manifest_path=str(manifest.path),
        manifest_digest=manifest.digest,
        table=manifest.table,
        config={**binding.config, "manifest": config.model_dump(mode="json")},
        cells=cells,
    )
    store.bind(bound, replace=True)
    return bound


def known_cells(store: FeatureStore, binding: Binding, manifest: Manifest, config: ManifestConfig) -> pl.DataFrame:
    """The cells of a manifest with the keys and states that the store has for them.

    Raises:
        InputError: some were not extracted.
    """
    ids = binding.table["sample_id"].to_list()
    columns = ("sample", "view", "ordinal", "key", "state")
    before: dict[Place, tuple[bytes | None, str]] = {}
    states: dict[str, dict[bytes, str]] = {view: {} for view in binding.recipes}
    for sample, view, ordinal, key, state in binding.cells.select(columns).iter_rows():
        before[ids[sample], view, ordinal] = (key, state)
        if key is not None:
            states[view][key] = state
    same = _Unchanged(binding, manifest, config)
    cells = present_cells(manifest.cells)
    known = content_keys(store, cells)
    extracted = _extracted(store, binding, cells, known)
    keys = {index: key for index, key in zip(cells.indices.tolist(), known.to_list(), strict=True) if key is not None}
    names = manifest.table["sample_id"].to_list()
    found: list[tuple[bytes | None, str]] = []
    problems = []
    rows = manifest.cells.select("sample", "view", "ordinal", "value", "row").iter_rows()
    for index, (sample, view, ordinal, value, row) in enumerate(rows):
        key, old = keys.get(index), before.get((names[sample], view, ordinal))
        if value is None:
            found.append((None, "absent"))
        elif key is not None and key in states.get(view, ()):
            found.append((key, states[view][key]))
        elif index in extracted:
            found.append((key, "done"))
        elif old is not None and old[0] is None and old[1] in ("pending", "failed"):
            found.append(old)
        elif old is not None and key is None and same(names[sample], view):
            found.append(old)
        else:
            why = "is gone, and nothing is remembered of it" if key is None else "was not extracted"
            problems.append(f"row {row}, view {view!r}: {value} {why}")
    if problems:
        raise InputError.from_problems(
            f"{manifest.path}: not the images of dataset {binding.name!r}; run `featurecache extract` on it "
            "(only new content is computed)",
            problems,
        )
    return manifest.cells.select("sample", "view", "ordinal").with_columns(
        pl.Series("key", [key for key, _ in found], dtype=CELL_SCHEMA["key"]),
        pl.Series("state", [state for _, state in found], dtype=CELL_SCHEMA["state"]),
    )


def content_keys(store: FeatureStore, cells: Cells) -> Keys:
    """Keys of the cells; a file is read only if it may have changed, and where it is gone, what it held counts."""
    keys = unchanged(cells, store)
    last = last_keys(cells, store)
    for place in np.flatnonzero(~keys.known).tolist():
        cell = cells[place]
        if cell.kind == "file" and not os.path.exists(cell.location):
            key = last[place]
        else:
            payload = read_payload(cell)
            key = None if isinstance(payload, ReadFailure) else payload.key
        if key is not None:
            keys[place] = key
    return keys


def _extracted(store: FeatureStore, binding: Binding, cells: Cells, keys: Keys) -> set[int]:
    """Indices of the cells whose content has a row in the recipe of their view."""
    views = cells.column("view")
    found: set[int] = set()
    for view, recipe in binding.recipes.items():
        mine = np.flatnonzero((views == view).to_numpy() & keys.known)
        found.update(cells.indices[mine[store.rows(recipe, keys.values[mine]) >= 0]].tolist())
    return found


class _Unchanged:
    """Whether a sample's cells of a view are written as they were: for images of which nothing else is known."""

    def __init__(self, binding: Binding, manifest: Manifest, config: ManifestConfig) -> None:
        self._tables: list[tuple[pl.DataFrame, dict[str, int]]] = []
        for table in (binding.table, manifest.table):
            self._tables.append((table, {name: row for row, name in enumerate(table["sample_id"].to_list())}))
        selectors = [column for column, _ in selector_columns(config)]
        self._columns = {
            view: [*(str(named).split(",") if config.layout == "wide" else ()), *selectors]
            for view, named in config.views.items()
        }

    def __call__(self, sample: str, view: str) -> bool:
        then, now = (self._cells(table, rows, sample, view) for table, rows in self._tables)
        return then is not None and then == now

    def _cells(self, table: pl.DataFrame, rows: Mapping[str, int], sample: str, view: str) -> list[Any] | None:
        columns = self._columns.get(view)
        if not columns or sample not in rows or not set(columns) <= set(table.columns):
            return None
        return [table[column][rows[sample]] for column in columns]
