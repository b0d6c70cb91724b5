"""What tests of the store share: a small recipe, known features, and a store with three chunks and a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from featurecache.errors import InputError
from featurecache.store import files
from featurecache.store.binding import CELL_SCHEMA, Binding
from featurecache.store.format import StorePaths
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

TAPS = {"penultimate@none": ((6,), ("features",)), "layer4@none": ((2, 3, 3), ("channels", "height", "width"))}


def make_recipe(**fields: Any) -> Recipe:
    base = {"reader": {"name": "image", "version": 1, "parameters": {}}, "channels": 3, "storage_dtype": "float16"}
    taps = ({"name": "penultimate@none", "pool": "none"}, {"name": "layer4@none", "pool": "none"})
    return Recipe({**base, **fields}, taps)


def make_keys(numbers: Any) -> np.ndarray:
    """(n, 32) uint8: keys that differ in their last bytes only, the hardest case for prefixes."""
    keys = np.zeros((len(numbers), 32), np.uint8)
    keys[:, 0] = 1
    keys[:, -4:] = np.asarray(numbers, ">u4").view(np.uint8).reshape(-1, 4)
    return keys


def make_features(numbers: Any, dtype: str = "float16") -> dict[str, np.ndarray]:
    """Features that tell by their values which row they are."""
    n = np.asarray(numbers, np.float32)
    return {
        name: (n.reshape(-1, *[1] * len(shape)) + np.arange(np.prod(shape)).reshape(shape) / 64).astype(dtype)
        for name, (shape, _) in TAPS.items()
    }


def make_binding(
    recipe_id: str, numbers: Any, name: str = "birds", path: str = "/data/birds.csv", ids: Any = None
) -> Binding:
    """A dataset whose samples are the rows of these numbers; `ids` where they are to be named otherwise."""
    ids = [f"bird-{n}" for n in (numbers if ids is None else ids)]
    cells = pl.DataFrame(
        {
            "sample": list(range(len(ids))),
            "view": ["side"] * len(ids),
            "ordinal": [0] * len(ids),
            "key": [key.tobytes() for key in make_keys(numbers)],
            "state": ["pending"] * len(ids),
        },
        schema=dict(CELL_SCHEMA),
    )
    table = pl.DataFrame({"sample_id": ids, "label": [n % 2 for n in range(len(ids))]})
    return Binding(name, path, "0" * 64, table, {"layout": "wide"}, {"side": recipe_id}, "error", cells)


@dataclass
class Filled:
    """A closed store with rows 0..39 in chunks of 16 rows (two full ones and a partial one) and the dataset `birds`."""

    path: Path
    recipe: Recipe
    numbers: np.ndarray

    @property
    def paths(self) -> StorePaths:
        return StorePaths(self.path)

    def chunk(self, chunk: int, array: str = "penultimate@none") -> Path:
        rank = {"penultimate@none": 1, "layer4@none": 3, "key": 1, "replica": 0}[array]
        return self.paths.array(self.recipe.id, array) / ".".join(["c", str(chunk), *["0"] * rank])

    def check(self, numbers: Any = None) -> None:
        """All rows are there with their own features."""
        numbers = self.numbers if numbers is None else np.asarray(numbers)
        store = FeatureStore(self.path)
        rows = store.rows(self.recipe.id, make_keys(numbers))
        assert (rows >= 0).all()
        for tap, expected in make_features(numbers).items():
            np.testing.assert_array_equal(store.read(self.recipe.id, tap, rows), expected)
        store.close()


def fill(path: Path, n: int = 40, codec: str = "none", rows_per_chunk: int = 16, shift: int = 0) -> Filled:
    """Make a store; with a `shift` the features are those of other rows."""
    recipe, numbers = make_recipe(), np.arange(n)
    with FeatureStore(path, write=True) as store:
        store.add_recipe(recipe, TAPS, codec=codec, rows_per_chunk=rows_per_chunk)
        with store.appender(recipe.id) as appender:
            appender.append(make_keys(numbers), make_features(numbers + shift))
        store.bind(make_binding(recipe.id, numbers))
    return Filled(path, recipe, numbers)


def write_known(path: Path, rows: int, at_step: Callable[[str], None] | None = None) -> int:
    """Append known rows in chunks of 32 with a flush now and then, going on from what is there; how many were added."""
    files.hook = at_step
    with FeatureStore(path, write=True) as store:
        recipe = make_recipe()
        store.add_recipe(recipe, TAPS, rows_per_chunk=32)
        with store.appender(recipe.id) as appender:
            for at in range(0, rows, 10):
                numbers = range(at, min(at + 10, rows))
                appender.append(make_keys(numbers), make_features(numbers))
                if at % 70 == 60:
                    appender.flush()
    return appender.appended


def known_rows(path: Path, n: int) -> set[int]:
    """Which of the rows 0 to n-1 a reader finds in a store of `write_known`, each checked to be whole and right."""
    recipe = make_recipe()
    try:
        store = FeatureStore(path)
        rows = store.rows(recipe.id, make_keys(range(n)))
    except InputError:  # the store or its recipe were not there yet
        return set()
    known = np.flatnonzero(rows >= 0)
    for tap, expected in make_features(known).items():
        np.testing.assert_array_equal(store.read(recipe.id, tap, rows[known]), expected)
    assert store.recipe(recipe.id).rows == len(known)
    store.close()
    return set(known.tolist())


def check_complete(path: Path, n: int) -> None:
    """All n rows are there, with nothing else, in as few chunks as possible."""
    assert known_rows(path, n) == set(range(n))
    report = verify(path)
    assert report.ok, report.problems
    assert report.notes == []
    assert report.chunks == -(-n // 32)
