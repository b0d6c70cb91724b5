"""The recipes of a store: listed, found by name or by what they hold, added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from featurecache.errors import InputError, StoreError
from featurecache.store.binding import binding_names, load_binding, resolve_cells
from featurecache.store.files import step
from featurecache.store.format import Layout, StorePaths, TapInfo
from featurecache.store.index import Index, StoredRecipe
from featurecache.store.opening import write_group
from featurecache.store.recipe import Recipe
from featurecache.store.records import load_failures


@dataclass(frozen=True)
class RecipeInfo:
    """A recipe of the store: its rows and bytes now, and how it is laid out."""

    recipe: Recipe
    rows: int
    bytes: int
    taps: Mapping[str, TapInfo]
    rows_per_chunk: int
    codec: str
    replicas: bool
    canary: Mapping[str, Any] | None
    recorded: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The first 16 digits of the recipe's digest."""
        return self.recipe.id

    def to_json(self) -> dict[str, Any]:
        """Plain values for listings; the whole recipe is in `recipe.to_json()`."""
        fields = self.recipe.fields
        body = fields.get("body")
        return {
            "id": self.id,
            "digest": self.recipe.digest,
            "base": self.recipe.base,
            "body": body.get("architecture") if isinstance(body, Mapping) else None,
            "engine": fields.get("engine"),
            "precision": fields.get("precision"),
            "taps": {
                name: {"shape": list(tap.shape), "dtype": tap.dtype, "dims": list(tap.dims)}
                for name, tap in self.taps.items()
            },
            "rows": self.rows,
            "bytes": self.bytes,
            "rows_per_chunk": self.rows_per_chunk,
            "codec": self.codec,
            "replicas": self.replicas,
        }


def describe(index: Index, stored: StoredRecipe) -> RecipeInfo:
    """What there is of a recipe now."""
    rows, size = index.count(stored.number)
    layout = stored.layout
    taps = {name: TapInfo(shape, layout.dtype, dims) for name, (shape, dims) in layout.taps.items()}
    return RecipeInfo(
        recipe=stored.recipe,
        rows=rows,
        bytes=size,
        taps=taps,
        rows_per_chunk=layout.rows_per_chunk,
        codec=layout.codec,
        replicas=layout.replicas,
        canary=stored.canary,
        recorded=stored.recorded,
    )


def by_name(index: Index, name: str) -> StoredRecipe:
    """The recipe whose digest begins with `name`.

    Raises:
        InputError: none or several do; lists what there is.
    """
    stored = index.recipes()
    found = [entry for entry in stored if name and entry.recipe.digest.startswith(name.lower())]
    if len(found) != 1:
        known = ", ".join(entry.recipe.id for entry in stored) or "none"
        problem = "no recipe" if not found else f"{len(found)} recipes whose digest begins with"
        raise InputError(f"{index.paths.root}: {problem} {name!r}. Recipes of this store: {known}.")
    return found[0]


def holding(index: Index, recipe: Recipe) -> list[StoredRecipe]:
    """Recipes of the same base with all taps of `recipe`; the very same first."""
    found = [stored for stored in index.recipes() if stored.recipe.holds(recipe)]
    return sorted(found, key=lambda stored: stored.recipe.digest != recipe.digest)


def present(index: Index, recipe: Recipe, taps: Mapping[str, tuple[Iterable[int], Iterable[str]]]) -> bool:
    """Whether the very recipe is in the store.

    Raises:
        InputError: it is, with other shapes.
        StoreError: another recipe has its id.
    """
    for stored in index.recipes():
        if stored.recipe.digest == recipe.digest:
            asked = Layout.create(recipe, taps, stored.layout.codec, stored.layout.rows_per_chunk)
            if stored.layout.taps != asked.taps:
                raise InputError(
                    f"recipe {recipe.id} is in the store with the shapes {dict(stored.layout.taps)}, "
                    f"not {dict(asked.taps)}"
                )
            return True
        if stored.recipe.id == recipe.id:
            raise StoreError(
                f"recipe {recipe.digest} can't be added: it shares its first 16 digits with {stored.recipe.digest}"
            )
    return False


def add(
    index: Index,
    paths: StorePaths,
    recipe: Recipe,
    layout: Layout,
    canary: Mapping[str, Any] | None,
    recorded: Mapping[str, Any],
) -> None:
    """Add a recipe: first its group in features.zarr, then the index, which makes it count."""
    write_group(paths, recipe, layout, canary, recorded)
    index.add_recipe(recipe, layout, canary, recorded)
    step("recipe-indexed")


def summary(index: Index) -> dict[str, Any]:
    """What is in the store, as plain JSON values."""
    meta, stored = index.meta(), index.recipes()
    return {
        "format": meta.format,
        "uuid": meta.uuid,
        "generation": meta.generation,
        "recipes": [
            {**describe(index, entry).to_json(), "failures": len(load_failures(index, entry.number))}
            for entry in stored
        ],
        "datasets": [_dataset(index, name) for name in binding_names(index)],
    }


def _dataset(index: Index, name: str) -> dict[str, Any]:
    binding = load_binding(index, name)
    views = {
        view: {
            "recipe": recipe,
            **resolve_cells(index, by_name(index, recipe).number, binding, view, own=True).counts(),
        }
        for view, recipe in binding.recipes.items()
    }
    return {
        "name": name,
        "manifest": binding.manifest_path,
        "digest": binding.digest,
        "samples": binding.table.height,
        "views": views,
        "replicas": dict(binding.config.get("replicas", {})),
    }
