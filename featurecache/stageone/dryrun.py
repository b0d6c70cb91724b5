"""`extract --dry-run`: counts per view of what is there and what would be computed, and why; writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.config import ExtractConfig
from featurecache.data.manifest import Manifest, read_manifest, with_readers
from featurecache.data.readers.base import ReadFailure
from featurecache.machine import scouts
from featurecache.progress import Reporter, Silent
from featurecache.stageone.jobs import (
    Job,
    check_replaced,
    plan_jobs,
    remembered_failures,
    replica_number,
    set_up_views,
    stored,
    with_earlier_views,
)
from featurecache.stageone.keys import Cell, Payload, read_payload
from featurecache.stageone.recognise import read_keys
from featurecache.stageone.space import bytes_to_write
from featurecache.stageone.viewsetup import check_options
from featurecache.store.binding import Binding
from featurecache.store.recipe import shortened
from featurecache.store.store import FeatureStore

SPLIT_COLUMN = "split"
RETRY = "--retry-failed tries again"


@dataclass
class ViewPlan:
    """What would happen to one view; `reasons` tells of all images that are not reused, the failing ones too.

    Of those that are `reused`, `equal` ones have no row yet, but the content of another image that would be computed.
    """

    view: str
    engine: str
    images: int = 0
    reused: int = 0
    equal: int = 0
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
    replicas: int = 0  # of each image
    replicas_to_compute: int = 0
    bytes_to_write: int = 0

    def to_json(self) -> dict[str, Any]:
        """Flat figures, and the reasons per view."""
        return {
            "dataset": self.dataset,
            "samples": self.samples,
            "images": sum(plan.images for plan in self.views),
            "reused": sum(plan.reused for plan in self.views),
            "to_compute": sum(plan.to_compute for plan in self.views),
            "known_failures": sum(plan.failed for plan in self.views),
            "replicas": self.replicas,
            "replicas_to_compute": self.replicas_to_compute,
            "bytes_to_write": self.bytes_to_write,
            "reasons": {plan.view: dict(plan.reasons) for plan in self.views},
            "engines": {plan.view: plan.engine for plan in self.views},
            "duplicates_across_splits": self.duplicates,
        }

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"dataset   {self.dataset}: {self.samples:,} samples"]
        for plan in self.views:
            failing = f", failing {plan.failed:,}" if plan.failed else ""
            equal = f" ({plan.equal:,} equal to another of this table)" if plan.equal else ""
            counts = f"reused {plan.reused:,}{equal}, to compute {plan.to_compute:,}{failing}"
            lines.append(f"view      {plan.view}: {counts}; {plan.engine}")
            lines += [f"            {count:,} {reason}" for reason, count in plan.reasons.most_common()]
        if self.replicas:
            lines.append(f"replicas  {self.replicas} of each image: to compute {self.replicas_to_compute:,}")
        if self.bytes_to_write:
            lines.append(f"write     about {self.bytes_to_write / 1e6:,.1f} MB of features, in whole chunks")
        if self.duplicates:
            lines.append(f"warning   {len(self.duplicates)} contents stand on two sides of the split:")
            lines += [f"            {text}" for text in self.duplicates[:10]]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def plan_extract(config: ExtractConfig, reporter: Reporter | None = None) -> Plan:
    """Find out what `extract` would do. Files that the store does not recognise by their stat are read and hashed.

    Raises:
        InputError: as `extract` would.
    """
    reporter = reporter or Silent()
    check_options(config)
    manifest = read_manifest(config)
    for note in manifest.notes:
        reporter.note(note)
    config = with_readers(config, manifest)
    name = config.name or manifest.path.stem
    setups = set_up_views(config, manifest.views)
    if not (Path(config.store) / "index.sqlite").exists():
        return assemble(name, manifest, plan_jobs(config, manifest, setups, None), None, None, config, reporter)
    with FeatureStore.create_or_open(config.store, write=False) as store:
        previous = store.binding(name) if name in store.bindings() else None
        check_replaced(previous, manifest, name, replace=config.replace, reporter=reporter)
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
    size = drawn = 0
    for job in jobs:
        failing = hash_cells(job, reporter)
        held = np.zeros(len(job.cells), np.bool_) if store is None else stored(job, store)
        before = remembered_failures(job, store) if store is not None else {}
        again = {int(job.cells.indices[place]) for place, _ in job.keys.places_of(list(before))}
        if not config.retry_failed:
            failing |= dict.fromkeys(again, f"failed before ({RETRY})")
        reasons = dict.fromkeys(again, "failed before") | why(
            job, manifest, store, previous, failing.keys() | again, held
        )
        indices = job.cells.indices.tolist()
        keys |= {index: key for index, key in zip(indices, job.keys.to_list(), strict=True) if key is not None}
        for index, has_row in zip(indices, held.tolist(), strict=True):
            plan = plans[views[index]]
            plan.images += 1
            if index in failing:
                plan.failed += 1
                plan.reasons[failing[index]] += 1
            elif index in reasons:
                plan.reasons[reasons[index]] += 1
            else:
                plan.reused += 1
                plan.equal += not has_row
        new = {keys[index] for index in reasons.keys() - failing.keys()}  # equal contents are one row
        size += bytes_to_write(job, config, job.recipe, job.info, len(new))
        if config.replicas:
            more = replicas_to_compute(job, store, config)
            recipe = replica_number(0, config, job).recipe(job.recipe)
            same = [] if store is None else [info for info in store.find(recipe) if info.recipe == recipe]
            size += bytes_to_write(job, config, recipe, same[0] if same else None, more)
            drawn += more
    duplicates = duplicates_across_splits(manifest, keys)
    return Plan(name, manifest.table.height, list(plans.values()), duplicates, config.replicas, drawn, size)


def replicas_to_compute(job: Job, store: FeatureStore | None, config: ExtractConfig) -> int:
    """Rows of replicas that are not there; a content that can't be read after all will have none."""
    contents = np.unique(job.keys.values[job.keys.known], axis=0)
    found = 0
    for number in range(config.replicas):
        recipe = replica_number(number, config, job).recipe(job.recipe)
        held = store is not None and any(info.recipe == recipe for info in store.find(recipe))
        rows = store.rows(recipe.id, contents, number) if store is not None and held else np.full(len(contents), -1)
        found += int((rows < 0).sum())
    return found


def why(
    job: Job,
    manifest: Manifest,
    store: FeatureStore | None,
    previous: Binding | None,
    told: Set[int],
    held: NDArray[np.bool_],
) -> dict[int, str]:
    """For each cell that would be computed, the reason: {cell index: reason}.

    Cells in `told` have theirs already; those of `held` (one a cell of the job) have a row.
    """
    places = [job.cells.place(index) for index in job.todo.indices.tolist() if index not in told]
    pending, keys = job.cells.indices[places].tolist(), [job.keys.values[place].tobytes() for place in places]
    changed = recipe_changes(job, store, previous)
    earlier = earlier_keys(previous)
    cells = manifest.cells.select("sample", "view", "ordinal").rows()
    ids = manifest.table["sample_id"].to_list()
    reasons: dict[int, str] = {}
    first: set[bytes] = set()
    for index, key, known in zip(pending, keys, held[places].tolist(), strict=True):
        if known or key in first:
            continue
        first.add(key)  # equal content is computed once
        sample, view, ordinal = cells[index]
        before = earlier.get((ids[sample], view, ordinal))
        if before is not None and before != key:
            reasons[index] = "bytes changed"
        elif before is not None and changed.get(view):
            reasons[index] = f"recipe changed: {changed[view]}"
        else:
            reasons[index] = "new"
    return reasons


def hash_cells(job: Job, reporter: Reporter) -> dict[int, str]:
    """Fill in the keys of the cells that are to do; returns those that can't be read: {cell index: reason}."""
    unread: dict[int, str] = {}
    task = "hash " + "+".join(job.views)
    reporter.begin(task, len(job.todo), "files")
    left = np.ones(len(job.todo), np.bool_)
    if len(left) >= scouts.WORTH_IT:
        for _, places, keys, _ in read_keys(job.todo, np.flatnonzero(job.todo.column("kind") == "file")):
            where = job.cells.places(job.todo)[places]
            job.keys.values[where], job.keys.known[where], left[places] = keys, True, False
            reporter.advance(task, len(places))
    cells = job.todo.pick(left)  # few, or all that went wrong, with the reason

    def key_of(cell: Cell) -> Payload | ReadFailure:
        payload = read_payload(cell)
        return payload if isinstance(payload, ReadFailure) else Payload(b"", payload.key, None)

    with ThreadPoolExecutor(scouts.cores()) as pool:
        for cell, payload in zip(cells, pool.map(key_of, cells), strict=True):
            reporter.advance(task)
            if isinstance(payload, ReadFailure):
                unread[cell.index] = f"can't be read: {payload.message}"
            else:
                job.learn(cell, payload.key)
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
        changes[view] = ", ".join(f"{name} {shortened(old)} -> {shortened(new)}" for name, old, new in differences)
    return changes


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
