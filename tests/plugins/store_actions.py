"""What tests do to a store, by name and plain arguments, so that a process can be killed while at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from store_kit import TAPS, make_binding, make_features, make_keys, make_recipe

from featurecache.store import compact as compaction
from featurecache.store import rebuild as rebuilding
from featurecache.store import repair as repairs
from featurecache.store.store import FeatureStore
from featurecache.upkeep.dropping import Removal, carry_out
from featurecache.upkeep.forget import plan_forget
from featurecache.upkeep.maintenance import plan_prune, plan_rm

RECIPES = (make_recipe(), make_recipe(precision="bf16"))


def extract(path: Path, recipe: int, numbers: list[int], samples: dict[str, int], codec: str, rows: int) -> None:
    """As stage one does: what is not there is added, part by part, then the dataset (image -> number) is bound."""
    with FeatureStore(path, write=True) as store:
        store.add_recipe(RECIPES[recipe], TAPS, codec=codec, rows_per_chunk=rows)
        with store.appender(RECIPES[recipe].id) as appender:
            for at in range(0, len(numbers), 7):
                appender.append(make_keys(numbers[at : at + 7]), make_features(numbers[at : at + 7]))
                appender.flush()
        binding = make_binding(RECIPES[recipe].id, list(samples.values()), ids=list(samples))
        store.bind(binding, replace=True)


def forget(path: Path, *ids: str) -> None:
    carry_out(planned(path, lambda store: plan_forget(store, ids)))


def rm(path: Path, *names: str) -> None:
    carry_out(planned(path, lambda store: plan_rm(store, names)))


def prune(path: Path) -> None:
    carry_out(planned(path, plan_prune))


def compact(path: Path, out: str, order: str | None) -> None:
    compaction.compact(path, out, order=order)


def rebuild(path: Path) -> None:
    rebuilding.rebuild_index(path)


def repair(path: Path) -> None:
    repairs.repair(path)


def planned(path: Path, plan: Callable[[FeatureStore], Removal]) -> Removal:
    store = FeatureStore(path)
    try:
        return plan(store)
    finally:
        store.close()
