"""What stage one has to do: cells grouped by recipe, what the store knows of each, and the binding that joins them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.config import BodyConfig, ExtractConfig, ManifestConfig, for_view
from featurecache.data.manifest import Manifest
from featurecache.errors import InputError
from featurecache.keys import Cell, present_cells, unchanged
from featurecache.store.binding import Binding
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore
from featurecache.viewsetup import EngineChoice, ViewSetup, choose_engine, set_up_view, with_taps_of


@dataclass
class Job:
    """The cells of all views that share one recipe, and what is known of them."""

    setup: ViewSetup
    choice: EngineChoice
    recipe: Recipe
    views: list[str]
    cells: list[Cell] = field(default_factory=list)
    keys: dict[int, bytes] = field(default_factory=dict)  # cell index -> key, where known
    todo: list[Cell] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)  # cell index -> reason
    computed: int = 0


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
        held = max(store.find(recipe) if store is not None else [], key=lambda info: info.rows, default=None)
        if held is not None and held.recipe.digest != recipe.digest:
            # A group with more taps serves as well, and stays complete: what it lacks is computed with all.
            setup, recipe = with_taps_of(setup, held.recipe), held.recipe
        job = jobs.setdefault(recipe.digest, Job(setup, choice, recipe, []))
        job.views.append(view)
        job.cells += present_cells(manifest.cells, view)
    for job in jobs.values():
        look_up(job, store, check=config.check, retry_failed=config.retry_failed)
    return list(jobs.values())


def look_up(job: Job, store: FeatureStore | None, *, check: str, retry_failed: bool) -> None:
    """Fill `keys`, `todo` and the failures that are remembered."""
    job.keys = unchanged(job.cells, store) if store is not None and check == "stat" else {}
    done = stored(job, store)
    remembered = {} if retry_failed or store is None else remembered_failures(store, job.recipe.id)
    job.todo = []
    for cell in job.cells:
        key = job.keys.get(cell.index)
        if key is not None and key in remembered:
            job.failures[cell.index] = remembered[key]
        elif cell.index not in done:
            job.todo.append(cell)


def stored(job: Job, store: FeatureStore | None) -> set[int]:
    """Indices of the cells whose key is known and has a row."""
    if store is None or not job.keys or job.recipe.id not in {info.id for info in store.recipes()}:
        return set()
    indices = np.fromiter(job.keys, dtype=np.int64, count=len(job.keys))
    rows = store.rows(job.recipe.id, key_array(list(job.keys.values())))
    return set(indices[rows >= 0].tolist())


def remembered_failures(store: FeatureStore, recipe_id: str) -> dict[bytes, str]:
    """Deterministic failures of earlier runs: {key: reason}."""
    if recipe_id not in {info.id for info in store.recipes()}:
        return {}
    return {key: message for key, (_, message) in store.failures(recipe_id).items()}


def key_array(keys: list[bytes]) -> NDArray[np.uint8]:
    """(n, 32) uint8 from n keys."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), 32)


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
    """The configuration with the views that an earlier run bound under the same name, so that a view can be added."""
    if previous is None or previous.manifest_path != str(manifest.path) or not config.views:
        return config
    earlier = {
        view: column for view, column in previous.config["manifest"]["views"].items() if view not in config.views
    }
    return config.model_copy(update={"views": {**earlier, **config.views}}) if earlier else config


def make_binding(
    name: str,
    manifest: Manifest,
    config: ExtractConfig,
    jobs: list[Job],
    store: FeatureStore,
    previous: Binding | None,
) -> Binding:
    """The join of this manifest with the store: key and state per cell, one recipe per view."""
    keys: list[bytes | None] = [None] * manifest.cells.height
    states = ["absent" if value is None else "pending" for value in manifest.cells["value"].to_list()]
    recipes: dict[str, str] = {}
    for job in jobs:
        recipes |= dict.fromkeys(job.views, job.recipe.id)
        done = stored(job, store)
        for index, key in job.keys.items():
            keys[index] = key
        for index in done:
            states[index] = "done"
        for index in job.failures:
            states[index] = "failed"
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
