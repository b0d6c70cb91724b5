"""The plan for `forget`: all that a store has of some samples, so that none of their bytes are left in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from featurecache.errors import InputError, did_you_mean
from featurecache.store.binding import Binding, binding_names, load_binding
from featurecache.store.contents import (
    among,
    bound_keys,
    failures_where,
    known_files,
    no_keys,
    packed,
    rows_of,
    rows_where,
    sample_ids,
)
from featurecache.store.store import FeatureStore
from featurecache.upkeep.dropping import Removal, failure_rows, part_of
from featurecache.upkeep.rebinding import manifest_digest, short_list


def plan_forget(store: FeatureStore, ids: Sequence[str], datasets: Sequence[str] = ()) -> Removal:
    """Plan to drop all that a store has of some samples: rows, keys, failures, labels, ids and paths.

    Content that other samples have as well stays for them, and is reported.

    Args:
        store: the store.
        ids: of the samples.
        datasets: only in these; by default in all.

    Raises:
        InputError: a sample or dataset is unknown; names the nearest.
    """
    index = store.index
    plan = Removal(store.path, store.generation, samples=list(dict.fromkeys(ids)))
    names, others = binding_names(index), [no_keys()]
    if unknown := [name for name in datasets if name not in names]:
        raise InputError(f"{store.path}: no dataset {unknown[0]!r}.{did_you_mean(unknown[0], names)}")
    gone = [no_keys()]
    found: dict[str, list[str]] = {}
    for name in names:
        hit = set(plan.samples) & set(sample_ids(index, name)) if not datasets or name in datasets else set()
        if not hit:
            others.append(bound_keys(index, name))
            continue
        for sample in hit:
            found.setdefault(sample, []).append(name)
        binding = load_binding(index, name)
        rest, lost = _without(binding, hit)
        gone.append(packed(lost["key"].drop_nulls().to_list()))
        if rest.table.height:
            others.append(packed(rest.cells["key"].drop_nulls().to_list()))
            plan.bindings.append(rest)
        else:
            plan.datasets.append(name)
        plan.notes += _would_return(binding, hit)
    _check_found(store, plan.samples, found, datasets or names)
    plan.notes += [
        f"sample {sample!r} is in the datasets {', '.join(where)}. If these are not the same, give --dataset"
        for sample, where in found.items()
        if len(where) > 1
    ]
    lost_keys, kept_keys = np.unique(np.concatenate(gone)), np.unique(np.concatenate(others))
    known_keys, alone = np.union1d(lost_keys, kept_keys), np.setdiff1d(lost_keys, kept_keys)
    if shared := len(lost_keys) - len(alone):
        plan.notes.append(
            f"{shared} images stay, since other samples have the very same bytes; only what ties them to these samples "
            "is dropped"
        )
    unnamed = 0
    for stored in index.recipes():
        rows = rows_of(index, stored, alone)
        failures = failures_where(index, stored, lambda keys: among(keys, alone))
        if len(rows) or failures:
            plan.parts.append(part_of(index, stored, rows, failures))
        unnamed += len(rows_where(index, stored, lambda keys: ~among(keys, known_keys)))
    if unnamed:
        plan.notes.append(
            f"{unnamed:,} rows are named by no dataset; some may be of earlier images of these samples. "
            f"`featurecache prune {store.path}` drops them"
        )
    # Only what surely belongs to another sample stays: what is dropped too many is hashed once more, no more.
    plan.files = known_files(index, lambda keys: among(keys, lost_keys) | ~among(keys, kept_keys))
    plan.listed = len(failure_rows(store.path, set(plan.samples))[1])
    return plan


def _check_found(store: FeatureStore, ids: Sequence[str], found: dict[str, list[str]], datasets: Sequence[str]) -> None:
    missing = [sample for sample in ids if sample not in found]
    if not missing:
        return
    known = [sample for name in datasets for sample in sample_ids(store.index, name)]
    raise InputError.from_problems(
        f"{store.path}: nothing was changed. Of a sample that an earlier version of a manifest had, rows may be left "
        f"that no dataset names: `featurecache prune {store.path}` drops them",
        [f"no sample {sample!r} in {short_list(datasets)}.{did_you_mean(sample, known)}" for sample in missing],
    )


def _without(binding: Binding, ids: set[str]) -> tuple[Binding, pl.DataFrame]:
    """A dataset without some samples, and their cells."""
    gone = binding.table["sample_id"].is_in(list(ids)).to_numpy()
    number = np.cumsum(~gone) - 1
    sample = binding.cells["sample"].to_numpy()
    cells = binding.cells.filter(~gone[sample])
    cells = cells.with_columns(pl.Series("sample", number[cells["sample"].to_numpy()], dtype=pl.UInt32))
    # The list of an Enum's values would keep those that are in no row any more.
    table = binding.table.filter(~gone).with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    return replace(binding, table=table, cells=cells), binding.cells.filter(gone[sample])


def _would_return(binding: Binding, ids: set[str]) -> list[str]:
    now = manifest_digest(binding)
    if now is None:
        return []
    lists = "still lists" if now == binding.manifest_digest else "may still list"
    them = "it" if len(ids) == 1 else "them"
    return [
        f"{binding.manifest_path} {lists} {short_list(sorted(ids))}: take {them} out, else the next extract with it "
        f"brings {them} back to dataset {binding.name!r}"
    ]
