"""What a rebuilt index takes over from the old one, and whose word does not count; kill -9 at every operation."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3

import pytest
from killed_upkeep import shared
from store_kit import TAPS, Filled, fill, make_features, make_keys

from featurecache.errors import StoreError
from featurecache.store import files
from featurecache.store.catalogue import by_name
from featurecache.store.rebuild import rebuild_index
from featurecache.store.removal import drop_recipe
from featurecache.store.repair import repair
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify


@pytest.fixture
def upkeep():
    return shared()


def full_disk(at: str) -> None:
    """From this step or operation on nothing can be written."""

    def fail(step: str) -> None:
        if step == at:
            raise OSError(28, "No space left on device")

    files.hook = fail


def cut_off(filled: Filled) -> None:
    """Rows 40 to 45 are written, together with those of the partial chunk; no commit names the files."""
    with FeatureStore(filled.path, write=True) as store:
        appender = store.appender(filled.recipe.id)
        appender.append(make_keys(range(40, 46)), make_features(range(40, 46)))
        full_disk("chunks-synced")
        with pytest.raises(StoreError, match="No space left"):
            appender.close()
    files.hook = None
    assert filled.chunk(3).exists()


def drop(filled: Filled) -> None:
    with FeatureStore(filled.path, write=True) as store:
        drop_recipe(store.index, store.index.paths, by_name(store.index, filled.recipe.id))


def add(filled: Filled, numbers: list[int]) -> int:
    with FeatureStore(filled.path, write=True) as store:
        store.add_recipe(filled.recipe, TAPS, rows_per_chunk=16)
        with store.appender(filled.recipe.id) as appender:
            return appender.append(make_keys(numbers), make_features(numbers))


@pytest.mark.parametrize("lost", [False, True])
def test_a_commit_that_was_cut_off(filled, lost):
    """An index that can be read says which chunk was committed; without one every whole chunk counts."""
    cut_off(filled)
    if lost:
        filled.paths.index.unlink()
    report = rebuild_index(filled.path)
    assert report.kept == (46 if lost else 40)
    assert len(report.trashed) == 3, "the partial chunk, or the one that nobody committed"
    assert (filled.chunk(2).exists(), filled.chunk(3).exists()) == (not lost, lost)
    filled.check(range(report.kept))
    assert verify(filled.path).ok
    assert add(filled, list(range(60))) == 60 - report.kept
    filled.check(range(60))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE recipes SET next_chunk = 1",
        "DELETE FROM chunks WHERE chunk = 2",
        "DELETE FROM rows WHERE slot >= 32",
    ],
)
def test_one_damaged_table_costs_no_committed_chunk(filled, change):
    """Three places say that the last chunk was committed."""
    with contextlib.closing(sqlite3.connect(filled.paths.index, isolation_level=None)) as connection:
        connection.execute(change)
    report = rebuild_index(filled.path)
    assert (report.kept, report.trashed) == (40, [])
    filled.check()


@pytest.mark.parametrize("taken", ["before", "after"], ids=lambda taken: f"copied {taken} the recipe was dropped")
def test_an_earlier_copy_of_the_index_condemns_nothing(filled, taken):
    """The recipe was dropped and extracted anew, so that its files are others under the names that the copy knows."""
    copies = [filled.paths.index.read_bytes()]
    drop(filled)
    copies.append(filled.paths.index.read_bytes())
    numbers = list(range(60, 0, -1))
    add(filled, numbers)
    filled.paths.index.write_bytes(copies[taken == "after"])
    report = rebuild_index(filled.path)
    assert (report.kept, report.trashed) == (60, [])
    filled.check(numbers)
    assert "look whether its datasets (birds) are those you want" in report.notes[-1]


def test_the_index_of_another_store_condemns_nothing(filled, tmp_path):
    other = fill(tmp_path / "other", n=30, shift=1)
    shutil.copyfile(other.paths.index, filled.paths.index)
    with pytest.raises(StoreError, match=r"are of different stores .* --rebuild-index"):
        FeatureStore(filled.path)
    (problem,) = verify(filled.path).problems  # not each of its files
    assert problem.kind == "index"
    report = rebuild_index(filled.path)
    assert (report.kept, report.trashed) == (40, [])
    filled.check()
    assert "an earlier copy or another store's" in report.notes[-1]


@pytest.mark.parametrize("operation", ["io:write", "io:fsync", "io:rename"])
def test_killed_while_the_index_is_made_anew(filled, upkeep, operation):
    """At any instant the store has its rows and what only an index knows, its datasets."""
    cut_off(filled)
    digest = FeatureStore(filled.path).binding("birds").digest
    for kth in itertools.count(1):
        killed = upkeep.killed(operation, kth, "rebuild", filled.path)
        filled.check()
        assert FeatureStore(filled.path).binding("birds").digest == digest
        assert verify(filled.path).ok, verify(filled.path).problems
        if not killed:
            break
    assert kth > 1
    assert FeatureStore(filled.path).recipe(filled.recipe.id).rows == 40


def test_killed_while_repairing(filled, upkeep):
    """The rows of the damaged chunk are gone at once; the next writer takes its other files away."""
    filled.chunk(1, "layer4@none").unlink()
    assert upkeep.killed("io:rename", 1, "repair", filled.path)
    assert filled.chunk(1).exists()
    filled.check([*range(16), *range(32, 40)])
    assert add(filled, list(range(40))) == 16
    filled.check()
    assert not filled.chunk(1).exists()
    assert verify(filled.path).notes == []


@pytest.mark.parametrize("action", [repair, rebuild_index])
def test_a_full_disk_is_a_typed_error(filled, action):
    (filled.paths.zarr / "zarr.json").unlink()
    full_disk("io:write")
    with pytest.raises(StoreError, match=r"No space left on device\. What was committed before is intact"):
        action(filled.path)
    files.hook = None
    action(filled.path)
    filled.check()
    assert verify(filled.path).ok
