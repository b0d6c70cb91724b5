"""Compaction: a new store with the same rows, without gaps and in the order in which a dataset reads them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.errors import InputError, StoreError
from featurecache.progress import Reporter, Silent
from featurecache.store.appender import publish_generation
from featurecache.store.binding import Binding, binding_names, insert_bindings, stored_binding
from featurecache.store.catalogue import by_name
from featurecache.store.contents import Keys, all_rows, among, packed
from featurecache.store.files import step, storage_errors, sync_directory
from featurecache.store.format import StorePaths
from featurecache.store.index import Index
from featurecache.store.lock import WriterLock
from featurecache.store.opening import INCOMPLETE as MARK
from featurecache.store.recipe import KEY_BYTES
from featurecache.store.records import load_failures
from featurecache.store.schema import next_generation
from featurecache.store.store import FeatureStore, RecipeInfo
from featurecache.store.verify import verify

BLOCK_BYTES = 128 * 2**20
"""Features held at a time: chunks that are stored compressed are decoded once for each such block."""
TASK = "copying rows"


@dataclass(frozen=True)
class CompactReport:
    """What a new store holds, and what it took."""

    path: Path
    recipes: int
    rows: int
    datasets: int
    bytes_before: int
    bytes: int


def compact(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    order: str | None = None,
    codec: str | None = None,
    reporter: Reporter | None = None,
) -> CompactReport:
    """Copy a store into a new one: the same recipes, rows, datasets, failures and records of files.

    Rows that the dataset `order` reads come first, as it reads them (by sample, view and ordinal, replicas side by
    side); the others follow as they lay. The source is only read. The copy grows in OUT.tmp, is verified there, and
    then renamed.

    Args:
        path: of the store.
        out: of the new one, which must not exist.
        order: name of a dataset; None keeps the order.
        codec: of the new store; None for each recipe's own.
        reporter: told of the rows copied.

    Raises:
        InputError: there is something at `out`, or no such dataset.
        LockedError: another process writes to OUT.tmp.
        StoreError: it does not fit on the disk, or the source was changed meanwhile.
        CorruptionError: a chunk of the source is damaged.
    """
    source, target = StorePaths(Path(path)), Path(out)
    with FeatureStore.create_or_open(path, write=False) as store:
        if target.exists() or target.is_symlink():
            raise InputError(f"{target} exists. A store is never overwritten: give another --out, or remove it first.")
        if source.root.resolve() in target.resolve().parents:
            raise InputError(f"{target} lies in {source.root}. Give an --out outside of the store.")
        binding = store.binding(order) if order is not None else None
        generation = store.generation
        check_space(store.recipes(), target)
        staged = target.with_name(f"{target.name}.tmp")
        clear_unfinished(staged)
        staged.mkdir()
        (staged / MARK).touch()
        with FeatureStore.create_or_open(staged, write=True) as copy:
            _copy_recipes(store, copy, binding, codec, reporter or Silent())
            _copy_records(store.index, copy.index)
        if store.generation != generation:
            shutil.rmtree(staged)
            raise StoreError(f"{path}: was written to meanwhile. Nothing was made; run the command again.")
        recipes, datasets = store.recipes(), len(store.bindings())
        rows, size = sum(info.rows for info in recipes), sum(info.bytes for info in recipes)
    if (failures := source.root / "failures.csv").is_file():
        shutil.copyfile(failures, staged / failures.name)
    report = verify(staged)
    if not report.ok or report.rows != rows:
        problem = report.problems[0] if report.problems else f"{report.rows:,} rows instead of {rows:,}"
        raise StoreError(f"{staged}: the copy is not sound ({problem}). {source.root} is as it was.")
    step("copy-verified")
    with storage_errors(f"{target}: renaming failed"):
        os.rename(staged, target)
        sync_directory(target.absolute().parent)
        (target / MARK).unlink()
    return CompactReport(target, report.recipes, rows, datasets, size, report.bytes)


def check_space(recipes: Sequence[RecipeInfo], target: Path) -> None:
    """Refuse what can't fit.

    Raises:
        StoreError: the disk has less room than the copy needs without compression.
        InputError: there is no folder for it.
    """
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent}: no such folder for --out. Make it, or choose another.")
    needed = sum(info.bytes for info in recipes)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise StoreError(
            f"{target}: the copy takes about {needed / 1e9:,.2f} GB, but {free / 1e9:,.2f} GB are free there."
        )


def clear_unfinished(staged: Path) -> None:
    """Remove what an earlier compaction left when it was killed.

    Raises:
        InputError: there is something else.
        LockedError: a compaction is at work there.
    """
    if not staged.exists():
        return
    if not (staged / MARK).is_file():
        raise InputError(f"{staged} is in the way, and is no unfinished copy. Move it elsewhere.")
    WriterLock(StorePaths(staged).lock).release()
    shutil.rmtree(staged)


def _copy_recipes(
    store: FeatureStore, copy: FeatureStore, binding: Binding | None, codec: str | None, reporter: Reporter
) -> None:
    infos = store.recipes()
    reporter.begin(TASK, sum(info.rows for info in infos), "rows")
    for info in infos:
        taps = {name: (tap.shape, tap.dims) for name, tap in info.taps.items()}
        copy.add_recipe(
            info.recipe,
            taps,
            codec=codec or info.codec,
            rows_per_chunk=info.rows_per_chunk,
            canary=info.canary,
            recorded=info.recorded,
        )
        stored = by_name(store.index, info.recipe.digest)
        ids, keys, replicas = all_rows(store.index, stored)
        if binding is not None:
            order = np.lexsort((replicas, _ranks(keys, binding, info)))
            ids, keys, replicas = ids[order], keys[order], replicas[order]
        row_bytes = sum(spec.row_bytes for spec in stored.layout.arrays().values())
        block = info.rows_per_chunk * max(1, BLOCK_BYTES // (row_bytes * info.rows_per_chunk))
        with copy.appender(info.id) as appender:
            for first in range(0, len(ids), block):
                now = slice(first, first + block)
                arrays = {tap: store.read(info.id, tap, ids[now]) for tap in info.taps}
                raw = keys[now].view(np.uint8).reshape(-1, KEY_BYTES)
                appender.append(raw, arrays, replicas[now] if info.replicas else None)
                reporter.advance(TASK, len(ids[now]))
    reporter.end(TASK)


def _ranks(keys: Keys, binding: Binding, info: RecipeInfo) -> NDArray[np.int64]:
    """Where rows come: by the first cell of the dataset that has their key; those that no cell has stay as they are.

    Cells of views that are bound to this recipe count before those of others.
    """
    views = list(binding.recipes)
    own = [info.recipe.digest.startswith(recipe.lower()) for recipe in binding.recipes.values()]
    cells = binding.cells.filter(pl.col("key").is_not_null())
    number = cells["view"].replace_strict(views, list(range(len(views))), return_dtype=pl.Int64)
    foreign = ~np.array(own)[number.to_numpy()]
    order = np.lexsort((cells["ordinal"].to_numpy(), number.to_numpy(), cells["sample"].to_numpy(), foreign))
    wanted, first = np.unique(packed(cells["key"].to_list())[order], return_index=True)
    ranks = len(cells) + np.arange(len(keys), dtype=np.int64)
    held = among(keys, wanted)
    ranks[held] = first[np.searchsorted(wanted, keys[held])]
    return ranks


def _copy_records(source: Index, copy: Index) -> None:
    """Failures, datasets and records of files."""
    numbers = {stored.recipe.digest: stored.number for stored in copy.recipes()}
    with source.reading() as connection, copy.writing() as target:
        for stored in source.recipes():
            number = numbers[stored.recipe.digest]
            target.executemany(
                "INSERT INTO failures (recipe, key, reader, message) VALUES (?, ?, ?, ?)",
                ((number, key, *rest) for key, rest in load_failures(source, stored.number).items()),
            )
        columns = [row[1] for row in connection.execute("PRAGMA table_info(payloads)")]
        target.executemany(
            f"INSERT INTO payloads ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
            connection.execute(f"SELECT {', '.join(columns)} FROM payloads"),
        )
        found = (stored_binding(source, name) for name in binding_names(source))
        insert_bindings(target, [columns for columns in found if columns is not None])
        next_generation(target)
    publish_generation(copy, copy.paths)
