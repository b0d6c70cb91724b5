"""`extract --dry-run`: counts per view of what is there and what would be computed, and why; writes nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurecache.config import ExtractConfig
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.data.readers.base import ReadFailure
from featurecache.jobs import (
    Job,
    check_replaced,
    plan_jobs,
    remembered_failures,
    set_up_views,
    with_earlier_views,
)
from featurecache.keys import Cell, Payload, key_array, read_payload
from featurecache.producer import cores
from featurecache.progress import Reporter, Silent
from featurecache.store.binding import Binding
from featurecache.store.store import FeatureStore
from featurecache.viewsetup import check_options

SPLIT_COLUMN = "split"
RETRY = "--retry-failed tries again"
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class ViewPlan:
    """What would happen to one view; `reasons` tells of all images that are not reused, the failing ones too."""

    view: str
    engine: str
    images: int = 0
    reused: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def to_compute(self) -> int:
        """Images that would be decoded and run through the body."""
        return self.images - self.reused - self.failed


@dataclass
class Plan:
    """What would happen to all views; `duplicates` are contents that stand on two sides of the manifest's split."""

    dataset: str
    samples: int
    views: list[ViewPlan]
    duplicates: list[str]

    def to_json(self) -> dict[str, Any]:
        """Flat figures, and the reasons per view."""
        return {
            "dataset": self.dataset,
            "samples": self.samples,
            "images": sum(plan.images for plan in self.views),
            "reused": sum(plan.reused for plan in self.views),
            "to_compute": sum(plan.to_compute for plan in self.views),
            "known_failures": sum(plan.failed for plan in self.views),
            "reasons": {plan.view: dict(plan.reasons) for plan in self.views},
            "engines": {plan.view: plan.engine for plan in self.views},
            "duplicates_across_splits": self.duplicates,
        }

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"dataset   {self.dataset}: {self.samples:,} samples"]
        for plan in self.views:
            failing = f", failing {plan.failed:,}" if plan.failed else ""
            counts = f"reused {plan.reused:,}, to compute {plan.to_compute:,}{failing}"
            lines.append(f"view      {plan.view}: {counts} ({plan.engine})")
            lines += [f"            {count:,} {reason}" for reason, count in plan.reasons.most_common()]
        if self.duplicates:
            lines.append(f"warning   {len(self.duplicates)} contents stand on two sides of the split:")
            lines += [f"            {text}" for text in self.duplicates[:10]]
        return lines


def plan_extract(config: ExtractConfig, reporter: Reporter | None = None) -> Plan:
    """Find out what `extract` would do. Files that the store does not recognise by their stat are read and hashed.

    Raises:
        InputError: as `extract` would.
    """
    reporter = reporter or Silent()
    check_options(config)
    manifest = read_manifest(config)
    name = config.name or manifest.path.stem
    setups = set_up_views(config, manifest.views)
    if not (Path(config.store) / "index.sqlite").exists():
        return assemble(name, manifest, plan_jobs(config, manifest, setups, None), None, None, config, reporter)
    with FeatureStore.create_or_open(config.store, write=False) as store:
        previous = store.binding(name) if name in store.bindings() else None
        check_replaced(previous, manifest, name, replace=config.replace)
        with_earlier_views(config, previous, manifest)
        jobs = plan_jobs(config, manifest, setups, store)
        return assemble(name, manifest, jobs, store, previous, config, reporter)


def assemble(
    name: str,
    manifest: Manifest,
    jobs: list[Job],
    store: FeatureStore | None,
    previous: Binding | None,
    config: ExtractConfig,
    reporter: Reporter,
) -> Plan:
    """Count per view."""
    views = manifest.cells["view"].to_list()
    plans = {view: ViewPlan(view, str(job.choice)) for job in jobs for view in job.views}
    keys: dict[int, bytes] = {}
    for job in jobs:
        failing = hash_cells(job, reporter)
        before = remembered_failures(job, store) if store is not None else {}
        again = {index for index, key in job.keys.items() if key in before}
        if not config.retry_failed:
            failing |= dict.fromkeys(again, f"failed before ({RETRY})")
        reasons = dict.fromkeys(again, "failed before") | why(job, manifest, store, previous, failing.keys() | again)
        keys |= job.keys
        for cell in job.cells:
            plan = plans[views[cell.index]]
            plan.images += 1
            if cell.index in failing:
                plan.failed += 1
                plan.reasons[failing[cell.index]] += 1
            elif cell.index in reasons:
                plan.reasons[reasons[cell.index]] += 1
            else:
                plan.reused += 1
    return Plan(name, manifest.table.height, list(plans.values()), duplicates_across_splits(manifest, keys))


def why(
    job: Job, manifest: Manifest, store: FeatureStore | None, previous: Binding | None, told: Set[int]
) -> dict[int, str]:
    """For each cell that would be computed, the reason: {cell index: reason}; cells in `told` have theirs already."""
    pending = [cell for cell in job.todo if cell.index not in told]
    keys = [job.keys[cell.index] for cell in pending]
    held = [False] * len(pending)
    if store is not None and pending and job.info is not None:
        held = (store.rows(job.recipe.id, key_array(keys)) >= 0).tolist()
    changed = recipe_changes(job, store, previous)
    earlier = earlier_keys(previous)
    cells = manifest.cells.select("sample", "view", "ordinal").rows()
    ids = manifest.table["sample_id"].to_list()
    reasons: dict[int, str] = {}
    first: set[bytes] = set()
    for cell, key, known in zip(pending, keys, held, strict=True):
        if known or key in first:
            continue
        first.add(key)  # equal content is computed once
        sample, view, ordinal = cells[cell.index]
        before = earlier.get((ids[sample], view, ordinal))
        if before is not None and before != key:
            reasons[cell.index] = "bytes changed"
        elif before is not None and changed.get(view):
            reasons[cell.index] = f"recipe changed: {changed[view]}"
        else:
            reasons[cell.index] = "new"
    return reasons


def hash_cells(job: Job, reporter: Reporter) -> dict[int, str]:
    """Fill in the keys of the cells that are to do; returns those that can't be read: {cell index: reason}."""
    unread: dict[int, str] = {}
    task = "hash " + "+".join(job.views)
    reporter.begin(task, len(job.todo), "files")

    def key_of(cell: Cell) -> Payload | ReadFailure:
        payload = read_payload(cell)
        return payload if isinstance(payload, ReadFailure) else Payload(b"", payload.key, None)

    with ThreadPoolExecutor(cores()) as pool:
        for cell, payload in zip(job.todo, pool.map(key_of, job.todo), strict=True):
            reporter.advance(task)
            if isinstance(payload, ReadFailure):
                unread[cell.index] = f"can't be read: {payload.message}"
            else:
                job.keys[cell.index] = payload.key
    reporter.end(task)
    return unread


def earlier_keys(previous: Binding | None) -> dict[tuple[str, str, int], bytes]:
    """What an earlier binding of the same name held: {(sample id, view, ordinal): key}."""
    if previous is None:
        return {}
    ids = previous.table["sample_id"].to_list()
    rows = previous.cells.select("sample", "view", "ordinal", "key").iter_rows()
    return {(ids[sample], view, ordinal): key for sample, view, ordinal, key in rows if key is not None}


def recipe_changes(job: Job, store: FeatureStore | None, previous: Binding | None) -> Mapping[str, str]:
    """Per view, what differs from the recipe that it was bound to before: `FIELD old -> new, ...`."""
    changes: dict[str, str] = {}
    for view in job.views:
        bound = previous.recipes.get(view) if previous is not None else None
        if store is None or bound is None or bound == job.recipe.id:
            continue
        differences = store.recipe(bound).recipe.differences(job.recipe)
        changes[view] = ", ".join(f"{name} {short(old)} -> {short(new)}" for name, old, new in differences)
    return changes


def short(value: Any) -> str:
    """A value of a recipe in a few characters: a digest by its first, anything else whole."""
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if DIGEST.fullmatch(text) else text


def duplicates_across_splits(manifest: Manifest, keys: Mapping[int, bytes]) -> list[str]:
    """Equal content on two sides of the manifest's own `split` column, as lines that name the samples."""
    if SPLIT_COLUMN not in manifest.table.columns:
        return []
    sides = manifest.table[SPLIT_COLUMN].to_list()
    ids = manifest.table["sample_id"].to_list()
    samples = manifest.cells["sample"].to_list()
    first: dict[bytes, int] = {}
    found = []
    for index, key in keys.items():
        sample = samples[index]
        other = first.setdefault(key, sample)
        if sides[other] != sides[sample]:
            found.append(f"{ids[other]} ({sides[other]}) and {ids[sample]} ({sides[sample]})")
    return found
