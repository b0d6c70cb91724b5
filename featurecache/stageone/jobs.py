"""What stage one has to do: cells grouped by recipe, and what the store knows of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.config import AUTO, ExtractConfig, ManifestConfig, for_view
from featurecache.data.manifest import Manifest
from featurecache.errors import InputError
from featurecache.machine import scouts
from featurecache.progress import Reporter
from featurecache.stageone.keys import Cell, Cells, Keys, last_keys, present_cells
from featurecache.stageone.keys import unchanged as unchanged_keys
from featurecache.stageone.replicas import Replica, augmentation
from featurecache.stageone.viewsetup import EngineChoice, ViewSetup, choose_engine, set_up_view, with_taps_of
from featurecache.store.binding import Binding
from featurecache.store.lookup import KeyTable
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore, RecipeInfo

# What decides how a manifest is read as a whole: views that are read in different ways can't stand in one dataset.
WHOLE = ("layout", "view_column", "path_column", "multi", "id", "root")
ROWS_PER_FILE = 4  # of a recipe: where it has more for an unchanged file, these are looked up one by one


@dataclass
class Job:
    """The cells of all views that share one recipe, and what is known of them.

    Attributes:
        setup: of the first of its views; the others differ in nothing but their name.
        choice: of the engine, with the reason.
        recipe: what the features depend on; may hold more taps than were asked for.
        views: that share it.
        info: the recipe as the store has it, None where it has not.
        cells: all that hold an image.
        keys: of the cells, where known.
        done: (n,) bool, which of the cells have a row.
        todo: cells to be worked on; their content may turn out to be known.
        failures: cell index -> reason.
        transient: indices of those failures that another run may not meet again (I/O, memory).
        computed: rows that this run added.
        replica: which random version of the images this is about; None: the plain ones.
    """

    setup: ViewSetup
    choice: EngineChoice
    recipe: Recipe
    views: list[str]
    cells: Cells
    info: RecipeInfo | None = None
    keys: Keys = field(init=False)
    done: NDArray[np.bool_] = field(init=False)
    todo: Cells = field(init=False)
    failures: dict[int, str] = field(default_factory=dict)
    transient: set[int] = field(default_factory=set)
    computed: int = 0
    replica: Replica | None = None

    def __post_init__(self) -> None:
        """Nothing is known yet: everything is to do."""
        self.keys, self.done, self.todo = Keys(len(self.cells)), np.zeros(len(self.cells), np.bool_), self.cells

    @property
    def reader_id(self) -> str:
        """What decides which contents can't be read."""
        return self.setup.reader.identity()

    @property
    def number(self) -> int:
        """Of the replica, by which its rows are found."""
        return self.replica.number if self.replica is not None else 0

    @property
    def title(self) -> str:
        """What a person calls this job."""
        views = "+".join(self.views)
        return views if self.replica is None else f"{views}, replica {self.number + 1}"

    @property
    def row_bytes(self) -> int:
        """Bytes that one image's features take in the store."""
        values = sum(math.prod(tap.shape) for tap in self.setup.taps)
        return values * np.dtype(self.recipe.storage_dtype).itemsize

    @property
    def images(self) -> int:
        """Cells that hold an image."""
        return len(self.cells)

    @property
    def stored(self) -> int:
        """Cells that have a row."""
        return int(self.done.sum())

    def known_contents(self) -> int:
        """Different contents among the cells that have a row."""
        return self.keys.distinct(self.done)

    def learn(self, cell: Cell, key: bytes) -> None:
        """A cell was read: this is its key."""
        self.keys[self.cells.place(cell.index)] = key

    def fail(self, cell: Cell, message: str, *, transient: bool) -> None:
        """A cell failed; `transient`: another run may not meet that again."""
        self.failures[cell.index] = message
        if transient:
            self.transient.add(cell.index)

    def first_failure(self) -> tuple[str, str]:
        """What the manifest calls the first cell that failed, and the reason."""
        index, message = next(iter(self.failures.items()))
        return self.cells[self.cells.place(index)].value, message

    def spread(self, failed: Mapping[bytes, str], *, lasting: Set[bytes]) -> None:
        """Every cell of a failed content failed. Contents that are not `lasting` failed for this run only."""
        for place, key in self.keys.places_of(list(failed)):
            index = int(self.cells.indices[place])
            self.failures[index] = failed[key]
            if key not in lasting:
                self.transient.add(index)

    def settle(self, store: FeatureStore) -> None:
        """The work is over: see which cells have a row now."""
        if self.todo:
            self.done = stored(self, store)


def set_up_views(config: ExtractConfig, views: tuple[str, ...]) -> dict[str, ViewSetup]:
    """Load what each view needs; bodies with equal settings are loaded once."""
    bodies: dict[tuple[Any, ...], Any] = {}
    return {view: set_up_view(config, view, bodies=bodies) for view in views}


def plan_jobs(
    config: ExtractConfig,
    manifest: Manifest,
    setups: Mapping[str, ViewSetup],
    store: FeatureStore | None,
    unchanged: pl.DataFrame | None = None,
) -> list[Job]:
    """Group the views by recipe and look up what is there. Reads no payload, writes nothing.

    Args:
        config: of stage one.
        manifest: that lists the images.
        setups: of its views.
        store: None where there is none yet.
        unchanged: what is known already of the files whose stat is what it was, see `Survey.unchanged`.
    """
    jobs: dict[str, Job] = {}
    for view, setup in setups.items():
        choice = choose_engine(config, setup, store)
        recipe = setup.recipe(engine=choice.engine, precision=choice.precision, storage_dtype=config.store_dtype)
        cells = present_cells(manifest.cells, view)
        held = best_held(recipe, cells, store) if store is not None else None
        if held is not None and held.recipe.digest != recipe.digest:
            # A group with more taps serves as well, and stays complete: what it lacks is computed with all.
            setup, recipe = with_taps_of(setup, held.recipe), held.recipe
        same = jobs.get(recipe.digest)
        if same is not None:
            setup, choice, held, cells = same.setup, same.choice, same.info, same.cells.joined(cells)
        views = [*(same.views if same is not None else ()), view]
        jobs[recipe.digest] = Job(setup, choice, recipe, views, cells, held)
    if store is not None:
        for job in jobs.values():
            table = None
            if config.check == "stat":
                job.keys, table = _known(job, store, unchanged)
            sort_out(job, store, retry_failed=config.retry_failed, table=table)
    return list(jobs.values())


def _known(job: Job, store: FeatureStore, unchanged: pl.DataFrame | None) -> tuple[Keys, KeyTable | None]:
    """Keys of the files that are unchanged; where these are many, SQLite reads the recipe's rows meanwhile."""
    count = 0 if unchanged is None else unchanged.height
    if job.info is None or count < scouts.WORTH_IT or job.info.rows > ROWS_PER_FILE * count:
        return unchanged_keys(job.cells, store, unchanged), None
    with ThreadPoolExecutor(1, "rows") as reading:
        table = reading.submit(lambda: KeyTable(*store.keys(job.recipe.id)))
        return unchanged_keys(job.cells, store, unchanged), table.result()


def best_held(recipe: Recipe, cells: Cells, store: FeatureStore) -> RecipeInfo | None:
    """The recipe of the store that holds all taps and most of these images; the very same if others hold no more."""
    found = store.find(recipe)
    if len(found) < 2:
        return found[0] if found else None
    keys = last_keys(cells, store)
    return max(found, key=lambda info: int(held_keys(keys, info.id, store).sum()))


def sort_out(job: Job, store: FeatureStore, *, retry_failed: bool, table: KeyTable | None = None) -> None:
    """From the keys that are known: what is done, what failed before, and what is to do.

    Args:
        job: whose cells.
        store: that has its rows.
        retry_failed: whether what failed before is to do.
        table: of the recipe's rows, where they were read already.
    """
    job.done = stored(job, store, table)
    to_do = ~job.done
    if not retry_failed:
        remembered = remembered_failures(job, store)
        for place, key in job.keys.places_of(list(remembered)):
            job.failures[int(job.cells.indices[place])] = remembered[key]
            to_do[place] = False
    job.todo = job.cells.pick(to_do)


def stored(job: Job, store: FeatureStore, table: KeyTable | None = None) -> NDArray[np.bool_]:
    """(n,) bool, of the job's cells: whose key is known and has a row."""
    if job.info is None:
        return np.zeros(len(job.cells), np.bool_)
    return held_keys(job.keys, job.recipe.id, store, job.number, table)


def held_keys(
    keys: Keys, recipe_id: str, store: FeatureStore, replica: int = 0, table: KeyTable | None = None
) -> NDArray[np.bool_]:
    """(n,) bool: which keys are known and have a row in a recipe, as the store says or a table of its rows."""
    held, known = keys.known.copy(), keys.values[keys.known]
    if table is None:
        held[held] = store.rows(recipe_id, known, replica) >= 0
    else:
        held[held] = table.find(known, np.full(len(known), replica, np.int32)) >= 0
    return held


def replica_number(number: int, config: ExtractConfig, plain: Job) -> Replica:
    """One of a plain job's replicas."""
    return Replica(plain.setup.preprocessing, augmentation(config.augment), config.seed or 0, number)


def plan_replicas(config: ExtractConfig, plain: Job, store: FeatureStore) -> Iterator[Job]:
    """The jobs of a plain one's replicas, each when it is its turn: what can't be read plain is not tried again."""
    for number in range(config.replicas):
        replica = replica_number(number, config, plain)
        recipe = replica.recipe(plain.recipe)
        held = next((info for info in store.find(recipe) if info.recipe == recipe), None)
        job = Job(plain.setup, plain.choice, recipe, plain.views, plain.cells.pick(plain.done), held, replica=replica)
        job.keys = plain.keys.pick(plain.done)
        sort_out(job, store, retry_failed=config.retry_failed)
        yield job


def remembered_failures(job: Job, store: FeatureStore) -> dict[bytes, str]:
    """Deterministic failures of earlier runs: {key: reason}."""
    if job.info is None:
        return {}
    found = store.failures(job.recipe.id).items()
    # What another reader could not read (an older version, another limit) is tried again.
    return {key: message for key, (reader, message) in found if reader == job.reader_id}


def check_replaced(
    previous: Binding | None, manifest: Manifest, name: str, *, replace: bool, reporter: Reporter
) -> None:
    """Refuse to give a dataset's name to another manifest unless told to; follow one that was moved, and say so.

    Moved is a file of the same bytes, or whatever has come while nothing is at the old place any more.

    Raises:
        InputError: the name is taken by another manifest at another path.
    """
    if previous is None or replace or previous.manifest_path == str(manifest.path):
        return
    gone = not Path(previous.manifest_path).exists()
    if gone or (manifest.path.is_file() and manifest.digest == previous.manifest_digest):
        why = "which is gone" if gone else "a file of the same content"
        before = f"dataset {name!r} was made from {previous.manifest_path}, {why}"
        reporter.note(f"{before}; {manifest.path} takes its place")
        return
    raise InputError(
        f"dataset {name!r} in this store was made from {previous.manifest_path}, not from {manifest.path}. "
        "Give another --name, or --replace if the new manifest takes its place."
    )


def with_earlier_views(config: ExtractConfig, previous: Binding | None, manifest: Manifest) -> ExtractConfig:
    """The configuration with the views that an earlier run bound under the same name, so that a view can be added.

    Raises:
        InputError: this run reads the manifest in another way, so that its views can't be joined with the earlier ones.
    """
    if previous is None or config.replace:
        return config
    earlier = [view for view in previous.recipes if view not in manifest.views]
    if not earlier:
        return config
    before = ManifestConfig.create(previous.config["manifest"])
    unlike = [name for name in WHOLE if _comparable(before, name) != _comparable(config, name)]
    if unlike or not config.views or not set(earlier) <= set(before.views):
        reason = f"read with another {', '.join(unlike)}" if unlike else "without --view for all of them"
        raise InputError(
            f"dataset {previous.name!r} holds the views {', '.join(previous.recipes)} of this manifest; they can't be "
            f"joined with what is {reason}. Give --view for every view and the same options, another --name, or "
            "--replace to keep only the views of this run."
        )
    update: dict[str, Any] = {"views": {**{view: before.views[view] for view in earlier}, **config.views}}
    update["reader"] = {**config.reader, **{view: for_view(before.reader, view, AUTO) for view in earlier}}
    for name in ("box", "frame", "flip_if", "reader_settings"):
        old = getattr(before, name)
        update[name] = {**getattr(config, name), **{view: old[view] for view in earlier if view in old}}
    return config.model_copy(update=update)


def _comparable(config: ManifestConfig, name: str) -> Any:
    value = getattr(config, name)
    return value.resolve() if isinstance(value, Path) else value
