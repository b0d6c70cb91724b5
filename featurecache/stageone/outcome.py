"""What a run of stage one leaves beside features: the binding that joins manifest and store, the list of failures."""

from __future__ import annotations

import csv
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from featurecache.config import BodyConfig, ExtractConfig, ManifestConfig, for_view
from featurecache.data.manifest import Manifest
from featurecache.stageone.jobs import Job, replica_number
from featurecache.stageone.keys import Keys
from featurecache.stageone.viewsetup import RUN_PREFIX
from featurecache.store.binding import STATES, Binding, key_series

FAILURE_COLUMNS = ("sample_id", "view", "path", "error")


def make_binding(
    name: str, manifest: Manifest, config: ExtractConfig, jobs: list[Job], previous: Binding | None, held: Set[str]
) -> Binding:
    """The join of this manifest with the store: key and state per cell, one recipe per view.

    Args:
        name: of the dataset.
        manifest: all of it, earlier views too.
        config: how it was read and extracted.
        jobs: of the views that this run was about.
        previous: the binding of this name that there was.
        held: ids of the recipes that the store has rows of.
    """
    keys = Keys(manifest.cells.height)
    absent, pending, failed, done = map(STATES.index, ("absent", "pending", "failed", "done"))
    states = np.where(manifest.cells["value"].is_null(), absent, pending)
    recipes: dict[str, str] = {}
    for job in jobs:
        recipes |= dict.fromkeys(job.views, job.recipe.id)
        keys.values[job.cells.indices], keys.known[job.cells.indices] = job.keys.values, job.keys.known
        # What may yet be read must not pass for a missing view.
        states[list(job.failures.keys() - job.transient)] = failed
        states[job.cells.indices[job.done]] = done
    cells = manifest.cells.select("sample", "view", "ordinal").with_columns(
        key_series(keys.values, keys.known), pl.Series("state", STATES).gather(states)
    )
    if previous is not None:
        cells, recipes = keep_earlier(cells, manifest, recipes, previous)
    return Binding(
        name=name,
        manifest_path=str(manifest.path),
        manifest_digest=manifest.digest,
        table=manifest.table,
        config=binding_config(config, jobs, previous, held),
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


def moved_views(now: Binding, before: Binding | None) -> list[str]:
    """What to say of views that take other features than before: a head that is fitted next learns from these."""
    held = before.recipes if before is not None else {}
    return [
        f"dataset {now.name}: view {view} now takes recipe {recipe} (before: {old}, whose rows stay; fit-head --recipe "
        f"{view}={old} takes them)"
        for view, recipe in now.recipes.items()
        if (old := held.get(view, recipe)) != recipe
    ]


def binding_config(config: ExtractConfig, jobs: list[Job], previous: Binding | None, held: Set[str]) -> dict[str, Any]:
    """How the manifest is read, and per view the options of its body: enough to do the same to new samples.

    Replicas that an earlier run made stay named by a run that makes none, as long as they are replicas of the view's
    recipe and the store has them: heads go on learning from them, and are told where a new image has none yet.

    `{"manifest": ManifestConfig, "body": BodyConfig, "seed": int or None, "replicas": {view: {"recipe": id, "count":
    how many}}}` as plain JSON values; every option of `body` is given per view.
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
    replicas = dict(previous.config.get("replicas", {})) if previous is not None else {}
    for job in jobs:
        own = {"recipe": replica_number(0, config, job).recipe(job.recipe).id, "count": config.replicas}
        for view in job.views:
            before = replicas.pop(view, None)
            if config.replicas:
                replicas[view] = own
            elif before is not None and previous is not None and previous.recipes.get(view) == job.recipe.id:
                replicas |= {view: before} if before["recipe"] in held else {}
    return {"manifest": manifest, "body": body, "seed": config.seed, "replicas": replicas}


def list_failures(manifest: Manifest, jobs: list[Job]) -> list[dict[str, str]]:
    """One entry a failed cell: sample_id, view, path, error."""
    rows = manifest.cells.select("sample", "view", "value")
    ids = manifest.table["sample_id"]
    entries = []
    failures: dict[int, str] = {}
    for job in jobs:
        about = "" if job.replica is None else f"replica {job.number + 1}: "
        for index, error in job.failures.items():
            failures.setdefault(index, about + error)
    for index, error in sorted(failures.items()):
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
