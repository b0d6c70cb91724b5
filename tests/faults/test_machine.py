"""Case 12: whatever is done to a store, in whatever order, with kills in between: it holds what a dict holds."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
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
from store_actions import RECIPES
from store_kit import TAPS, make_features, make_keys
from store_writer import Writers

from featurecache.store.format import CODECS
from featurecache.store.rebuild import rebuild_index
from featurecache.store.repair import repair
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

NUMBERS = st.lists(st.integers(0, 30), min_size=1, max_size=25)
VERSIONS = 100
"""Image n in version v has the key n + 100 v, and its features are those of that number: other bytes, other row."""


class StoreMachine(RuleBasedStateMachine):
    """The model: what each recipe has rows for, and which image each sample of the dataset `birds` is of."""

    writers: Writers

    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
        self.path = self.folder / "store"
        self.rows: list[set[int]] = [set(), set()]
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
        shutil.rmtree(self.folder)

    # ---- what is done ------------------------------------------------------------------------------------------------

    def contents(self, images: list[int]) -> list[int]:
        return [image + VERSIONS * self.versions[image] for image in images]

    def extraction(self, recipe: int, images: list[int]) -> tuple:
        """Arguments of `store_actions.extract` that add these images to the dataset."""
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
            store_actions.forget(self.path, known)
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
        if RECIPES[recipe].id in [info.id for info in FeatureStore(self.path).recipes()]:
            store_actions.remove_recipe(self.path, recipe)
            self.rows[recipe] = set()

    @rule(ordered=st.booleans())
    def compact(self, ordered: bool) -> None:
        self.copies += 1
        target = self.folder / f"copy{self.copies}"
        store_actions.compact(self.path, str(target), "birds" if ordered and self.samples else None)
        shutil.rmtree(self.path)
        self.path = target

    @rule()
    def rebuild(self) -> None:
        assert rebuild_index(self.path).kept == sum(map(len, self.rows))

    @rule(recipe=st.integers(0, 1), which=st.integers(0, 50))
    def damage_and_repair(self, recipe: int, which: int) -> None:
        """Exactly the rows of the damaged chunk go; the next extract adds them again."""
        chunks = sorted((self.path / "features.zarr" / RECIPES[recipe].id / "layer4@none").glob("c.*"))
        if not chunks:
            return
        chunks[which % len(chunks)].unlink()
        (problem,) = verify(self.path).problems
        before, report = set(self.rows[recipe]), repair(self.path)
        self.rows[recipe] = self.found(recipe)
        assert self.rows[recipe] < before
        assert 0 < report.dropped == len(before - self.rows[recipe]) <= self.rows_per_chunk
        assert problem.chunk >= 0

    # ---- kill -9 -----------------------------------------------------------------------------------------------------

    def killed(self, step: int, action: str, *arguments: object) -> bool:
        """Do it in another process, killed at its `step`th operation; False where it came to its end."""
        writer = self.writers.act(self.path, action, *arguments, die_at=step)
        assert writer.status in (0, -signal.SIGKILL), writer.error
        return writer.status != 0

    @rule(recipe=st.integers(0, 1), images=NUMBERS, step=st.integers(1, 90))
    def kill_extract(self, recipe: int, images: list[int], step: int) -> None:
        wanted = set(self.contents(images))
        self.killed(step, "extract", *self.extraction(recipe, images))
        now = self.found(recipe)
        assert self.rows[recipe] <= now <= self.rows[recipe] | wanted
        self.rows[recipe] = now
        self.samples = self.bound()

    @rule(images=NUMBERS, step=st.integers(1, 90))
    @precondition(lambda self: self.samples)
    def kill_remove(self, images: list[int], step: int) -> None:
        known = sorted(set(images) & set(self.samples))
        if not known:
            return
        gone = {self.samples[image] for image in known}
        self.killed(step, "forget", known)
        for recipe in (0, 1):
            now = self.found(recipe)
            assert self.rows[recipe] - gone <= now <= self.rows[recipe]
            self.rows[recipe] = now
        self.samples = self.bound()

    @rule(step=st.integers(1, 90))
    def kill_prune(self, step: int) -> None:
        self.killed(step, "prune")
        for recipe in (0, 1):
            now = self.found(recipe)
            assert self.rows[recipe] & set(self.samples.values()) <= now <= self.rows[recipe]
            self.rows[recipe] = now

    @rule(step=st.integers(1, 200))
    def kill_compact(self, step: int) -> None:
        target = self.folder / "cut-off"
        if not self.killed(step, "compact", str(target), None):
            shutil.rmtree(target)

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def found(self, recipe: int) -> set[int]:
        """What a reader finds of a recipe; each row is whole and right."""
        store = FeatureStore(self.path)
        try:
            if RECIPES[recipe].id not in [info.id for info in store.recipes()]:
                return set()
            numbers = np.array([image + VERSIONS * version for version in range(3) for image in range(31)])
            rows = store.rows(RECIPES[recipe].id, make_keys(numbers))
            known = numbers[rows >= 0]
            for tap, expected in make_features(known).items():
                np.testing.assert_array_equal(store.read(RECIPES[recipe].id, tap, rows[rows >= 0]), expected)
            assert store.recipe(RECIPES[recipe].id).rows == len(known), "no row twice, none unknown"
            return set(known.tolist())
        finally:
            store.close()

    def bound(self) -> dict[int, int]:
        """Image -> content, as the store has it."""
        store = FeatureStore(self.path)
        try:
            if "birds" not in store.bindings():
                return {}
            binding = store.binding("birds")
            ids = binding.sample_ids[binding.cells["sample"].to_numpy()]
            keys = [int.from_bytes(key[-4:], "big") for key in binding.cells["key"].to_list()]
            return {int(name.removeprefix("bird-")): key for name, key in zip(ids.tolist(), keys, strict=True)}
        finally:
            store.close()

    @invariant()
    def as_the_dict(self) -> None:
        if not self.path.exists():
            return
        assert [self.found(0), self.found(1)] == self.rows
        assert self.bound() == self.samples

    @invariant()
    def sound(self) -> None:
        if self.path.exists():
            report = verify(self.path)
            assert report.ok, report.problems
            assert report.rows == sum(map(len, self.rows))


def run_machine(process: Writers, examples: int, steps: int) -> None:
    class Machine(StoreMachine):
        writers = process

    profile = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(Machine, settings=profile)


def test_a_store_is_a_dict_whatever_is_done_to_it():
    with Writers(actions=True) as process:
        run_machine(process, examples=3, steps=12)
