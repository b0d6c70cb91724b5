"""Stores of made-up features for the benchmarks of stage two: no image and no body is involved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from featurecache.dataset import FeatureDataset
from featurecache.store.binding import CELL_SCHEMA, Binding
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore

NAME = "made-up"
TAP = "penultimate@none"


def make_store(
    folder: Path, n: int, width: int, views: tuple[str, ...] = ("front", "side"), *, codec: str = "none", seed: int = 0
) -> Path:
    """A store with `n` samples of `width` float16 features a view, and a binary target; one that is there is kept.

    Features are those of ReLUs: half are zero. The target is a noisy linear function of them. Memory stays small.
    """
    path = folder / f"{n}x{len(views)}x{width}-{codec}"
    if (path / "index.sqlite").exists():
        return path
    recipe = Recipe({"schema": 1, "body": {"architecture": "none"}, "storage_dtype": "float16"}, ({"name": TAP},))
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width).astype(np.float32)
    labels, keys = [], []
    manifest = folder / f"{NAME}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with FeatureStore(path, write=True) as store:
        store.add_recipe(recipe, {TAP: ((width,), ("features",))}, codec=codec)
        with store.appender(recipe.id) as appender:
            for start in range(0, n, 2048):
                count = min(2048, n - start)
                score = np.zeros(count, np.float32)
                for _ in views:
                    x = np.maximum(rng.standard_normal((count, width), np.float32), 0)
                    score += (x - x.mean(axis=0)) @ direction
                    key = np.frombuffer(rng.bytes(count * 32), np.uint8).reshape(count, 32)
                    appender.append(key, {TAP: x.astype(np.float16)})
                    keys.append(key)
                labels.append(score + 5 * rng.normal(size=count) > 0)
        manifest.write_text("made up\n")
        table = pl.DataFrame(
            {"sample_id": [f"s{i}" for i in range(n)], "label": np.concatenate(labels).astype(np.int64)}
        )
        store.bind(_binding(recipe, table, manifest, views, keys))
    return path


def open_dataset(path: Path, **options: object) -> FeatureDataset:
    """Its dataset, with the target."""
    return FeatureDataset(path, dataset=NAME, target="label", **options)  # type: ignore[arg-type]


def _binding(
    recipe: Recipe, table: pl.DataFrame, manifest: Path, views: tuple[str, ...], keys: list[np.ndarray]
) -> Binding:
    n = table.height
    by_view = {view: np.concatenate(keys[k :: len(views)]) for k, view in enumerate(views)}
    cells = pl.DataFrame(
        {
            "sample": np.tile(np.arange(n), len(views)),
            "view": np.repeat(views, n).tolist(),
            "ordinal": np.zeros(n * len(views), np.int32),
            "key": [key.tobytes() for view in views for key in by_view[view]],
            "state": ["done"] * n * len(views),
        },
        schema=dict(CELL_SCHEMA),
    )
    import hashlib

    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return Binding(NAME, str(manifest), digest, table, {}, dict.fromkeys(views, recipe.id), "error", cells)
