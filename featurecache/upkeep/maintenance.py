"""Plans for `rm` and `prune`: what would be dropped from a store, and what a user should know before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from featurecache.errors import InputError, did_you_mean
from featurecache.store.binding import binding_names, load_binding, resolve_cells
from featurecache.store.contents import among, bound_keys, columns_of, failures_where, known_files, no_keys, rows_where
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.records import load_failures
from featurecache.store.settle import orphans
from featurecache.store.store import FeatureStore
from featurecache.upkeep.dropping import Removal, part_of

SHORTEST = 4  # digits of a recipe's digest that name it
_PARTS = ("box", "frame", "flip_if")  # options that make a cell a part of its file


def plan_rm(store: FeatureStore, names: Sequence[str]) -> Removal:
    """Plan to drop recipes (by four or more of their digits, or `recipe:DIGITS`) and datasets (or `dataset:NAME`).

    A dataset's rows stay, a recipe's go; while a dataset that stays names the recipe, its description stays too.

    Raises:
        InputError: a name is unknown, or may be both; lists what there is.
    """
    index = store.index
    plan = Removal(store.path, store.generation)
    chosen: dict[str, StoredRecipe] = {}
    problems = []
    for name in names:
        try:
            recipe, dataset = _named(index, name)
        except InputError as error:
            problems.append(str(error))
            continue
        if recipe is not None:
            chosen[recipe.recipe.digest] = recipe
        if dataset and dataset not in plan.datasets:
            plan.datasets.append(dataset)
    if problems:
        raise InputError.from_problems(f"{store.path}: {_holdings(index)}", problems)
    kept = [load_binding(index, name) for name in binding_names(index) if chosen and name not in plan.datasets]
    for stored in chosen.values():
        slots = index.slots(stored.number)
        rows = np.flatnonzero(slots >= 0)
        users = [(b, view) for b in kept for view, recipe in b.recipes.items() if _is(stored, recipe)]
        for binding, view in users:
            lost = resolve_cells(index, stored.number, binding, view, own=True).counts()["done"]
            plan.notes.append(
                f"dataset {binding.name!r} names recipe {stored.recipe.id}: {lost:,} images of view {view!r} would be "
                "pending, until extract computes them again"
            )
        part = part_of(index, stored, rows, list(load_failures(index, stored.number)), whole=not users)
        if part.whole or len(part.rows) or part.failures:
            plan.parts.append(part)
    return plan


def _named(index: Index, name: str) -> tuple[StoredRecipe | None, str]:
    """The recipe or the dataset that is meant."""
    kind, _, rest = name.partition(":")
    datasets = binding_names(index)
    if name in datasets and (len(name) < SHORTEST or not _digits(index, name)):
        return None, name
    if kind == "dataset" and rest:
        if rest not in datasets:
            raise InputError(f"no dataset {rest!r}.{did_you_mean(rest, datasets)}")
        return None, rest
    digits = rest if kind == "recipe" else name
    found = _digits(index, digits)
    if name in datasets:
        raise InputError(f"{name!r} is a dataset and the beginning of a recipe: give dataset:{name} or recipe:{name}")
    if len(digits) < SHORTEST and found:
        raise InputError(f"{digits!r} is too short for a recipe: give {SHORTEST} digits or more")
    if len(found) > 1:
        raise InputError(f"{len(found)} recipes begin with {digits!r}: give more digits")
    if not found:
        raise InputError(f"no recipe or dataset {name!r}.{did_you_mean(name, datasets)}")
    return found[0], ""


def _digits(index: Index, digits: str) -> list[StoredRecipe]:
    return [stored for stored in index.recipes() if digits and stored.recipe.digest.startswith(digits.lower())]


def _holdings(index: Index) -> str:
    held = {"recipes": [stored.recipe.id for stored in index.recipes()], "datasets": binding_names(index)}
    return "it has " + " and ".join(
        f"the {what} {', '.join(names)}" if names else f"no {what}" for what, names in held.items()
    )


def _is(stored: StoredRecipe, recipe: str) -> bool:
    return stored.recipe.digest.startswith(recipe.lower())


def plan_prune(store: FeatureStore) -> Removal:
    """Plan to drop what no dataset names any more: rows and failures by their content, recipes without rows, leftovers.

    A row stays, whatever its recipe, as long as any dataset has its content.

    Raises:
        CorruptionError: a dataset can't be read, so that nobody knows what it names.
    """
    index = store.index
    plan = Removal(store.path, store.generation)
    names = binding_names(index)
    named = np.unique(np.concatenate([no_keys(), *(bound_keys(index, name) for name in names)]))
    used: set[str] = set()
    whole_files = True
    for name in names:
        stored_columns = columns_of(index, name)
        used |= set(json.loads(stored_columns["recipes"]).values())
        config = json.loads(stored_columns["config"])
        used |= {replicas["recipe"] for replicas in config.get("replicas", {}).values()}
        whole_files = whole_files and not _has_parts(config)
    for stored in index.recipes():
        rows = rows_where(index, stored, lambda keys: ~among(keys, named))
        failures = failures_where(index, stored, lambda keys: ~among(keys, named))
        held = index.count(stored.number)[0]
        bound = any(_is(stored, recipe) for recipe in used)
        whole = held == len(rows) and not bound
        if whole or len(rows) or failures:
            plan.parts.append(part_of(index, stored, rows, failures, whole=whole))
        elif not bound:
            plan.notes.append(
                f"recipe {stored.recipe.id} stays: no dataset was extracted with it last, but its {held:,} rows are of "
                f"images of one. `featurecache rm {store.path} {stored.recipe.id}` drops it"
            )
    if whole_files:  # which part of a file a cell meant, nobody can tell from the file alone
        plan.files = known_files(index, lambda keys: ~among(keys, named))
    plan.leftovers = orphans(index)
    if plan.rows:
        plan.notes += _unfinished(index, names)
    return plan


def _unfinished(index: Index, names: Sequence[str]) -> list[str]:
    """Warnings where rows that no dataset names may be those of an extraction that was killed."""
    notes = []
    for name in names:
        pending = int((load_binding(index, name).cells["state"] == "pending").sum())
        if pending:
            notes.append(
                f"dataset {name!r} has {pending:,} images that were not extracted to the end: rows of a run that was "
                "killed may be among these. Run extract first to keep them"
            )
    return notes if names else ["there is no dataset: every row goes. Run extract first to keep what it would reuse"]


def _has_parts(config: dict[str, Any]) -> bool:
    return any(config.get("manifest", {}).get(option) for option in _PARTS)
