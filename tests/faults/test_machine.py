"""Case 12: whatever is done to a store, in whatever order, with kills in between: it holds what a dict holds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import store_actions
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from killed_upkeep import Upkeep, shared
from store_actions import RECIPES
from store_kit import TAPS, make_features, make_keys

from featurecache.store import verify as verify_module
from featurecache.store.format import CODECS
from featurecache.store.rebuild import rebuild_index
from featurecache.store.repair import repair
from featurecache.store.store import FeatureStore, RecipeInfo
from featurecache.store.verify import verify

NUMBERS = st.lists(st.integers(0, 30), min_size=1, max_size=25)
STEPS = st.integers(1, 30)  # an extract takes about 60 operations, where there is something to do, the others fewer
VERSIONS = 100
"""Image n in version v has the key n + 100 v, and its features are those of that number: other bytes, other row."""


def bird(image: int) -> str:
    return f"bird-{image}"


class StoreMachine(RuleBasedStateMachine):
    """The model: what each recipe has rows for, and which image each sample of the dataset `birds` is of."""

    upkeep: Upkeep
    done: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
        self.path = self.folder / "store"
        self.rows: list[set[int]] = [set(), set()]
        self.tried: list[set[int]] = [set(), set()]  # every row that anything ever began to write
        self.versions = dict.fromkeys(range(31), 0)
        self.samples: dict[int, int] = {}  # image -> number of its content when it was bound
        self.copies = 0

    @initialize(codec=st.sampled_from(CODECS), rows_per_chunk=st.integers(1, 9))
    def begin(self, codec: str, rows_per_chunk: int) -> None:
        with FeatureStore(self.path, write=True) as store:
            for recipe in RECIPES:
                store.add_recipe(recipe, TAPS, codec=codec, rows_per_chunk=rows_per_chunk)
        self.codec, self.rows_per_chunk = codec, rows_per_chunk

    def teardown(self) -> None:
        self.done["runs"] += 1
        shutil.rmtree(self.folder)

    # ---- what is done ------------------------------------------------------------------------------------------------

    def contents(self, images: list[int]) -> list[int]:
        return [image + VERSIONS * self.versions[image] for image in images]

    def extraction(self, recipe: int, images: list[int]) -> tuple:
        """Arguments of `store_actions.extract` that add these images to the dataset."""
        self.tried[recipe] |= set(self.contents(images))
        samples = self.samples | dict(zip(images, self.contents(images), strict=True))
        named = {str(image): number for image, number in sorted(samples.items())}
        return recipe, self.contents(images), named, self.codec, self.rows_per_chunk

    @rule(recipe=st.integers(0, 1), images=NUMBERS)
    def add(self, recipe: int, images: list[int]) -> None:
        """Also what resumes after a kill: the same command again."""
        store_actions.extract(self.path, *self.extraction(recipe, images))
        self.rows[recipe] |= set(self.contents(images))
        self.samples |= dict(zip(images, self.contents(images), strict=True))

    @rule(images=NUMBERS)
    def change(self, images: list[int]) -> None:
        """Other bytes in these files: the next extract adds rows, the earlier ones stay until prune."""
        for image in set(images):
            self.versions[image] = (self.versions[image] + 1) % 3

    @rule(images=NUMBERS)
    @precondition(lambda self: self.samples)
    def remove(self, images: list[int]) -> None:
        known = sorted(set(images) & set(self.samples))
        if known:
            store_actions.forget(self.path, *map(bird, known))
            gone = {self.samples.pop(image) for image in known}
            for rows in self.rows:
                rows -= gone

    @rule()
    def prune(self) -> None:
        store_actions.prune(self.path)
        for rows in self.rows:
            rows &= set(self.samples.values())

    @rule(recipe=st.integers(0, 1))
    def remove_recipe(self, recipe: int) -> None:
        if self.has(recipe):
            store_actions.rm(self.path, RECIPES[recipe].id)
            self.rows[recipe] = set()

    @rule(ordered=st.booleans())
    def compact(self, ordered: bool) -> None:
        target = self.target()
        store_actions.compact(self.path, str(target), "birds" if ordered and self.samples else None)
        shutil.rmtree(self.path)
        self.path = target

    @rule()
    def rebuild(self) -> None:
        """Of an index that can be read: what a commit that was cut off had begun to write does not come back."""
        assert rebuild_index(self.path).kept == sum(map(len, self.rows))

    @rule()
    def lose_the_index(self) -> None:
        """All that was committed comes back, and maybe what a process had written that died before it could commit."""
        (self.path / "index.sqlite").unlink()
        for log in self.path.glob("index.sqlite-*"):
            log.unlink()
        report = rebuild_index(self.path)
        now, self.samples = self.look()
        assert self.samples == {}, "the next extract binds them again"
        assert all(map(set.issubset, self.rows, now))
        assert all(map(set.issubset, now, self.tried))
        assert report.kept == sum(map(len, now))
        self.rows = now

    @rule(recipe=st.integers(0, 1), which=st.integers(0, 50), step=STEPS)
    def damage_and_repair(self, recipe: int, which: int, step: int) -> None:
        """Exactly the rows of the damaged chunk go, whenever the repair is killed; the next extract adds them again."""
        chunks = self.committed(recipe)
        if not chunks:
            return
        chunks[which % len(chunks)].unlink()
        (problem,) = verify(self.path).problems
        before = set(self.rows[recipe])
        self.killed(step, "repair")
        repair(self.path)
        self.rows[recipe] = self.look()[0][recipe]
        assert self.rows[recipe] < before
        assert len(before - self.rows[recipe]) <= self.rows_per_chunk
        assert problem.chunk >= 0

    # ---- kill -9 -----------------------------------------------------------------------------------------------------

    def killed(self, step: int, action: str, *arguments: object) -> bool:
        """Do it in another process, killed at its `step`th operation; False where it came to its end."""
        killed = self.upkeep.killed("", step, action, self.path, *arguments)
        self.done[f"{action} {'killed' if killed else 'ended'}"] += 1
        return killed

    @rule(recipe=st.integers(0, 1), images=NUMBERS, step=st.integers(1, 60))
    def kill_extract(self, recipe: int, images: list[int], step: int) -> None:
        wanted = set(self.contents(images))
        self.killed(step, "extract", *self.extraction(recipe, images))
        now, self.samples = self.look()
        assert self.rows[recipe] <= now[recipe] <= self.rows[recipe] | wanted
        self.rows[recipe] = now[recipe]

    @rule(images=NUMBERS, step=STEPS)
    @precondition(lambda self: self.samples)
    def kill_remove(self, images: list[int], step: int) -> None:
        known = sorted(set(images) & set(self.samples))
        if not known:
            return
        gone = {self.samples[image] for image in known}
        self.killed(step, "forget", *map(bird, known))
        now, self.samples = self.look()
        for before, after in zip(self.rows, now, strict=True):
            assert before - gone <= after <= before
        self.rows = now

    @rule(step=STEPS)
    def kill_prune(self, step: int) -> None:
        self.killed(step, "prune")
        now, _ = self.look()
        for before, after in zip(self.rows, now, strict=True):
            assert before & set(self.samples.values()) <= after <= before
        self.rows = now

    @rule(recipe=st.integers(0, 1), step=STEPS)
    def kill_remove_recipe(self, recipe: int, step: int) -> None:
        """Where a dataset names it, it stays without rows, which go a chunk at a time; else it goes as a whole."""
        if self.has(recipe):
            self.killed(step, "rm", RECIPES[recipe].id)
            now = self.look()[0][recipe]
            assert now <= self.rows[recipe]
            self.rows[recipe] = now

    @rule(step=STEPS)
    def kill_rebuild(self, step: int) -> None:
        """The store is as it was, its dataset included."""
        self.killed(step, "rebuild")

    @rule(step=st.integers(1, 200))
    def kill_compact(self, step: int) -> None:
        """The source is as it was; there is no copy, or the whole of it."""
        target = self.target()
        self.killed(step, "compact", str(target), None)
        if target.exists():
            assert verify(target).ok
            assert verify(target).rows == sum(map(len, self.rows))

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def target(self) -> Path:
        self.copies += 1
        return self.folder / f"copy{self.copies}"

    def has(self, recipe: int) -> bool:
        store = FeatureStore(self.path)
        try:
            return RECIPES[recipe].id in [info.id for info in store.recipes()]
        finally:
            store.close()

    def committed(self, recipe: int) -> list[Path]:
        """The chunk files of one tap that commits name: there may be others, of a commit that was cut off."""
        store = FeatureStore(self.path)
        try:
            numbers = {stored.recipe.id: stored.number for stored in store.index.recipes()}
            named = store.index.chunks(numbers[RECIPES[recipe].id]) if RECIPES[recipe].id in numbers else {}
        finally:
            store.close()
        array = self.path / "features.zarr" / RECIPES[recipe].id / "layer4@none"
        return [array / f"c.{chunk}.0.0.0" for chunk, name in sorted(named) if name == array.name]

    def look(self) -> tuple[list[set[int]], dict[int, int]]:
        """What a reader finds: the rows of each recipe, every one whole and right, and image -> content as bound."""
        store = FeatureStore(self.path)
        try:
            infos = {info.id: info for info in store.recipes()}
            rows = [self.right_rows(store, infos[recipe.id]) if recipe.id in infos else set() for recipe in RECIPES]
            if "birds" not in store.bindings():
                return rows, {}
            binding = store.binding("birds")
        finally:
            store.close()
        ids = binding.sample_ids[binding.cells["sample"].to_numpy()]
        keys = [int.from_bytes(key[-4:], "big") for key in binding.cells["key"].to_list()]
        return rows, {int(name.removeprefix("bird-")): key for name, key in zip(ids.tolist(), keys, strict=True)}

    @staticmethod
    def right_rows(store: FeatureStore, info: RecipeInfo) -> set[int]:
        numbers = np.array([image + VERSIONS * version for version in range(3) for image in range(31)])
        rows = store.rows(info.id, make_keys(numbers))
        known = numbers[rows >= 0]
        for tap, expected in make_features(known).items():
            np.testing.assert_array_equal(store.read(info.id, tap, rows[rows >= 0]), expected)
        assert info.rows == len(known), "no row twice, none unknown"
        return set(known.tolist())

    @invariant()
    def as_the_dict(self) -> None:
        if self.path.exists():
            assert self.look() == (self.rows, self.samples)

    @invariant()
    def sound(self) -> None:
        if self.path.exists():
            report = verify(self.path)
            assert report.ok, report.problems
            assert report.rows == sum(map(len, self.rows))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(verify_module, "_PATIENCE", 0)  # nobody enlarges anything meanwhile


def run_machine(examples: int, steps: int, seed: int | None = None) -> Counter[str]:
    """What was done; without a seed it is the same in every session."""
    counts: Counter[str] = Counter()

    class Machine(StoreMachine):
        upkeep = shared()
        done = counts

    profile = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=seed is None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    factory = Machine if seed is None else hypothesis.seed(seed)(Machine)
    run_state_machine_as_test(factory, settings=profile)
    return counts


def test_a_store_is_a_dict_whatever_is_done_to_it():
    run_machine(examples=3, steps=12)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_store_is_a_dict_whatever_is_done_to_it_for_long(record, seed):
    counts = run_machine(examples=30, steps=30, seed=seed)
    kills = sum(count for what, count in counts.items() if what.endswith(" killed"))
    assert kills >= 50
    record("machine_runs", counts["runs"])
    record("machine_kills_survived", kills)
