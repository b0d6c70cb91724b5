"""What a store holds, as `featurecache info` tells it: recipes with taps and rows, datasets with their views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurecache.amounts import counted, human_bytes
from featurecache.store.store import FeatureStore


@dataclass(frozen=True)
class TapHoldings:
    """An array of a recipe.

    Attributes:
        shape: of a row: (features,), (channels, height) or (channels, height, width).
        dtype: of the stored numbers.
        dims: names of the dimensions of a row.
    """

    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class RecipeHoldings:
    """A recipe of a store.

    Attributes:
        id: the first 16 digits of its digest, by which it is named.
        body: the network, or None where the recipe names none.
        engine: that it was run with.
        precision: of the computation.
        taps: name, such as `penultimate@none` -> array.
        rows: committed.
        bytes: of its chunk files.
        failures: contents that can't be extracted.
        replicas: whether rows are of augmented versions of the images.
    """

    id: str
    body: str | None
    engine: str | None
    precision: str | None
    taps: dict[str, TapHoldings]
    rows: int
    bytes: int
    failures: int
    replicas: bool


@dataclass(frozen=True)
class ViewHoldings:
    """A view of a dataset: its recipe, and how many cells are done, absent, failed and pending (not yet extracted)."""

    recipe: str
    done: int
    absent: int
    failed: int
    pending: int


@dataclass(frozen=True)
class DatasetHoldings:
    """A dataset of a store.

    Attributes:
        name: by which stage two finds it.
        manifest: the file or folder that it was made from.
        samples: rows of the manifest.
        views: name -> cells.
        replicas: view -> `count` and `recipe` of its augmented versions.
    """

    name: str
    manifest: str
    samples: int
    views: dict[str, ViewHoldings]
    replicas: dict[str, Any]


@dataclass(frozen=True)
class Holdings:
    """What a store holds; `print` shows it as `featurecache info` does.

    Attributes:
        path: of the store.
        format: of the store, a number.
        recipes: in the order in which they were added.
        datasets: by name.
        figures: the same and more as plain values: what `--json` prints.
    """

    path: Path
    format: int
    recipes: list[RecipeHoldings]
    datasets: list[DatasetHoldings]
    figures: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Rows of all recipes."""
        return sum(recipe.rows for recipe in self.recipes)

    @property
    def bytes(self) -> int:
        """Bytes of all features."""
        return sum(recipe.bytes for recipe in self.recipes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.figures, "bytes": self.bytes}

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [f"store     {self.path}: {human_bytes(self.bytes)}, format {self.format}"]
        for recipe in self.recipes:
            taps = ", ".join(f"{name} {tap.shape} {tap.dtype}" for name, tap in recipe.taps.items())
            rows = counted(recipe.rows, "row") + (" of replicas" if recipe.replicas else "")
            failed = f", {counted(recipe.failures, 'content')} failed" if recipe.failures else ""
            made = f"{recipe.body}, {recipe.engine} {recipe.precision}"
            lines.append(f"recipe    {recipe.id}: {rows}{failed}, {made}, {taps}")
        for dataset in self.datasets:
            lines.append(f"dataset   {dataset.name}: {counted(dataset.samples, 'sample')} of {dataset.manifest}")
            for name, view in dataset.views.items():
                counts = {"done": view.done, "absent": view.absent, "failed": view.failed, "pending": view.pending}
                states = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
                lines.append(f"            {name}: {states}, recipe {view.recipe}")
                if drawn := dataset.replicas.get(name):
                    lines.append(f"            {name}: {drawn['count']} replicas of each, recipe {drawn['recipe']}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def holdings(path: Path) -> Holdings:
    """What a store holds; it is only read.

    Raises:
        MissingFileError: there is no store at `path`.
        StoreError: a part of it is missing or damaged; says what to do.
    """
    with FeatureStore.create_or_open(path, write=False) as store:
        found = store.info()
    return Holdings(
        path, found["format"], [*map(_recipe, found["recipes"])], [*map(_dataset, found["datasets"])], found
    )


def _recipe(found: Mapping[str, Any]) -> RecipeHoldings:
    taps = {
        name: TapHoldings(tuple(tap["shape"]), tap["dtype"], tuple(tap["dims"])) for name, tap in found["taps"].items()
    }
    names = ("id", "body", "engine", "precision", "rows", "bytes", "failures", "replicas")
    return RecipeHoldings(**{name: found[name] for name in names}, taps=taps)


def _dataset(found: Mapping[str, Any]) -> DatasetHoldings:
    views = {name: ViewHoldings(**view) for name, view in found["views"].items()}
    return DatasetHoldings(found["name"], found["manifest"], found["samples"], views, found["replicas"])
