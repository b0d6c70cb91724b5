"""Rows and recipes taken out of a store: what survives is whole, what does not is gone, kill or reader regardless."""

import os
import signal

import numpy as np
import pytest
import store_kit
from store_kit import make_features, make_keys

from featurecache.errors import CorruptionError, InputError, StoreError
from featurecache.progress import Silent
from featurecache.store import files
from featurecache.store.catalogue import by_name
from featurecache.store.rebuild import rebuild_index
from featurecache.store.removal import affected_chunks, drop_recipe, drop_rows
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

TAP = "penultimate@none"


def drop(path, numbers):
    """Drop the rows of these numbers from the one recipe of a store."""
    with FeatureStore(path, write=True) as store:
        (info,) = store.recipes()
        rows = store.rows(info.id, make_keys(sorted(numbers)))
        stored = by_name(store.index, info.id)
        drop_rows(store.index, store.index.paths, stored, rows[rows >= 0], Silent())


def held(path, total=40):
    """Numbers of the rows that a reader finds, each checked to be right."""
    store = FeatureStore(path)
    (info,) = store.recipes()
    rows = store.rows(info.id, make_keys(range(total)))
    known = np.flatnonzero(rows >= 0)
    for tap, expected in make_features(known).items():
        np.testing.assert_array_equal(store.read(info.id, tap, rows[known]), expected)
    assert info.rows == len(known)
    store.close()
    return set(known.tolist())


def check_sound(path):
    report = verify(path)
    assert report.ok, report.problems
    assert report.notes == []
    return report


CASES = {
    "one": [3],
    "of every chunk": [0, 17, 39],
    "a whole chunk": range(16),
    "the partial chunk": range(32, 40),
    "all but one": range(1, 40),
    "all": range(40),
    "two chunks' worth stays": [*range(8), *range(16, 24), *range(32, 40)],
    "nothing": [],
}


@pytest.mark.parametrize("numbers", CASES.values(), ids=CASES)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_what_is_dropped_is_gone_and_the_rest_is_whole(tmp_path, filler, codec, numbers):
    filled = filler(tmp_path / "store", codec=codec)
    drop(filled.path, numbers)
    left = set(range(40)) - set(numbers)
    assert held(filled.path) == left
    assert check_sound(filled.path).chunks == -(-len(left) // 16)
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(make_keys(range(40)), make_features(range(40)))
    assert appender.appended == len(set(numbers))
    filled.check()
    assert check_sound(filled.path).chunks == 3


def test_no_byte_of_a_dropped_row_is_left(filled):
    secret = [make_features([17])[tap].tobytes() for tap in store_kit.TAPS]
    found = [path for path in filled.path.rglob("*") if path.is_file() and any(s in path.read_bytes() for s in secret)]
    assert len(found) == 2
    drop(filled.path, [17])
    for path in (path for path in filled.path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not any(s in content for s in secret), path
        assert make_keys([17]).tobytes() not in content or path.name.startswith("index.sqlite"), path


def test_bytes_of_rows(filled):
    with FeatureStore(filled.path, write=True) as store:
        (info,) = store.recipes()
        stored = by_name(store.index, info.id)
        rows = store.rows(info.id, make_keys(range(40)))
        assert affected_chunks(store.index, stored, rows) == ([0, 1, 2], info.bytes)
        chunks, size = affected_chunks(store.index, stored, rows[[0, 1, 39]])
        assert chunks == [0, 2]
        assert size == int(info.bytes / 3 * (2 / 16 + 1 / 16))
        assert affected_chunks(store.index, stored, rows[:0]) == ([], 0)


def test_row_ids_stay(filled):
    store = FeatureStore(filled.path)
    before = store.rows(filled.recipe.id, make_keys(range(40)))
    drop(filled.path, range(0, 40, 2))
    after = store.rows(filled.recipe.id, make_keys(range(40)))
    np.testing.assert_array_equal(after[1::2], before[1::2])
    assert (after[::2] == -1).all()
    store.close()


@pytest.mark.parametrize("mapped", [True, False])
def test_an_open_reader_goes_on(filled, mapped):
    """What it has mapped it may still read; never a row that is another one's, nor zeros."""
    store = FeatureStore(filled.path)
    rows = store.rows(filled.recipe.id, make_keys(range(40)))
    if mapped:
        store.read(filled.recipe.id, TAP, rows)
    else:
        store.slots(filled.recipe.id, rows)
    drop(filled.path, range(20))
    np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, rows[20:]), make_features(range(20, 40))[TAP])
    if mapped:
        np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, rows[:20]), make_features(range(20))[TAP])
    else:
        with pytest.raises(StoreError, match="20 of 20 rows are no longer in the store"):
            store.read(filled.recipe.id, TAP, rows[:20])
    store.close()


def test_a_damaged_chunk_stops_it_and_nothing_is_lost(filled):
    chunk = filled.chunk(1)
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CorruptionError, match="checksum differs"):
        drop(filled.path, [3, 17])
    store = FeatureStore(filled.path)
    assert (store.rows(filled.recipe.id, make_keys([3, *range(16, 40)])) >= 0).sum() >= 24
    store.close()
    drop(filled.path, range(16, 32))  # of a chunk that goes altogether nothing is read
    assert held(filled.path) >= set(range(32, 40))
    check_sound(filled.path)


# ---- recipes ---------------------------------------------------------------------------------------------------------


def remove(path, recipe):
    with FeatureStore(path, write=True) as store:
        drop_recipe(store.index, store.index.paths, by_name(store.index, recipe.id))


def test_a_recipe_is_dropped(filled):
    remove(filled.path, filled.recipe)
    assert FeatureStore(filled.path).recipes() == []
    assert [path.name for path in filled.paths.zarr.iterdir()] == ["zarr.json"]
    assert verify(filled.path).problems[0].message.startswith("dataset 'birds'")


def test_a_recipe_that_comes_back_means_no_old_row(filled, kit):
    """Neither ids of rows nor what a reader remembers of the old one lead to the rows of the new one."""
    reader = FeatureStore(filled.path)
    old = reader.rows(filled.recipe.id, make_keys(range(40)))
    remove(filled.path, filled.recipe)
    with pytest.raises(InputError, match="no recipe"):
        reader.rows(filled.recipe.id, make_keys([1]))
    numbers = range(100, 140)
    with FeatureStore(filled.path, write=True) as store:
        store.add_recipe(filled.recipe, kit.TAPS, rows_per_chunk=16)
        with store.appender(filled.recipe.id) as appender:
            appender.append(make_keys(numbers), make_features(numbers))
    fresh = FeatureStore(filled.path)
    for store in (reader, fresh):
        assert (store.rows(filled.recipe.id, make_keys(range(40))) == -1).all()
        new = store.rows(filled.recipe.id, make_keys(numbers))
        assert not set(new.tolist()) & set(old.tolist())
        np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, new), make_features(numbers)[TAP])
    with pytest.raises(StoreError, match="no longer in the store"):
        fresh.read(filled.recipe.id, TAP, old)
    reader.close()
    fresh.close()
    check_sound(filled.path)


# ---- killed ----------------------------------------------------------------------------------------------------------


def die_at(name, count, work):
    """Run `work` in a forked process that is killed when the step is done for the `count`th time; False if it ended."""
    left = [count]

    def kill(step):
        left[0] -= step == name
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            files.hook = kill
            work()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


STEPS = [
    "io:write",
    "io:rename",
    "io:fsync",
    "chunk-written",
    "chunks-synced",
    "rows-dropped",
    "dropped-chunks-deleted",
]


SLOW = [pytest.param(step, True, marks=pytest.mark.slow) for step in STEPS if step != "rows-dropped"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("step", "rebuilt"), [*((step, False) for step in STEPS), ("rows-dropped", True), *SLOW])
def test_killed_while_rows_are_dropped(tmp_path, filler, step, rebuilt):
    """Each row that stays is there at any instant; the same call drops the rest, also if the index was made anew."""
    gone = set(range(0, 40, 3))
    killed = 0
    for count in (2, 5) if step.startswith("io:") else (1,):
        filled = filler(tmp_path / f"store{count}")
        killed += die_at(step, count, lambda path=filled.path: drop(path, gone))
        between = held(filled.path)
        assert between >= set(range(40)) - gone
        if rebuilt:
            rebuild_index(filled.path)
            assert held(filled.path) == between
        drop(filled.path, gone)
        assert held(filled.path) == set(range(40)) - gone
        check_sound(filled.path)
    assert killed


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", ["recipe-dropped", "group-trashed"])
@pytest.mark.parametrize("then", ["write", "rebuild"])
def test_killed_while_a_recipe_is_dropped(filled, step, then):
    assert die_at(step, 1, lambda: remove(filled.path, filled.recipe))
    assert FeatureStore(filled.path).recipes() == []
    assert [problem.kind for problem in verify(filled.path).problems] == ["dataset"]
    if then == "rebuild":
        rebuild_index(filled.path)
    with FeatureStore(filled.path, write=True) as store:
        assert store.recipes() == []
    assert not filled.chunk(0).exists()
    assert not list(filled.paths.trash.glob("*"))
