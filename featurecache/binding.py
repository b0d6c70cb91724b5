"""Keeps a dataset true to its manifest: notices that the file has changed, and rebinds corrected labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from featurecache.config import ManifestConfig
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.tables import ARRAY_SUFFIXES, IMAGE_SUFFIXES, read_source
from featurecache.errors import InputError
from featurecache.store.binding import Binding
from featurecache.store.store import FeatureStore


def short_list(ids: Sequence[str], shown: int = 5) -> str:
    """`a, b, c and 12 more`."""
    listed = ", ".join(str(name) for name in ids[:shown])
    return f"{listed} and {len(ids) - shown} more" if len(ids) > shown else listed


def manifest_digest(binding: Binding) -> str | None:
    """The digest of a binding's manifest as it is on disk now; None where it is gone."""
    path = Path(binding.manifest_path)
    if path.is_dir():
        reader = binding.config["manifest"]["reader"].get("image", binding.config["manifest"]["reader"].get("*"))
        return read_source(path, suffixes=ARRAY_SUFFIXES if reader == "array" else IMAGE_SUFFIXES).digest
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
    """Take labels, groups and splits from a corrected manifest; the images must be those that were extracted.

    Raises:
        InputError: the manifest has other images or samples than the binding.
    """
    config = ManifestConfig.create({**binding.config["manifest"], "manifest": path})
    manifest = read_manifest(config)
    old_rows = {str(name): row for row, name in enumerate(binding.table["sample_id"].to_list())}
    problems = [
        f"{path}: sample {name!r} was not extracted"
        for name in manifest.table["sample_id"].to_list()
        if name not in old_rows
    ]
    if not problems:
        problems = changed_images(binding, manifest, old_rows, path)
    if problems:
        raise InputError.from_problems(
            f"{path}: not the same images as dataset {binding.name!r}; run `featurecache extract` on it", problems
        )
    order = [old_rows[name] for name in manifest.table["sample_id"].to_list()]
    positions = pl.DataFrame(
        {"sample": order, "new": range(len(order))}, schema={"sample": pl.UInt32, "new": pl.UInt32}
    )
    cells = (
        binding.cells.join(positions, on="sample", how="inner")
        .with_columns(pl.col("new").alias("sample"))
        .drop("new")
        .sort("sample", "view", "ordinal")
    )
    bound = replace(
        binding, manifest_path=str(manifest.path), manifest_digest=manifest.digest, table=manifest.table, cells=cells
    )
    store.bind(bound, replace=True)
    return bound


def changed_images(binding: Binding, manifest: Manifest, old_rows: dict[str, int], path: Path) -> list[str]:
    """Cells whose path differs from the bound table's, as lines that name file, row and column."""
    problems = []
    view_columns = [name for column in binding.config["manifest"]["views"].values() for name in str(column).split(",")]
    if binding.config["manifest"]["layout"] == "long":
        view_columns = []
    ids = manifest.table["sample_id"].to_list()
    for column in view_columns:
        if column not in binding.table.columns or column not in manifest.table.columns:
            continue
        old = binding.table[column].to_list()
        for row, (name, value) in enumerate(zip(ids, manifest.table[column].to_list(), strict=True)):
            if value != old[old_rows[name]]:
                problems.append(f"row {row + 2}, column {column!r}: {value!r}, was {old[old_rows[name]]!r}")
    return problems
