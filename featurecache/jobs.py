"""What stage one has to do: cells grouped by recipe, what the store knows of each, and the binding that joins them."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from featurecache.config import BodyConfig, ExtractConfig, ManifestConfig, for_view
from featurecache.data.manifest import Manifest
from featurecache.errors import InputError
from featurecache.keys import Cell, key_array, last_keys, present_cells, unchanged
from featurecache.store.binding import Binding
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore, RecipeInfo
from featurecache.viewsetup import RUN_PREFIX, EngineChoice, ViewSetup, choose_engine, set_up_view, with_taps_of

# What decides how a manifest is read as a whole: views that are read in different ways can't stand in one dataset.
WHOLE = ("layout", "view_column", "path_column", "multi", "id", "root")
FAILURE_COLUMNS = ("sample_id", "view", "path", "error")


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
        keys: cell index -> key, where known.
        done: indices of the cells that have a row.
        todo: cells to be worked on; their content may turn out to be known.
        failures: cell index -> reason.
        transient: indices of those failures that another run may not meet again (I/O, memory).
        computed: rows that this run added.
    """

    setup: ViewSetup
    choice: EngineChoice
    recipe: Recipe
    views: list[str]
    info: RecipeInfo | None = None
    cells: list[Cell] = field(default_factory=list)
    keys: dict[int, bytes] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    todo: list[Cell] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    transient: set[int] = field(default_factory=set)
    computed: int = 0

    @property
    def reader_id(self) -> str:
        """What decides which contents can't be read."""
        return self.setup.reader.identity()

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
        return len(self.done)

    def known_contents(self) -> int:
        """Different contents among the cells that have a row."""
        return len({self.keys[index] for index in self.done})

    def learn(self, cell: Cell, key: bytes) -> None:
        """A cell was read: this is its key."""
        self.keys[cell.index] = key

    def fail(self, cell: Cell, message: str, *, transient: bool) -> None:
        """A cell failed; `transient`: another run may not meet that again."""
        self.failures[cell.index] = message
        if transient:
            self.transient.add(cell.index)

    def first_failure(self) -> tuple[str, str]:
        """What the manifest calls the first cell that failed, and the reason."""
        index, message = next(iter(self.failures.items()))
        return next(cell.value for cell in self.cells if cell.index == index), message

    def spread(self, failed: Mapping[bytes, str], *, lasting: Set[bytes]) -> None:
        """Every cell of a failed content failed. Contents that are not `lasting` failed for this run only."""
        if not failed:
            return
        for index, key in self.keys.items():
            if key in failed:
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
    config: ExtractConfig, manifest: Manifest, setups: Mapping[str, ViewSetup], store: FeatureStore | None
) -> list[Job]:
    """Group the views by recipe and look up what is there. Reads no payload, writes nothing."""
    jobs: dict[str, Job] = {}
    for view, setup in setups.items():
        choice = choose_engine(config, setup, store)
        recipe = setup.recipe(engine=choice.engine, precision=choice.precision, storage_dtype=config.store_dtype)
        cells = present_cells(manifest.cells, view)
        held = best_held(recipe, cells, store) if store is not None else None
        if held is not None and held.recipe.digest != recipe.digest:
            # A group with more taps serves as well, and stays complete: what it lacks is computed with all.
            setup, recipe = with_taps_of(setup, held.recipe), held.recipe
        job = jobs.setdefault(recipe.digest, Job(setup, choice, recipe, [], held))
        job.views.append(view)
        job.cells += cells
    for job in jobs.values():
        if store is not None:
            look_up(job, store, check=config.check, retry_failed=config.retry_failed)
        else:
            job.todo = list(job.cells)
    return list(jobs.values())


def best_held(recipe: Recipe, cells: list[Cell], store: FeatureStore) -> RecipeInfo | None:
    """The recipe of the store that holds all taps and most of these images; the very same if others hold no more."""
    found = store.find(recipe)
    if len(found) < 2:
        return found[0] if found else None
    keys = key_array(list(last_keys(cells, store).values()))
    return max(found, key=lambda info: int((store.rows(info.id, keys) >= 0).sum()))


def look_up(job: Job, store: FeatureStore, *, check: str, retry_failed: bool) -> None:
    """Fill `keys`, `done`, `todo` and the failures that are remembered."""
    job.keys = unchanged(job.cells, store) if check == "stat" else {}
    job.done = stored(job, store)
    remembered = {} if retry_failed else remembered_failures(job, store)
    for cell in job.cells:
        key = job.keys.get(cell.index)
        if key is not None and key in remembered:
            job.failures[cell.index] = remembered[key]
        elif cell.index not in job.done:
            job.todo.append(cell)


def stored(job: Job, store: FeatureStore) -> set[int]:
    """Indices of the cells whose key is known and has a row."""
    if job.info is None or not job.keys:
        return set()
    indices = np.fromiter(job.keys, dtype=np.int64, count=len(job.keys))
    rows = store.rows(job.recipe.id, key_array(list(job.keys.values())))
    return set(indices[rows >= 0].tolist())


def remembered_failures(job: Job, store: FeatureStore) -> dict[bytes, str]:
    """Deterministic failures of earlier runs: {key: reason}."""
    if job.info is None:
        return {}
    found = store.failures(job.recipe.id).items()
    # What another reader could not read (an older version, another limit) is tried again.
    return {key: message for key, (reader, message) in found if reader == job.reader_id}


def check_replaced(previous: Binding | None, manifest: Manifest, name: str, *, replace: bool) -> None:
    """Refuse to give a dataset's name to another manifest unless told to.

    Raises:
        InputError: the name is taken by a manifest at another path.
    """
    if previous is not None and not replace and previous.manifest_path != str(manifest.path):
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
    update["reader"] = {**config.reader, **{view: for_view(before.reader, view, "image") for view in earlier}}
    for name in ("box", "frame", "flip_if"):
        old = getattr(before, name)
        update[name] = {**getattr(config, name), **{view: old[view] for view in earlier if view in old}}
    return config.model_copy(update=update)


def _comparable(config: ManifestConfig, name: str) -> Any:
    value = getattr(config, name)
    return value.resolve() if isinstance(value, Path) else value


def make_binding(
    name: str, manifest: Manifest, config: ExtractConfig, jobs: list[Job], previous: Binding | None
) -> Binding:
    """The join of this manifest with the store: key and state per cell, one recipe per view."""
    keys: list[bytes | None] = [None] * manifest.cells.height
    states = ["absent" if value is None else "pending" for value in manifest.cells["value"].to_list()]
    recipes: dict[str, str] = {}
    for job in jobs:
        recipes |= dict.fromkeys(job.views, job.recipe.id)
        for index, key in job.keys.items():
            keys[index] = key
        for index in job.failures.keys() - job.transient:  # what may yet be read must not pass for a missing view
            states[index] = "failed"
        for index in job.done:
            states[index] = "done"
    cells = manifest.cells.select("sample", "view", "ordinal").with_columns(
        pl.Series("key", keys, dtype=pl.Binary), pl.Series("state", states, dtype=pl.String)
    )
    if previous is not None:
        cells, recipes = keep_earlier(cells, manifest, recipes, previous)
    return Binding(
        name=name,
        manifest_path=str(manifest.path),
        manifest_digest=manifest.digest,
        table=manifest.table,
        config=binding_config(config, jobs, previous),
        recipes=recipes,
        multi=config.multi,
        cells=cells,
    )


def keep_earlier(
    cells: pl.DataFrame, manifest: Manifest, recipes: dict[str, str], previous: Binding
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Cells of views that this run did not touch keep what the earlier binding knew of them.

    Only where the manifest is the very same file; else they stay pending.
    """
    kept = {view: recipe for view, recipe in previous.recipes.items() if view in manifest.views and view not in recipes}
    if not kept or previous.manifest_digest != manifest.digest:
        return cells, {**kept, **recipes}
    earlier = previous.cells.filter(pl.col("view").is_in(list(kept))).rename({"key": "old_key", "state": "old_state"})
    joined = cells.join(earlier, on=["sample", "view", "ordinal"], how="left", maintain_order="left")
    cells = joined.select(
        "sample",
        "view",
        "ordinal",
        pl.coalesce("old_key", "key").alias("key"),
        pl.coalesce("old_state", "state").alias("state"),
    )
    return cells, {**kept, **recipes}


def binding_config(config: ExtractConfig, jobs: list[Job], previous: Binding | None) -> dict[str, Any]:
    """How the manifest is read, and per view the options of its body: enough to do the same to new samples.

    `{"manifest": ManifestConfig, "body": BodyConfig, "seed": int or None}` as plain JSON values; every option of `body`
    is given per view.
    """
    values = config.model_dump(mode="json")
    earlier = previous.config.get("body", {}) if previous is not None else {}
    body: dict[str, Any] = {"trust_factory": values["trust_factory"]}
    for name in set(BodyConfig.model_fields) - {"trust_factory"}:
        chosen = {view: for_view(values[name], view, None) for job in jobs for view in job.views}
        body[name] = {
            **{view: value for view, value in earlier.get(name, {}).items() if view not in chosen},
            **{view: value for view, value in chosen.items() if value is not None},
        }
    manifest = {name: values[name] for name in ManifestConfig.model_fields}
    # Paths hold from wherever the next command is started.
    for name in ("manifest", "root"):
        if manifest[name] is not None:
            manifest[name] = str(Path(manifest[name]).resolve())
    body["weights"] = {view: str(Path(w).resolve()) if Path(w).is_file() else w for view, w in body["weights"].items()}
    body["body"] = {
        view: RUN_PREFIX + str(Path(name.removeprefix(RUN_PREFIX)).resolve()) if name.startswith(RUN_PREFIX) else name
        for view, name in body["body"].items()
    }
    return {"manifest": manifest, "body": body, "seed": config.seed}


def list_failures(manifest: Manifest, jobs: list[Job]) -> list[dict[str, str]]:
    """One entry a failed cell: sample_id, view, path, error."""
    rows = manifest.cells.select("sample", "view", "value")
    ids = manifest.table["sample_id"]
    entries = []
    for index, error in sorted((index, error) for job in jobs for index, error in job.failures.items()):
        sample, view, value = rows.row(index)
        entries.append({"sample_id": str(ids[sample]), "view": view, "path": value, "error": error})
    return entries


def write_failures(path: Path, failures: list[dict[str, str]]) -> None:
    """STORE/failures.csv of the latest run; removed when nothing failed."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, FAILURE_COLUMNS)
        writer.writeheader()
        writer.writerows(failures)
    os.replace(temporary, path)
