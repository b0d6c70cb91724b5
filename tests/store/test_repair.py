import json
import sqlite3

import numpy as np
import pytest

from featurecache.errors import CorruptionError, LockedError, MissingFileError, StoreError
from featurecache.store.rebuild import rebuild_index
from featurecache.store.repair import repair
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def append_all(filled, kit, numbers=range(40)):
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        return appender.append(kit.keys(numbers), kit.features(numbers))


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("array", ["penultimate@none", "key"])
def test_repair_drops_damaged_chunks_only_and_extract_computes_those(filled, kit, chunk, array):
    flip(filled.chunk(chunk, array))
    lost = range(chunk * 16, min(chunk * 16 + 16, 40))
    report = repair(filled.path)
    assert (report.dropped, report.kept) == (len(lost), 40 - len(lost))
    assert len(report.trashed) == 3
    assert verify(filled.path).ok
    store = FeatureStore(filled.path)
    missing = np.flatnonzero(store.rows(filled.recipe.id, kit.keys(range(40))) < 0)
    np.testing.assert_array_equal(missing, lost)
    view = store.resolve(store.binding("birds"), "side")
    assert (view.state == "pending").sum() == len(lost)
    with pytest.raises(StoreError, match="rows are no longer in the store"):
        store.read(filled.recipe.id, "penultimate@none", [lost[0]])
    assert append_all(filled, kit) == len(lost)
    filled.check()
    assert verify(filled.path).ok


def test_repair_of_a_sound_store_changes_nothing(filled):
    report = repair(filled.path)
    assert (report.dropped, report.kept, report.rewritten, report.trashed) == (0, 40, [], [])
    filled.check()


def test_repair_writes_metadata_anew(filled, kit):
    good = {path: path.read_bytes() for path in filled.paths.zarr.rglob("zarr.json")}
    for path in good:
        path.write_text("{")
    with pytest.raises(CorruptionError, match=r"zarr.json: missing or damaged .*--repair` writes it anew"):
        FeatureStore(filled.path)
    report = repair(filled.path)
    assert sorted(report.rewritten) == sorted(map(str, good))
    assert report.dropped == 0
    assert {path: json.loads(path.read_bytes()) for path in good} == {p: json.loads(b) for p, b in good.items()}
    append_all(filled, kit, range(40, 90))
    filled.check(range(90))


def test_repair_of_keys_that_disagree(filled, kit):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    index.execute("UPDATE rows SET key = randomblob(32) WHERE row = 20")
    index.execute("UPDATE rows SET slot = 5000 WHERE row = 0")
    index.close()
    assert repair(filled.path).dropped == 17
    assert append_all(filled, kit) == 17
    filled.check()


def test_repair_needs_a_sound_index(filled):
    filled.paths.index.write_bytes(b"not a database" * 500)
    with pytest.raises((StoreError, CorruptionError), match="--rebuild-index"):
        repair(filled.path)


def test_repair_and_rebuild_need_the_lock(filled):
    with FeatureStore(filled.path, write=True):
        for action in (repair, rebuild_index):
            with pytest.raises(LockedError):
                action(filled.path)


@pytest.mark.parametrize("state", ["lost", "garbage", "good"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_rebuilding_brings_every_row_back(tmp_path, kit, state, codec):
    filled = kit.fill(tmp_path / "store", codec=codec)
    store = FeatureStore(filled.path)
    identity, generation, binding = store.uuid, store.generation, store.binding("birds")
    store.close()
    if state == "lost":
        filled.paths.index.unlink()
    elif state == "garbage":
        filled.paths.index.write_bytes(b"not a database" * 500)
    report = rebuild_index(filled.path)
    assert (report.kept, report.trashed) == (40, [])
    assert verify(filled.path).ok, verify(filled.path).problems
    filled.check()
    store = FeatureStore(filled.path)
    assert store.uuid == identity
    assert store.generation > generation
    assert store.recipe(filled.recipe.id).codec == codec
    if state == "good":
        assert store.binding("birds").digest == binding.digest
    else:
        assert store.bindings() == []
        assert "datasets were lost" in report.notes[-1]
    store.close()
    # The partial chunk is known as such: appending rewrites it.
    append_all(filled, kit, range(40, 50))
    filled.check(range(50))
    assert not filled.chunk(2).exists()
    assert verify(filled.path).ok


def test_rebuilding_leaves_damaged_and_half_written_chunks_out(filled, kit):
    flip(filled.chunk(1, "layer4@none"))
    filled.chunk(2, "key").unlink()
    filled.paths.index.unlink()
    report = rebuild_index(filled.path)
    assert report.kept == 16
    assert "chunks [1, 2] are damaged" in report.notes[0]
    assert append_all(filled, kit) == 24
    filled.check()


def test_rebuilding_prefers_the_later_of_two_copies(tmp_path, kit):
    """A process that died between commit and clearing leaves the superseded partial chunk behind."""
    filled = kit.fill(tmp_path / "store", n=10)
    saved = {path: path.read_bytes() for path in filled.paths.zarr.rglob("c.*")}
    append_all(filled, kit, range(10, 14))
    for path, content in saved.items():
        path.write_bytes(content)
    filled.paths.index.unlink()
    report = rebuild_index(filled.path)
    assert report.kept == 14
    assert len(report.trashed) == 3
    filled.check(range(14))


def test_rebuilding_knows_swapped_chunks_by_the_old_index(filled, kit):
    content = filled.chunk(0).read_bytes()
    filled.chunk(1).write_bytes(content)
    report = rebuild_index(filled.path)
    assert report.kept == 24
    assert append_all(filled, kit) == 16
    filled.check()


def test_rebuilding_after_a_change_in_the_old_index(filled, kit):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    index.execute("UPDATE chunks SET sha256 = zeroblob(32) WHERE chunk = 0")
    index.execute("UPDATE rows SET slot = 5000 WHERE row = 0")
    index.close()
    assert rebuild_index(filled.path).kept == 40
    filled.check()
    assert verify(filled.path).ok


def test_rebuilding_with_a_damaged_root(filled):
    (filled.paths.zarr / "zarr.json").unlink()
    filled.paths.index.unlink()
    assert rebuild_index(filled.path).kept == 40
    filled.check()


def test_rebuilding_keeps_failures_and_replicas(tmp_path, kit):
    recipe = kit.recipe(augmentation={"seed": 1})
    with FeatureStore(tmp_path / "s", write=True) as store:
        store.add_recipe(recipe, kit.TAPS, rows_per_chunk=4)
        with store.appender(recipe.id) as appender:
            appender.append(kit.keys([1, 1, 2, 2, 3]), kit.features(range(5)), [0, 1, 0, 1, 5])
        store.add_failures(recipe.id, [(kit.keys([9])[0].tobytes(), "image/1", "truncated")])
    rebuild_index(tmp_path / "s")
    store = FeatureStore(tmp_path / "s")
    np.testing.assert_array_equal(store.rows(recipe.id, kit.keys([1, 1, 2, 2, 3]), [0, 1, 0, 1, 5]), np.arange(5))
    assert list(store.failures(recipe.id).values()) == [("image/1", "truncated")]


def test_nothing_to_rebuild_from(tmp_path):
    with pytest.raises(MissingFileError, match=r"no features.zarr, so there is nothing to rebuild an index from"):
        rebuild_index(tmp_path)
